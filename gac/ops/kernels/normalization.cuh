// BatchNorm of one value: z = (y - mean) * scale + bias, scale = inverse_std * weight; float32 throughout.
#pragma once
#include "sequence.cuh"

// The tensors of gac/ops/batch_norm.py's BatchNormTransform, [channels] each; kernels get it by value.
struct Norm {
    const float* weight;
    const float* bias;
    const float* mean;
    const float* inverse_std;
};

template <int kWidth>
struct Normalization {
    float mean[kWidth];
    float scale[kWidth];
    float bias[kWidth];

    // A null address counts as zeros.
    __device__ __forceinline__ Normalization(const Norm& of, int channel) {
        float weight[kWidth], inverse_std[kWidth];
        load_floats(of.weight, 0.0f, channel, weight);
        load_floats(of.bias, 0.0f, channel, bias);
        load_floats(of.mean, 0.0f, channel, mean);
        load_floats(of.inverse_std, 0.0f, channel, inverse_std);
#pragma unroll
        for (int i = 0; i < kWidth; ++i) scale[i] = __fmul_rn(inverse_std[i], weight[i]);
    }

    __device__ __forceinline__ float centred(int i, float y) const { return __fadd_rn(y, -mean[i]); }

    // Each operation rounds on its own, in the order of the reference in gac/ops/batch_norm.py: the passes of the
    // backward see the spikes of the forward, and both see the reference's.
    __device__ __forceinline__ float apply(int i, float y) const {
        return __fadd_rn(__fmul_rn(centred(i, y), scale[i]), bias[i]);
    }
};

// The gradient of y from `grad`, that of z, and the two sums over all values of the channel:
// scale * (grad - sum(grad) / n - (y - mean) inverse_std * sum(grad (y - mean) inverse_std) / n).
template <int kWidth>
struct NormalizationGradient {
    float mean[kWidth];
    float scale[kWidth];
    float constant[kWidth];
    float slope[kWidth];

    // inverse_count is 0 where the statistics do not depend on y.
    __device__ __forceinline__ NormalizationGradient(
        const float* weight_of, const float* mean_of, const float* inverse_std_of, const float* sums,
        const float* sums_of_products, float inverse_count, int channel) {
        float weight[kWidth], inverse_std[kWidth], sum[kWidth], sum_of_products[kWidth];
        load_floats(weight_of, 0.0f, channel, weight);
        load_floats(mean_of, 0.0f, channel, mean);
        load_floats(inverse_std_of, 0.0f, channel, inverse_std);
        load_floats(sums, 0.0f, channel, sum);
        load_floats(sums_of_products, 0.0f, channel, sum_of_products);
#pragma unroll
        for (int i = 0; i < kWidth; ++i) {
            scale[i] = inverse_std[i] * weight[i];
            constant[i] = sum[i] * inverse_count;
            slope[i] = inverse_std[i] * sum_of_products[i] * inverse_count;
        }
    }

    __device__ __forceinline__ float apply(int i, float y, float grad) const {
        return scale[i] * (grad - constant[i] - (y - mean[i]) * slope[i]);
    }
};
