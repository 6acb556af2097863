// What residual_lif.cu and residual_lif_pool.cu share: the sum at a residual block's end, and the sums of its gradient.
//
// All sequences are [T, rows, channels], a row being the channels of one pixel of one image. kNormShortcut: the
// shortcut is a convolution's output that has a BatchNorm of its own; otherwise it is added as it is.
#pragma once
#include "element.cuh"
#include "normalization.cuh"
#include "tile.cuh"

// The membrane BatchNorm(y) + shortcut, rounded to what is stored.
template <bool kNormShortcut, typename Element, int kWidth>
__device__ __forceinline__ Vector<Element, kWidth> residual_sum(
    const Normalization<kWidth>& norm, const Normalization<kWidth>& shortcut_norm, const Vector<Element, kWidth>& y,
    const Vector<Element, kWidth>& shortcut) {
    Vector<Element, kWidth> membrane;
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
        const float added = to_float(shortcut[i]);
        membrane[i] = from_float<Element>(__fadd_rn(
            norm.apply(i, to_float(y[i])), kNormShortcut ? shortcut_norm.apply(i, added) : added));
    }
    return membrane;
}

// Sums of the membrane's gradient over all rows and time steps, of its products with (y - mean) and, with
// kNormShortcut, with (shortcut - its mean); first each thread's, then of the block.
template <int kWidth, bool kNormShortcut>
struct GradientSums {
    float sum[kWidth], with_y[kWidth], with_shortcut[kWidth];

    __device__ __forceinline__ GradientSums() {
#pragma unroll
        for (int i = 0; i < kWidth; ++i) sum[i] = with_y[i] = with_shortcut[i] = 0.0f;
    }

    // y and shortcut less their means.
    __device__ __forceinline__ void add(int i, float grad, float y, float shortcut) {
        sum[i] += grad;
        with_y[i] += grad * y;
        if (kNormShortcut) with_shortcut[i] += grad * shortcut;
    }

    // Leaves the block's sums in partials [gridDim.x, 2 or 3, channels]. All threads of the block must call it.
    __device__ __forceinline__ void write(const Tile<kWidth>& tile, float* partials, int channels) const {
        float* block = partials + static_cast<long long>(blockIdx.x) * (kNormShortcut ? 3 : 2) * channels;
        sum_over_rows(tile, sum, [&](int i, float total) { block[tile.channel + i] = total; });
        sum_over_rows(tile, with_y, [&](int i, float total) { block[channels + tile.channel + i] = total; });
        if (kNormShortcut)
            sum_over_rows(
                tile, with_shortcut, [&](int i, float total) { block[2 * channels + tile.channel + i] = total; });
    }
};
