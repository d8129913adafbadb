// What the compilation leaves open about the processor.
#pragma once

namespace attn_ext::cpu::CPU_CAPABILITY {

#if defined(__AVX512BF16__) && !defined(__AMX_BF16__)

inline bool is_amd() {
  return __builtin_cpu_is("amd");
}

// Or later: with datapaths as wide as AVX-512's vectors. A Zen 4's are half of that, so that beside its multiply-adds all else,
// which takes as long on both, weighs half as much.
inline bool is_zen_5() {
  return is_amd() && !__builtin_cpu_is("amdfam19h");
}

#else

constexpr bool is_amd() {
  return false;
}

constexpr bool is_zen_5() {
  return false;
}

#endif

}  // namespace attn_ext::cpu::CPU_CAPABILITY
