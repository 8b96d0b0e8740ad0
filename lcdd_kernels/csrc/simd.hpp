// Sixteen fp32 lanes, whatever the instruction set; included by one translation unit per instruction set.
//
// Everything is in an unnamed namespace: an inline function with external linkage that was compiled for AVX-512 could
// be the copy that the linker keeps for the scalar path too. Lanes, order and rounding are the same in all three
// versions (no fused multiply-add: built with -ffp-contract=off), so that they give the same bits.
#pragma once
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#define LCDD_SIMD 2
#include <immintrin.h>
#elif defined(__AVX2__) && defined(__F16C__)
#define LCDD_SIMD 1
#include <immintrin.h>
#else
#define LCDD_SIMD 0
#include <cmath>

#include "convert.hpp"
#endif

namespace {

constexpr int64_t LANES = 16;

struct BF16 { using storage = uint16_t; };
struct F16 { using storage = uint16_t; };
struct F32 { using storage = float; };

#if LCDD_SIMD == 2

struct Vec { __m512 v; };
inline Vec splat(float x) { return {_mm512_set1_ps(x)}; }
inline Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Vec operator/(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
inline Vec square_root(Vec a) { return {_mm512_sqrt_ps(a.v)}; }
// zero where p is zero, else other
inline Vec where_zero(Vec p, Vec zero, Vec other) {
  return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(p.v, _mm512_setzero_ps(), _CMP_EQ_OQ), other.v, zero.v)};
}
inline Vec load(F32, const void* p) { return {_mm512_loadu_ps(p)}; }
inline Vec load(BF16, const void* p) {
  const __m256i raw = _mm256_loadu_si256(static_cast<const __m256i*>(p));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16))};
}
inline Vec load(F16, const void* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(static_cast<const __m256i*>(p)))};
}
inline void store(F32, void* p, Vec a) { _mm512_storeu_ps(p, a.v); }
// Rounds to nearest even by integer arithmetic: vcvtneps2bf16 flushes subnormals, which PyTorch keeps. The sixteen bits
// are the upper half of each lane.
inline __m512i bf16_in_upper_half(Vec a) {
  const __m512i u = _mm512_castps_si512(a.v);
  const __mmask16 odd = _mm512_test_epi32_mask(u, _mm512_set1_epi32(0x10000));
  const __m512i biased = _mm512_add_epi32(u, _mm512_set1_epi32(0x7fff));
  const __m512i rounded = _mm512_mask_add_epi32(biased, odd, biased, _mm512_set1_epi32(1));
  const __mmask16 nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
  return _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc00000));
}
inline void store(BF16, void* p, Vec a) {
  const __m512i upper = _mm512_set_epi32(0, 0, 0, 0, 0, 0, 0, 0, 0x1f001d, 0x1b0019, 0x170015, 0x130011, 0xf000d,
                                         0xb0009, 0x70005, 0x30001);
  const __m512i packed = _mm512_permutexvar_epi16(upper, bf16_in_upper_half(a));
  _mm256_storeu_si256(static_cast<__m256i*>(p), _mm512_castsi512_si256(packed));
}
inline Vec as_stored(BF16, Vec a) {
  return {_mm512_castsi512_ps(_mm512_and_si512(bf16_in_upper_half(a), _mm512_set1_epi32(int(0xffff0000))))};
}
inline void store(F16, void* p, Vec a) {
  _mm256_storeu_si256(static_cast<__m256i*>(p), _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

#elif LCDD_SIMD == 1

struct Vec { __m256 lo, hi; };
inline Vec splat(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)}; }
inline Vec operator-(Vec a, Vec b) { return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)}; }
inline Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)}; }
inline Vec operator/(Vec a, Vec b) { return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)}; }
inline Vec square_root(Vec a) { return {_mm256_sqrt_ps(a.lo), _mm256_sqrt_ps(a.hi)}; }
inline Vec where_zero(Vec p, Vec zero, Vec other) {
  const __m256 null = _mm256_setzero_ps();
  return {_mm256_blendv_ps(other.lo, zero.lo, _mm256_cmp_ps(p.lo, null, _CMP_EQ_OQ)),
          _mm256_blendv_ps(other.hi, zero.hi, _mm256_cmp_ps(p.hi, null, _CMP_EQ_OQ))};
}
inline Vec load(F32, const void* p) {
  const float* f = static_cast<const float*>(p);
  return {_mm256_loadu_ps(f), _mm256_loadu_ps(f + 8)};
}
inline Vec load(BF16, const void* p) {
  const __m128i* raw = static_cast<const __m128i*>(p);
  const __m256i lo = _mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(raw)), 16);
  const __m256i hi = _mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(raw + 1)), 16);
  return {_mm256_castsi256_ps(lo), _mm256_castsi256_ps(hi)};
}
inline Vec load(F16, const void* p) {
  const __m128i* raw = static_cast<const __m128i*>(p);
  return {_mm256_cvtph_ps(_mm_loadu_si128(raw)), _mm256_cvtph_ps(_mm_loadu_si128(raw + 1))};
}
inline void store(F32, void* p, Vec a) {
  float* f = static_cast<float*>(p);
  _mm256_storeu_ps(f, a.lo);
  _mm256_storeu_ps(f + 8, a.hi);
}
inline __m256i bf16_bits(__m256 a) {
  const __m256i u = _mm256_castps_si256(a);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q));
  return _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc0), nan);
}
inline void store(BF16, void* p, Vec a) {
  const __m256i packed = _mm256_packus_epi32(bf16_bits(a.lo), bf16_bits(a.hi));
  _mm256_storeu_si256(static_cast<__m256i*>(p), _mm256_permute4x64_epi64(packed, 0xd8));
}
inline void store(F16, void* p, Vec a) {
  __m128i* out = static_cast<__m128i*>(p);
  _mm_storeu_si128(out, _mm256_cvtps_ph(a.lo, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  _mm_storeu_si128(out + 1, _mm256_cvtps_ph(a.hi, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

#else

struct Vec { float x[LANES]; };
template <class F> inline Vec lanes(F f) {
  Vec out;
  for (int64_t i = 0; i < LANES; ++i) out.x[i] = f(i);
  return out;
}
inline uint16_t half_at(const void* p, int64_t i) {
  uint16_t h;
  std::memcpy(&h, static_cast<const char*>(p) + 2 * i, 2);
  return h;
}
inline void put_half(void* p, int64_t i, uint16_t h) { std::memcpy(static_cast<char*>(p) + 2 * i, &h, 2); }

inline Vec splat(float v) { return lanes([=](int64_t) { return v; }); }
inline Vec operator+(Vec a, Vec b) { return lanes([&](int64_t i) { return a.x[i] + b.x[i]; }); }
inline Vec operator-(Vec a, Vec b) { return lanes([&](int64_t i) { return a.x[i] - b.x[i]; }); }
inline Vec operator*(Vec a, Vec b) { return lanes([&](int64_t i) { return a.x[i] * b.x[i]; }); }
inline Vec operator/(Vec a, Vec b) { return lanes([&](int64_t i) { return a.x[i] / b.x[i]; }); }
inline Vec square_root(Vec a) { return lanes([&](int64_t i) { return sqrtf(a.x[i]); }); }
inline Vec where_zero(Vec p, Vec zero, Vec other) {
  return lanes([&](int64_t i) { return p.x[i] == 0.0f ? zero.x[i] : other.x[i]; });
}
inline Vec load(F32, const void* p) { Vec out; std::memcpy(out.x, p, sizeof out.x); return out; }
inline Vec load(BF16, const void* p) { return lanes([&](int64_t i) { return float_of_bf16(half_at(p, i)); }); }
inline Vec load(F16, const void* p) { return lanes([&](int64_t i) { return float_of_f16(half_at(p, i)); }); }
inline void store(F32, void* p, Vec a) { std::memcpy(p, a.x, sizeof a.x); }
inline void store(BF16, void* p, Vec a) { for (int64_t i = 0; i < LANES; ++i) put_half(p, i, bf16_of(a.x[i])); }
inline void store(F16, void* p, Vec a) { for (int64_t i = 0; i < LANES; ++i) put_half(p, i, f16_of(a.x[i])); }

#endif

// What comes back when `a` is stored.
inline Vec as_stored(F32, Vec a) { return a; }
inline Vec as_stored(F16, Vec a) {
  uint16_t buffer[LANES];
  store(F16{}, buffer, a);
  return load(F16{}, buffer);
}
#if LCDD_SIMD != 2
inline Vec as_stored(BF16, Vec a) {
  uint16_t buffer[LANES];
  store(BF16{}, buffer, a);
  return load(BF16{}, buffer);
}
#endif

// Sum of the lanes, in double and in lane order.
inline double total(Vec a) {
  float x[LANES];
  store(F32{}, x, a);
  double sum = 0;
  for (int64_t i = 0; i < LANES; ++i) sum += double(x[i]);
  return sum;
}

}  // namespace
