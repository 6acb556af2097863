// The CPU's version of gac/ops/kernels/device.cuh.
#pragma once

inline float float_from_half_bits(unsigned short bits) {
    _Float16 half;
    memcpy(&half, &bits, sizeof half);
    return static_cast<float>(half);
}

inline unsigned short half_bits_from_float(float value) {
    const _Float16 half = static_cast<_Float16>(value);  // to nearest, ties to even
    unsigned short bits;
    memcpy(&bits, &half, sizeof bits);
    return bits;
}

inline float maximum(float a, float b) { return a < b || b != b ? b : a; }

inline float approximate_exp2(float x) { return exp2f(x); }

inline float approximate_reciprocal(float x) { return 1.0f / x; }

template <int kWords>
inline void store_words(void* address, const unsigned int (&words)[kWords]) {
    // By assignment, so that the sanitizer sees a wrong alignment.
    struct alignas(4 * kWords) Access {
        unsigned int words[kWords];
    };
    Access access;
    memcpy(&access, words, sizeof access);
    *static_cast<Access*>(address) = access;
}
