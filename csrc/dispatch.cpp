#include "dispatch.h"

#include <algorithm>
#include <cstdlib>
#include <stdexcept>
#include <vector>

#include "permission.h"
#if defined(__unix__) || defined(__APPLE__)
#include <unistd.h>
#endif

#if defined(__x86_64__) && defined(__GNUC__)
#define QX_X86
extern const quincunx::ForwardKernels qx_bf16_amx;
extern const quincunx::ForwardKernels qx_bf16_avx512bf16;
extern const quincunx::GradKernels qx_grad_amx;
extern const quincunx::GradKernels qx_grad_avx512bf16;
extern const quincunx::NormKernels qx_norm_avx512bf16;
extern const quincunx::Kernels qx_kernels_avx512;
extern const quincunx::Kernels qx_kernels_avx2;
extern const quincunx::Int8Kernels qx_int8_amx;
extern const quincunx::Int8Kernels qx_int8_avx512vnni;
extern const quincunx::Int8Kernels qx_int8_avx512;
extern const quincunx::Int8Kernels qx_int8_avxvnni;
extern const quincunx::Int8Kernels qx_int8_avx2;
#endif
extern const quincunx::Int8Kernels qx_int8_baseline;
extern const quincunx::Kernels qx_kernels_baseline;
extern const quincunx::ForwardKernels qx_bf16_amx_emulated;
extern const quincunx::GradKernels qx_grad_amx_emulated;
extern const quincunx::Int8Kernels qx_int8_amx_emulated;

namespace quincunx {
namespace {

struct Choice {
  const char* name;
  Kernels kernels;
  const char* tiles = "";  // what is multiplied on tiles
};

Kernels with_tiles(Kernels kernels, const ForwardKernels& bf16, const GradKernels& grad) {
  kernels.bf16 = bf16;
  kernels.grad = grad;
  return kernels;
}

Kernels with_int8(Kernels kernels, const Int8Kernels& int8) {
  kernels.int8 = int8;
  return kernels;
}

// best first. __builtin_cpu_supports also asks the operating system whether it saves the wide registers.
std::vector<Choice> find_available() {
  std::vector<Choice> found;
#ifdef QX_X86
  __builtin_cpu_init();
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2") &&
                    __builtin_cpu_supports("popcnt");
  const bool vnni = avx512 && __builtin_cpu_supports("avx512vnni");
  if (avx512 && avx2 && __builtin_cpu_supports("avx512bf16")) {
    Kernels with_grad = with_int8(qx_kernels_avx512, vnni ? qx_int8_avx512vnni : qx_int8_avx512);
    with_grad.grad = qx_grad_avx512bf16;
    with_grad.norm_bf16 = qx_norm_avx512bf16;
    if (tiles_refused().empty()) {
      const Kernels tiles = with_tiles(with_grad, qx_bf16_amx, qx_grad_amx);
      if (vnni && tiles_multiply_bytes()) {
        found.push_back({"amx", with_int8(tiles, qx_int8_amx), "bfloat16 and int8"});
      } else {
        found.push_back({"amx", tiles, "bfloat16"});
      }
    }
    with_grad.bf16 = qx_bf16_avx512bf16;
    found.push_back({"avx512bf16", with_grad});
  }
  // the two with VNNI differ from the ones behind them in eight bits only
  if (vnni && avx2) found.push_back({"avx512vnni", with_int8(qx_kernels_avx512, qx_int8_avx512vnni)});
  if (avx512 && avx2) found.push_back({"avx512", with_int8(qx_kernels_avx512, qx_int8_avx512)});
  if (avx2 && __builtin_cpu_supports("avxvnni")) {
    found.push_back({"avxvnni", with_int8(qx_kernels_avx2, qx_int8_avxvnni)});
  }
  if (avx2) found.push_back({"avx2", with_int8(qx_kernels_avx2, qx_int8_avx2)});
#endif
  const Kernels baseline = with_int8(qx_kernels_baseline, qx_int8_baseline);
  found.push_back({"baseline", baseline});
  // to test the tables and loops of amx where there is none
  found.push_back({"amx-emulated", with_int8(with_tiles(baseline, qx_bf16_amx_emulated, qx_grad_amx_emulated), qx_int8_amx_emulated),
                   "bfloat16 and int8"});
  return found;
}

const std::vector<Choice>& available() {
  static const std::vector<Choice> all = find_available();
  return all;
}

const Choice& choose() {
  const char* forced = std::getenv("QUINCUNX_ISA");
  if (forced == nullptr || *forced == 0) return available().front();
  for (const Choice& choice : available()) {
    if (std::string(forced) == choice.name) return choice;
  }
  const std::string reason = std::string(forced) == "amx" ? ": " + tiles_refused() : "";
  throw std::runtime_error("QUINCUNX_ISA=" + std::string(forced) + " is not available here" + reason +
                           "; available: " + available_isas());
}

// What the system says, within what processors have had; many systems without a say report nothing.
int64_t read_level2() {
  constexpr int64_t kUsual = 1 << 20, kLeast = 1 << 18, kMost = 1 << 22;
  int64_t bytes = 0;
  const char* said = std::getenv("QUINCUNX_L2");
  if (said != nullptr && *said != 0) bytes = std::atoll(said);
#ifdef _SC_LEVEL2_CACHE_SIZE
  if (bytes <= 0) bytes = sysconf(_SC_LEVEL2_CACHE_SIZE);
#endif
  return bytes <= 0 ? kUsual : std::clamp(bytes, kLeast, kMost);
}

const Choice& chosen() {
  static const Choice& choice = choose();
  return choice;
}

}  // namespace

int64_t level2_bytes() {
  static const int64_t bytes = read_level2();
  return bytes;
}

const Kernels& kernels() { return chosen().kernels; }

const char* isa() { return chosen().name; }

const char* tile_formats() { return chosen().tiles; }

std::string available_isas() {
  std::string names;
  for (const Choice& choice : available()) names += (names.empty() ? "" : ",") + std::string(choice.name);
  return names;
}

const Kernels* kernels_of(const std::string& isa) {
  for (const Choice& choice : available()) {
    if (isa == choice.name) return &choice.kernels;
  }
  return nullptr;
}

}  // namespace quincunx
