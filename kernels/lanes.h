// Vectors of LQ_LANES int32 or float32, 16 by AVX-512 or 8 by AVX2, and what the CPU kernels do with them.
#include <immintrin.h>

#include <cstdint>
#include <cstring>

#define LQ_INLINE inline __attribute__((always_inline))

enum Type { FLOAT16, BFLOAT16, FLOAT32, INT16 };

constexpr int64_t round_up(int64_t v, int64_t to) { return (v + to - 1) / to * to; }

constexpr int LANES = LQ_LANES, PARTS = 16 / LANES;
// Bytes ahead of the one that is read: memory must be asked that early to arrive in time. Others of this size are worse.
constexpr int AHEAD = 3328;

#if LQ_LANES == 16

using Ints = __m512i;
using Floats = __m512;

LQ_INLINE Ints ints(const void* p) { return _mm512_loadu_si512(p); }
LQ_INLINE Ints ints(int v) { return _mm512_set1_epi32(v); }
LQ_INLINE Ints bytes(int v) { return _mm512_set1_epi8(static_cast<char>(v)); }
LQ_INLINE Ints four(const int8_t* p) { int v; std::memcpy(&v, p, 4); return _mm512_set1_epi32(v); }
LQ_INLINE void store(void* p, Ints v) { _mm512_storeu_si512(p, v); }
LQ_INLINE Ints add(Ints a, Ints b) { return _mm512_add_epi32(a, b); }
LQ_INLINE Ints sub(Ints a, Ints b) { return _mm512_sub_epi32(a, b); }
LQ_INLINE Ints both(Ints a, Ints b) { return _mm512_and_si512(a, b); }
LQ_INLINE Ints either(Ints a, Ints b) { return _mm512_or_si512(a, b); }
LQ_INLINE Ints differ(Ints a, Ints b) { return _mm512_xor_si512(a, b); }
LQ_INLINE Ints most(Ints a, Ints b) { return _mm512_max_epi32(a, b); }
LQ_INLINE int most_of(Ints v) { return _mm512_reduce_max_epi32(v); }
LQ_INLINE int sum_of(Ints v) { return _mm512_reduce_add_epi32(v); }
template <int BY> LQ_INLINE Ints left(Ints a) { return _mm512_slli_epi32(a, BY); }
template <int BY> LQ_INLINE Ints right(Ints a) { return _mm512_srai_epi32(a, BY); }
LQ_INLINE Ints shifted(Ints a, int by) { return _mm512_srli_epi32(a, by); }
template <int BY> LQ_INLINE Ints left16(Ints a) { return _mm512_slli_epi16(a, BY); }
template <int BY> LQ_INLINE Ints right16(Ints a) { return _mm512_srli_epi16(a, BY); }
LQ_INLINE Floats floats(const float* p) { return _mm512_loadu_ps(p); }
LQ_INLINE Floats floats(float v) { return _mm512_set1_ps(v); }
LQ_INLINE void store(float* p, Floats v) { _mm512_storeu_ps(p, v); }
LQ_INLINE Floats as_floats(Ints v) { return _mm512_castsi512_ps(v); }
LQ_INLINE Ints as_ints(Floats v) { return _mm512_castps_si512(v); }
LQ_INLINE Floats to_floats(Ints v) { return _mm512_cvtepi32_ps(v); }
LQ_INLINE Ints nearest(Floats v) { return _mm512_cvtps_epi32(v); }
LQ_INLINE Floats mul(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
LQ_INLINE Floats sub(Floats a, Floats b) { return _mm512_sub_ps(a, b); }
LQ_INLINE Floats gathered(const float* p, Ints i) { return _mm512_i32gather_ps(i, p, 4); }
// table[i], of 16 numbers.
LQ_INLINE Floats looked_up(const float* table, Ints i) { return _mm512_permutexvar_ps(i, floats(table)); }
LQ_INLINE Ints widened(const uint8_t* p) {
  return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
LQ_INLINE Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
LQ_INLINE Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
LQ_INLINE Floats less(Floats a, Floats b, Floats c) { return _mm512_fnmadd_ps(a, b, c); }
LQ_INLINE Ints wide16(const void* p) { return _mm512_cvtepi16_epi32(_mm256_loadu_si256(static_cast<const __m256i*>(p))); }
LQ_INLINE Floats halves(const void* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(static_cast<const __m256i*>(p))); }
LQ_INLINE void store_low(int8_t* p, Ints v) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(v)); }
LQ_INLINE void store_halves(void* p, Floats v) {
  _mm256_storeu_si256(static_cast<__m256i*>(p), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
// `bits`, where v is NaN a NaN's.
LQ_INLINE Ints without_nan(Floats v, Ints bits) {
  return _mm512_mask_mov_epi32(bits, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), ints(0x7fc00000));
}
LQ_INLINE void store_low16(void* p, Ints v) { _mm256_storeu_si256(static_cast<__m256i*>(p), _mm512_cvtepi32_epi16(v)); }

// Adds the products of 32 bytes, unsigned u below 2^BITS and signed x, to each lane, four by four.
template <int BITS> LQ_INLINE Ints dot(const Ints* u, const int8_t* x, Ints sum) {
#pragma GCC unroll 8
  for (int i = 0; i < 8; i++) sum = _mm512_dpbusd_epi32(sum, u[i], four(x + 4 * i));
  return sum;
}

#else

using Ints = __m256i;
using Floats = __m256;

LQ_INLINE Ints ints(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
LQ_INLINE Ints ints(int v) { return _mm256_set1_epi32(v); }
LQ_INLINE Ints bytes(int v) { return _mm256_set1_epi8(static_cast<char>(v)); }
LQ_INLINE Ints four(const int8_t* p) { int v; std::memcpy(&v, p, 4); return _mm256_set1_epi32(v); }
LQ_INLINE void store(void* p, Ints v) { _mm256_storeu_si256(static_cast<__m256i*>(p), v); }
LQ_INLINE Ints add(Ints a, Ints b) { return _mm256_add_epi32(a, b); }
LQ_INLINE Ints sub(Ints a, Ints b) { return _mm256_sub_epi32(a, b); }
LQ_INLINE Ints both(Ints a, Ints b) { return _mm256_and_si256(a, b); }
LQ_INLINE Ints either(Ints a, Ints b) { return _mm256_or_si256(a, b); }
LQ_INLINE Ints differ(Ints a, Ints b) { return _mm256_xor_si256(a, b); }
LQ_INLINE Ints most(Ints a, Ints b) { return _mm256_max_epi32(a, b); }
LQ_INLINE int most_of(Ints v) {
  __m128i four = _mm_max_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  four = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0x4e));
  return _mm_cvtsi128_si32(_mm_max_epi32(four, _mm_shuffle_epi32(four, 0xb1)));
}
LQ_INLINE int sum_of(Ints v) {
  __m128i four = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  four = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(four, _mm_shuffle_epi32(four, 0xb1)));
}
template <int BY> LQ_INLINE Ints left(Ints a) { return _mm256_slli_epi32(a, BY); }
template <int BY> LQ_INLINE Ints right(Ints a) { return _mm256_srai_epi32(a, BY); }
LQ_INLINE Ints shifted(Ints a, int by) { return _mm256_srli_epi32(a, by); }
template <int BY> LQ_INLINE Ints left16(Ints a) { return _mm256_slli_epi16(a, BY); }
template <int BY> LQ_INLINE Ints right16(Ints a) { return _mm256_srli_epi16(a, BY); }
LQ_INLINE Floats floats(const float* p) { return _mm256_loadu_ps(p); }
LQ_INLINE Floats floats(float v) { return _mm256_set1_ps(v); }
LQ_INLINE void store(float* p, Floats v) { _mm256_storeu_ps(p, v); }
LQ_INLINE Floats as_floats(Ints v) { return _mm256_castsi256_ps(v); }
LQ_INLINE Ints as_ints(Floats v) { return _mm256_castps_si256(v); }
LQ_INLINE Floats to_floats(Ints v) { return _mm256_cvtepi32_ps(v); }
LQ_INLINE Ints nearest(Floats v) { return _mm256_cvtps_epi32(v); }
LQ_INLINE Floats mul(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
LQ_INLINE Floats sub(Floats a, Floats b) { return _mm256_sub_ps(a, b); }
LQ_INLINE Floats gathered(const float* p, Ints i) { return _mm256_i32gather_ps(p, i, 4); }
LQ_INLINE Floats looked_up(const float* table, Ints i) {
  const Floats low = _mm256_permutevar8x32_ps(floats(table), i), high = _mm256_permutevar8x32_ps(floats(table + 8), i);
  return _mm256_blendv_ps(low, high, as_floats(_mm256_slli_epi32(i, 28)));
}
LQ_INLINE Ints widened(const uint8_t* p) { return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))); }
LQ_INLINE Floats add(Floats a, Floats b) { return _mm256_add_ps(a, b); }
LQ_INLINE Floats fma(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
LQ_INLINE Floats less(Floats a, Floats b, Floats c) { return _mm256_fnmadd_ps(a, b, c); }
LQ_INLINE Ints wide16(const void* p) { return _mm256_cvtepi16_epi32(_mm_loadu_si128(static_cast<const __m128i*>(p))); }
LQ_INLINE Floats halves(const void* p) { return _mm256_cvtph_ps(_mm_loadu_si128(static_cast<const __m128i*>(p))); }
LQ_INLINE void store_low(int8_t* p, Ints v) {
  __m256i lanes = _mm256_shuffle_epi8(v, _mm256_set1_epi32(0x0c080400));
  __m128i both = _mm_unpacklo_epi32(_mm256_castsi256_si128(lanes), _mm256_extracti128_si256(lanes, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), both);
}
LQ_INLINE void store_halves(void* p, Floats v) {
  _mm_storeu_si128(static_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
LQ_INLINE Ints without_nan(Floats v, Ints bits) {
  return as_ints(_mm256_blendv_ps(as_floats(bits), as_floats(ints(0x7fc00000)), _mm256_cmp_ps(v, v, _CMP_UNORD_Q)));
}
LQ_INLINE void store_low16(void* p, Ints v) {
  __m256i low = _mm256_and_si256(v, _mm256_set1_epi32(0xffff));
  __m128i packed = _mm_packus_epi32(_mm256_castsi256_si128(low), _mm256_extracti128_si256(low, 1));
  _mm_storeu_si128(static_cast<__m128i*>(p), packed);
}

#if LQ_VNNI

template <int BITS> LQ_INLINE Ints dot(const Ints* u, const int8_t* x, Ints sum) {
#pragma GCC unroll 8
  for (int i = 0; i < 8; i++) sum = _mm256_dpbusd_avx_epi32(sum, u[i], four(x + 4 * i));
  return sum;
}

#else

// As above. vpmaddubsw saturates at 16 bits: PER sums of two products of codes below 2^BITS never do.
template <int BITS> LQ_INLINE Ints dot(const Ints* u, const int8_t* x, Ints sum) {
  constexpr int PER = BITS <= 4 ? 8 : BITS <= 5 ? 4 : BITS <= 6 ? 2 : 1;
#pragma GCC unroll 8
  for (int i = 0; i < 8; i += PER) {
    Ints pairs = _mm256_setzero_si256(), tops = pairs;
#pragma GCC unroll 8
    for (int j = i; j < i + PER; j++) {
      Ints xs = four(x + 4 * j);
      if (BITS < 8) {
        pairs = _mm256_add_epi16(pairs, _mm256_maddubs_epi16(u[j], xs));
      } else {
        // 128 = 2 * 64: the top bit apart, at half its worth.
        pairs = _mm256_maddubs_epi16(both(u[j], bytes(0x7f)), xs);
        tops = _mm256_maddubs_epi16(both(right16<1>(u[j]), bytes(0x40)), xs);
      }
    }
    sum = add(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
    if (BITS == 8) sum = add(sum, _mm256_madd_epi16(tops, _mm256_set1_epi16(2)));
  }
  return sum;
}

#endif
#endif

// LANES numbers from the i-th on of an array of `type`.
LQ_INLINE Floats numbers(const void* p, int type, int64_t i) {
  const char* at = static_cast<const char*>(p) + i * (type == FLOAT32 ? 4 : 2);
  if (type == FLOAT16) return halves(at);
  if (type == FLOAT32) return floats(reinterpret_cast<const float*>(at));
  return type == INT16 ? to_floats(wide16(at)) : as_floats(left<16>(wide16(at)));
}

// 128 inputs of a row from `k0` on, zeros beyond k, as float32.
LQ_INLINE void widen(const void* x, int type, int64_t row, int64_t k, int64_t k0, float* out) {
  const int size = type == FLOAT32 ? 4 : 2;
  const char* from = static_cast<const char*>(x) + (row * k + k0) * size;
  alignas(64) char tail[512];
  if (k - k0 < 128) {
    std::memset(tail, 0, sizeof tail);
    std::memcpy(tail, from, (k - k0) * size);
    from = tail;
  }
  for (int i = 0; i < 128; i += LANES) store(out + i, numbers(from, type, i));
}

// The first `count` of LANES results, rounded to `type`, at the i-th place of an array.
LQ_INLINE void write(void* p, int type, int64_t i, Floats v, int64_t count) {
  char* at = static_cast<char*>(p) + i * (type == FLOAT32 ? 4 : 2);
  alignas(64) char whole[4 * LANES];
  char* to = count < LANES ? whole : at;
  if (type == FLOAT16) {
    store_halves(to, v);
  } else if (type == FLOAT32) {
    store(reinterpret_cast<float*>(to), v);
  } else {
    // To even. A NaN would become infinite if its low bits alone were cut.
    const Ints bits = as_ints(v), up = add(add(bits, ints(0x7fff)), both(right<16>(bits), ints(1)));
    store_low16(to, right<16>(without_nan(v, up)));
  }
  if (count < LANES) std::memcpy(at, whole, count * (type == FLOAT32 ? 4 : 2));
}
