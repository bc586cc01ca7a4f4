#include "permission.h"

#if defined(__x86_64__) && defined(__GNUC__) && defined(__linux__)
#define QX_CAN_ASK
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "tiles.h"
#endif

namespace quincunx {
namespace {

#ifdef QX_CAN_ASK

struct Registers {
  unsigned a = 0, b = 0, c = 0, d = 0;
  bool read(unsigned leaf, unsigned count) { return __get_cpuid_count(leaf, count, &a, &b, &c, &d) != 0; }
};

// The processor may have tiles although the system does not save their registers, or only does so when asked.
std::string ask() {
  constexpr unsigned kTile = 1u << 24, kBf16 = 1u << 22, kVectorBf16 = 1u << 5, kSavesState = 1u << 27;
  Registers of_system, features, more, palette;
  if (!features.read(7, 0) || (features.d & kTile) == 0) return "this processor has no AMX tiles";
  if ((features.d & kBf16) == 0) return "this processor's AMX tiles have no bfloat16 product";
  // the epilogues are AVX-512, whose other parts every such processor has
  if (!more.read(7, 1) || (more.a & kVectorBf16) == 0) return "this processor has AMX tiles, but not AVX-512 BF16";
  const bool readable = of_system.read(1, 0) && (of_system.c & kSavesState) != 0;
  unsigned saved = 0, high = 0;
  if (readable) asm volatile("xgetbv" : "=a"(saved), "=d"(high) : "c"(0));
  constexpr unsigned kTileState = 3u << 17;  // configuration and data
  if ((saved & kTileState) != kTileState) return "the operating system does not save AMX tiles";
  // leaf 29: bytes of all tiles and of one; bytes of a row and number of tiles; rows
  const bool as_expected = palette.read(29, 1) && palette.a >> 16 == kTileSize && (palette.b & 0xffff) == kTileBytes &&
                           palette.b >> 16 == kTiles && (palette.c & 0xffff) == kTileHeight;
  if (!as_expected) return "this processor's AMX tiles have another size than 8 tiles of 16 rows of 64 bytes";
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // of arch_prctl
  if (syscall(SYS_arch_prctl, kRequestPermission, kTileData) != 0) {
    return std::string("the operating system refused the permission to use AMX tiles (") + std::strerror(errno) + ")";
  }
  return "";
}

bool ask_for_bytes() {
  constexpr unsigned kInt8 = 1u << 25;
  Registers features;
  return features.read(7, 0) && (features.d & kInt8) != 0;
}

#else

std::string ask() { return "AMX tiles need Linux on x86-64"; }
bool ask_for_bytes() { return false; }

#endif

}  // namespace

const std::string& tiles_refused() {
  static const std::string reason = ask();
  return reason;
}

bool tiles_multiply_bytes() { return ask_for_bytes(); }

}  // namespace quincunx
