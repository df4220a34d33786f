#include "isa.h"

#include <stdexcept>

#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace vig {
namespace {

#if defined(__x86_64__)
const char* lacks_avx2() {
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2")) return "the CPU or the operating system lacks AVX2";
  if (!__builtin_cpu_supports("fma")) return "the CPU lacks FMA";
  // F16C has no name of its own in every compiler's list; no CPU has AVX2 without it.
  return nullptr;
}

const char* lacks_avx512() {
  if (lacks_avx2() != nullptr) return lacks_avx2();
  for (bool has : {bool(__builtin_cpu_supports("avx512f")), bool(__builtin_cpu_supports("avx512bw")),
                   bool(__builtin_cpu_supports("avx512dq")), bool(__builtin_cpu_supports("avx512vl"))}) {
    if (!has) return "the CPU or the operating system lacks AVX-512 F, BW, DQ or VL";
  }
  return nullptr;
}

const char* lacks_avx512_bf16() {
  if (lacks_avx512() != nullptr) return lacks_avx512();
  return __builtin_cpu_supports("avx512bf16") ? nullptr : "the CPU lacks AVX512_BF16";
}

bool has_amx() {
  unsigned eax = 7, ebx = 0, ecx = 0, edx = 0;
  __asm__("cpuid" : "+a"(eax), "=b"(ebx), "+c"(ecx), "=d"(edx));
  return (edx & (1u << 22)) != 0 && (edx & (1u << 24)) != 0;  // AMX-BF16, AMX-TILE
}

#if defined(VIG_HAS_AMX)
// A process asks for the registers once, for all of its threads and children.
bool system_gives_tiles() {
#if defined(__linux__)
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

const char* lacks_amx_bf16() {
  if (lacks_avx512_bf16() != nullptr) return lacks_avx512_bf16();
  if (!has_amx()) return "the CPU lacks AMX_BF16";
  static const bool given = system_gives_tiles();
  return given ? nullptr : "the operating system does not give this process AMX tile registers";
}
#endif
#else
bool has_amx() { return false; }
#endif

#if defined(__aarch64__)
const char* lacks_bf16() {
#if defined(__linux__)
  const bool has = (getauxval(AT_HWCAP2) & (1ul << 14)) != 0;  // HWCAP2_BF16
#elif defined(__APPLE__)
  int has = 0;
  size_t size = sizeof has;
  if (sysctlbyname("hw.optional.arm.FEAT_BF16", &has, &size, nullptr, 0) != 0) has = 0;
#else
  const bool has = false;
#endif
  return has ? nullptr : "the CPU or the operating system lacks FEAT_BF16";
}
#endif

const char* lacks_nothing() { return nullptr; }

}  // namespace

const std::vector<Isa>& isa_table() {
  static const std::vector<Isa> table = {
#if defined(__x86_64__)
#if defined(VIG_HAS_AMX)
      {"amx_bf16", kernels_amx_bf16, lacks_amx_bf16},
#endif
      {"avx512_bf16", kernels_avx512_bf16, lacks_avx512_bf16},
      {"avx512", kernels_avx512, lacks_avx512},
      {"avx2", kernels_avx2, lacks_avx2},
#elif defined(__aarch64__)
      {"neon_bf16", kernels_neon_bf16, lacks_bf16},
      {"neon", kernels_neon, lacks_nothing},
#endif
      {"portable", kernels_portable, lacks_nothing},
  };
  return table;
}

const Kernels& select_kernels(const char* name) {
  const std::string wanted = name == nullptr ? "" : name;
  std::string known;
  for (const Isa& isa : isa_table()) {
    known += (known.empty() ? "" : ", ") + std::string(isa.name);
    if (!wanted.empty() && wanted != isa.name) continue;  // whose why_not() may ask the system for registers
    const char* reason = isa.why_not();
    if (reason == nullptr) return *isa.kernels();
    if (!wanted.empty()) {
      throw std::invalid_argument("instruction set '" + wanted + "' cannot run here: " + reason);
    }
  }
  throw std::invalid_argument("unknown instruction set '" + wanted + "': expected one of " + known);
}

std::string machine_note() {
#if defined(VIG_HAS_AMX)
  return "";
#else
  return has_amx() ? "this CPU has AMX tiles, which the compiler or assembler of this build did not know: GCC 11 with "
                     "binutils 2.36, and Clang 12, do"
                   : "";
#endif
}

}  // namespace vig
