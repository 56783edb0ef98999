// Activation functions, a vector at a time; not a number stays that.
#pragma once

#include <cmath>

#include "vectors.h"

enum Function : int64_t { FUNCTIONS };  // library.py names them

inline Vector clamp(Vector value, float low, float high) {
    value = value < low ? Vector{} + low : value;
    return value > high ? Vector{} + high : value;
}

inline HalfVector clamp(HalfVector value, float low, float high) {
    value = value < low ? HalfVector{} + low : value;
    return value > high ? HalfVector{} + high : value;
}

// What a function cuts off; for those that do more than that nothing, see `finish`.
struct Bounds {
    float low, high;
    explicit Bounds(int64_t function)
        : low(function == RELU || function == RELU6 ? 0 : -INFINITY), high(function == RELU6 ? 6 : INFINITY) {}
};

// e^x within two units in the last place, for x up to 88 in size; beyond as there.
inline Vector exponential(Vector x) {
    x = clamp(x, -87, 88);
    constexpr float ROUND = 12582912;  // 1.5 * 2^23: a number to which this is added has no fraction
    const Vector n = (x * 1.44269504f + ROUND) - ROUND, r = x - n * 0.693359375f - n * -2.12194440e-4f;
    Vector p = r * 1.9875691500e-4f + 1.3981999507e-3f;  // Cephes' expf, by S. L. Moshier
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1;
    const Integers power = (__builtin_convertvector(n, Integers) + 127) << 23;
    return p * reinterpret_cast<const Vector &>(power);
}

inline Vector sigmoid(Vector x) { return 1 / (1 + exponential(-x)); }

// The error function, within 1.5e-7 (Abramowitz and Stegun, 7.1.26).
inline Vector erf(Vector x) {
    const Vector size = x < 0 ? -x : x, t = 1 / (1 + 0.3275911f * size);
    Vector p = 1.061405429f * t - 1.453152027f;
    p = p * t + 1.421413741f;
    p = p * t - 0.284496736f;
    p = p * t + 0.254829592f;
    const Vector value = 1 - p * t * exponential(-size * size);
    return x < 0 ? -value : value;
}

inline Vector apply(int64_t function, Vector x) {
    switch (function) {
        case RELU: return positive(x);
        case RELU6: return clamp(x, 0, 6);
        case SIGMOID: return sigmoid(x);
        case SILU: return x * sigmoid(x);
        case HARDSIGMOID: return clamp(x + 3, 0, 6) / 6;
        case HARDSWISH: return x * (clamp(x + 3, 0, 6) / 6);
        case GELU: return x * 0.5f * (1 + erf(x * 0.70710678f));
    }
    return x;
}

inline bool only_cuts(int64_t function) { return function == IDENTITY || function == RELU || function == RELU6; }

// The rest of the function, where it does more than cut, on (pixels, channels) numbers; pixels are `step` apart.
__attribute__((noinline)) inline void finish(int64_t function, float *values, int64_t pixels, int64_t channels,
                                             int64_t step) {
    for (; pixels > 0; pixels--, values += step)
        for (int64_t c = 0; c < channels; c += LANES)
            store_part(values + c, apply(function, part(values + c, channels - c)), channels - c);
}
