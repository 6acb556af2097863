// Tensor elements: float, and the two 16-bit formats as raw bits. All arithmetic is in float32.
#pragma once
#include "device.cuh"

// After the type of a kernel's pointer: Python may pass None. It reads this off the source (gac/ops/cuda/compiler.py).
#define NULLABLE

struct Float16 {
    unsigned short bits;
};

struct BFloat16 {
    unsigned short bits;
};

__device__ __forceinline__ float to_float(float value) { return value; }

__device__ __forceinline__ float to_float(Float16 value) { return float_from_half_bits(value.bits); }

__device__ __forceinline__ float to_float(BFloat16 value) {
    return __uint_as_float(static_cast<unsigned int>(value.bits) << 16);
}

template <typename Element>
__device__ Element from_float(float value);

template <>
__device__ __forceinline__ float from_float<float>(float value) {
    return value;
}

template <>
__device__ __forceinline__ Float16 from_float<Float16>(float value) {
    return Float16{half_bits_from_float(value)};
}

template <>
__device__ __forceinline__ BFloat16 from_float<BFloat16>(float value) {
#ifdef CONVERTS_TO_BFLOAT16
    return BFloat16{bfloat16_bits_from_float(value)};
#else
    const unsigned int bits = __float_as_uint(value);
    // Rounding would carry a NaN whose low bits are all ones into infinity or zero.
    if (value != value) return BFloat16{static_cast<unsigned short>((bits >> 16) | 0x40u)};
    // To nearest, ties to even: just under half, plus one where the kept part is odd.
    const unsigned int rounding = 0x7fffu + ((bits >> 16) & 1u);
    return BFloat16{static_cast<unsigned short>((bits + rounding) >> 16)};
#endif
}
