// Vectors of numbers, as wide as the processor has them; C++17 with GCC's vector types.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
constexpr int LANES = 16, VECTORS = 4, ACCUMULATORS = 28;
#elif defined(__AVX2__)
constexpr int LANES = 8, VECTORS = 2, ACCUMULATORS = 12;
#else
constexpr int LANES = 4, VECTORS = 4, ACCUMULATORS = 24;
#endif
constexpr int HALF = LANES / 2;  // panels are a multiple of this wide: the last vector may be half of one

typedef float Vector __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t Integers __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef float HalfVector __attribute__((vector_size(4 * HALF), aligned(4), may_alias));

// No templates: they would lose the types' alignment.
inline Vector load(const float *from) { return *reinterpret_cast<const Vector *>(from); }
inline HalfVector load_half(const float *from) { return *reinterpret_cast<const HalfVector *>(from); }
inline void store(float *to, Vector value) { *reinterpret_cast<Vector *>(to) = value; }
inline void store(float *to, HalfVector value) { *reinterpret_cast<HalfVector *>(to) = value; }
inline Vector positive(Vector value) { return value < 0 ? Vector{} : value; }  // NaN stays

// While it lives, numbers below 1.2e-38 in size are zeros to its thread: the processor is very slow with them.
class NoDenormals {
#if defined(__SSE2__)
    const unsigned before = _mm_getcsr();

  public:
    NoDenormals() { _mm_setcsr(before | 0x8040); }
    ~NoDenormals() { _mm_setcsr(before); }
#endif
};

// Up to LANES numbers, zeros behind the last.
inline Vector part(const float *from, int64_t count) {
    if (count >= LANES) return load(from);
#if defined(__AVX512F__)
    return (Vector)_mm512_maskz_loadu_ps((1u << count) - 1, from);
#else
    Vector value = {};
    std::memcpy(&value, from, count * sizeof(float));
    return value;
#endif
}

inline void store_part(float *to, Vector value, int64_t count) {
    if (count >= LANES) return store(to, value);
#if defined(__AVX512F__)
    _mm512_mask_storeu_ps(to, (1u << count) - 1, (__m512)value);
#else
    std::memcpy(to, &value, count * sizeof(float));
#endif
}

// Lanes `mask` of `value`, together in the lowest lanes; zeros in the others.
inline Vector compress(Vector value, uint32_t mask) {
#if defined(__AVX512F__)
    return (Vector)_mm512_maskz_compress_ps(mask, (__m512)value);
#else
    Vector result = {};
    for (int lane = 0; mask; mask &= mask - 1) result[lane++] = value[__builtin_ctz(mask)];
    return result;
#endif
}

// The lowest lanes of `value`, apart in lanes `mask`; zeros in the others.
inline Vector expand(Vector value, uint32_t mask) {
#if defined(__AVX512F__)
    return (Vector)_mm512_maskz_expand_ps(mask, (__m512)value);
#else
    Vector result = {};
    for (int lane = 0; mask; mask &= mask - 1) result[__builtin_ctz(mask)] = value[lane++];
    return result;
#endif
}
