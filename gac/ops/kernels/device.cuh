// What only a GPU has: the PTX instructions that CUDA C++ reaches through headers we do not want.
// The conversions live in cuda_fp16.h, which NVRTC often cannot find on a user's machine.
// Tests replace this file by one for the CPU (tests/cuda_on_cpu/device.cuh); all other files stay as they are.
#pragma once

__device__ __forceinline__ float float_from_half_bits(unsigned short bits) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
}

__device__ __forceinline__ unsigned short half_bits_from_float(float value) {
    unsigned short bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}
