// What only a GPU has: PTX instructions that CUDA C++ reaches through headers we do not want, or not at all.
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

// Since sm_80 GPUs have an instruction for it; element.cuh has it for the others.
#if __CUDA_ARCH__ >= 800
#define CONVERTS_TO_BFLOAT16
__device__ __forceinline__ unsigned short bfloat16_bits_from_float(float value) {
    unsigned short bits;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}
#endif

// The larger one, or NaN where one of them is; fmaxf would hide a NaN.
__device__ __forceinline__ float maximum(float a, float b) {
#if __CUDA_ARCH__ >= 800
    float value;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(value) : "f"(a), "f"(b));
    return value;
#else
    return a < b || b != b ? b : a;
#endif
}

// 2^x and 1/x within 2^-22 and 1 unit in the last place, and 0 instead of what is subnormal: an instruction each, while
// __expf and __fdividef scale their argument and their result for subnormal ones.
__device__ __forceinline__ float approximate_exp2(float x) {
    float value;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(value) : "f"(x));
    return value;
}

__device__ __forceinline__ float approximate_reciprocal(float x) {
    float value;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(value) : "f"(x));
    return value;
}

// One access of 4 kWords bytes. Before sm_100 the compiler splits an assignment into stores of single elements where it
// cannot prove the address's alignment. The address must be a multiple of 4 kWords.
template <int kWords>
__device__ __forceinline__ void store_words(void* address, const unsigned int (&words)[kWords]) {
    static_assert(kWords == 1 || kWords == 2 || kWords == 4, "at most 16 bytes");
    const auto to = __cvta_generic_to_global(address);
    if constexpr (kWords == 1)
        asm volatile("st.global.b32 [%0], %1;" : : "l"(to), "r"(words[0]) : "memory");
    else if constexpr (kWords == 2)
        asm volatile("st.global.v2.b32 [%0], {%1, %2};" : : "l"(to), "r"(words[0]), "r"(words[1]) : "memory");
    else
        asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};"
                     : : "l"(to), "r"(words[0]), "r"(words[1]), "r"(words[2]), "r"(words[3]) : "memory");
}
