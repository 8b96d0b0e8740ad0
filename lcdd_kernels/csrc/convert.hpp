// bf16 and fp16 bits to fp32 and back, one number at a time: round to nearest even, subnormals kept, NaN made quiet.
// In an unnamed namespace for the reason that simd.hpp gives.
#pragma once
#include <cstdint>
#include <cstring>

namespace {

inline uint32_t bits_of(float x) { uint32_t u; std::memcpy(&u, &x, 4); return u; }
inline float float_of(uint32_t u) { float x; std::memcpy(&x, &u, 4); return x; }

inline float float_of_bf16(uint16_t h) { return float_of(uint32_t(h) << 16); }
inline uint16_t bf16_of(float x) {
  const uint32_t u = bits_of(x);
  return x != x ? uint16_t(0x7fc0) : uint16_t((u + 0x7fff + (u >> 16 & 1)) >> 16);
}
inline float float_of_f16(uint16_t h) {
  const uint32_t sign = uint32_t(h & 0x8000) << 16, magnitude = h & 0x7fff;
  if (magnitude >= 0x7c00) return float_of(sign | 0x7f800000 | magnitude << 13 | (magnitude > 0x7c00 ? 0x400000 : 0));
  if (magnitude >= 0x0400) return float_of(sign | ((magnitude << 13) + (112u << 23)));
  return float_of(sign | bits_of(float(magnitude) * 5.9604644775390625e-8f));  // subnormal: a multiple of 2^-24
}
inline uint16_t f16_of(float x) {
  const uint32_t u = bits_of(x), magnitude = u & 0x7fffffff;
  const uint16_t sign = uint16_t(u >> 16 & 0x8000);
  if (magnitude > 0x7f800000) return uint16_t(sign | 0x7e00 | (magnitude >> 13 & 0x3ff));
  if (magnitude >= 0x477ff000) return uint16_t(sign | 0x7c00);  // rounds to infinity
  if (magnitude >= 0x38800000) return uint16_t(sign | ((magnitude - (112u << 23) + 0xfff + (magnitude >> 13 & 1)) >> 13));
  // Subnormal: adding 0.5 puts the units of 2^-24 in the low bits of the sum, rounded to nearest even by the addition.
  return uint16_t(sign | (bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f)));
}

}  // namespace
