// Runs the kernels for AMX on a processor without it: each tile instruction is undefined there, and a handler of the
// signal does on the emulated tiles what the instruction says. So the compiled code itself is tested, with its registers.
#pragma once

#if defined(__x86_64__) && defined(__linux__)
#define QX_TRAPS
#include <signal.h>
#include <ucontext.h>

#include <cstdint>
#include <cstring>

#include "tiles_emulated.h"

namespace trap_tiles {

using namespace quincunx;

inline struct sigaction previous;

// The registers in the order of their numbers in an instruction.
constexpr int kRegisters[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                                REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};

struct Instruction {
  int opcode = 0, prefix = 0, reg = 0, rm = 0, vvvv = 0, length = 0;
  bool in_memory = false;
  int64_t address = 0, base = 0, stride = 0;

  // Returns whether it is a three-byte VEX instruction of the map 0F 38, as all tile instructions are.
  bool read(const uint8_t* code, const greg_t* registers) {
    if (code[0] != 0xc4 || (code[1] & 0x1f) != 2) return false;
    const int x = code[1] & 0x40 ? 0 : 8, b = code[1] & 0x20 ? 0 : 8;
    vvvv = ~(code[2] >> 3) & 15;
    prefix = code[2] & 3;
    opcode = code[3];
    const int mod = code[4] >> 6, low = code[4] & 7;
    reg = code[4] >> 3 & 7;
    rm = low;
    length = 5;
    in_memory = mod != 3;
    if (!in_memory) return true;
    bool relative = mod == 0 && low == 5, absolute = false;
    if (low == 4) {
      const int sib = code[length++], index = (sib >> 3 & 7) | x, from = (sib & 7) | b;
      if (index != 4) stride = registers[kRegisters[index]] << (sib >> 6);
      absolute = mod == 0 && (sib & 7) == 5;
      if (!absolute) base = registers[kRegisters[from]];
    } else if (!relative) {
      base = registers[kRegisters[low | b]];
    }
    int32_t displacement = 0;
    if (mod == 1) displacement = static_cast<int8_t>(code[length++]);
    if (mod == 2 || relative || absolute) {
      std::memcpy(&displacement, code + length, 4);
      length += 4;
    }
    if (relative) base = registers[REG_RIP] + length;
    base += displacement;
    address = base + stride;  // of an operand that is no tile
    return true;
  }
};

inline void handle(int, siginfo_t*, void* context) {
  greg_t* registers = static_cast<ucontext_t*>(context)->uc_mcontext.gregs;
  Instruction i;
  EmulatedTiles& tiles = EmulatedTiles::own();
  const Area everything{nullptr, reinterpret_cast<const char*>(INTPTR_MAX)};
  enum { kNone, k66, kF3, kF2 };
  bool known = i.read(reinterpret_cast<const uint8_t*>(registers[REG_RIP]), registers);
  if (known && i.opcode == 0x49 && i.prefix == kNone && i.in_memory) {
    TileConfig config;
    std::memcpy(static_cast<void*>(&config), reinterpret_cast<const void*>(i.address), sizeof config);
    tiles.configure(config);
  } else if (known && i.opcode == 0x49 && i.prefix == kNone) {
    tiles.release();
  } else if (known && i.opcode == 0x49 && i.prefix == kF2 && !i.in_memory) {
    tiles.zero(i.reg);
  } else if (known && i.opcode == 0x4b && i.prefix == kF2 && i.in_memory) {
    tiles.load(i.reg, reinterpret_cast<const char*>(i.base), i.stride, everything);
  } else if (known && i.opcode == 0x4b && i.prefix == kF3 && i.in_memory) {
    tiles.store(i.reg, reinterpret_cast<char*>(i.base), i.stride);
  } else if (known && i.opcode == 0x5c && i.prefix == kF3 && !i.in_memory) {
    tiles.dot(i.reg, i.rm, i.vvvv);
  } else if (known && i.opcode == 0x5e && i.prefix == k66 && !i.in_memory) {
    tiles.dot_bytes(i.reg, i.rm, i.vvvv);
  } else {
    known = false;
  }
  if (known) registers[REG_RIP] += i.length;
  else sigaction(SIGILL, &previous, nullptr);  // the instruction runs again and ends the process
}

struct Trap {
  Trap() {
    struct sigaction action {};
    action.sa_sigaction = &handle;
    action.sa_flags = SA_SIGINFO;
    sigaction(SIGILL, &action, &previous);
  }
  ~Trap() { sigaction(SIGILL, &previous, nullptr); }
};

}  // namespace trap_tiles
#endif
