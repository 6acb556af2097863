// The last residual sum, the LIF layer that reads it and the average of its spikes over each image:
// gac/ops/residual_lif_pool.py. The sum is in registers only: the backward pass computes it again.
//
// y and shortcut are [T, images, pixels, channels], pooled is [T, images, channels]. kNormShortcut as in residual.cuh.
#include "element.cuh"
#include "lif.cuh"
#include "normalization.cuh"
#include "residual.cuh"
#include "tile.cuh"
#include "time_steps.cuh"

// One block (of the grid's first dimension) an image.
template <typename Element, int kSteps, int kWidth, Reset kReset, bool kPlain, bool kNormShortcut>
__global__ void __launch_bounds__(kThreads, 1) residual_lif_pool_forward(
    const Element* __restrict__ y, Norm norm_of,
    const Element* __restrict__ shortcut, Norm NULLABLE shortcut_norm_of, LIF lif,
    Element* __restrict__ pooled, long long images, int pixels, int channels) {
    const Tile<kWidth> tile(channels, 0, 1);
    const long long image = blockIdx.x;
    float spikes[kSteps][kWidth];
#pragma unroll
    for (int k = 0; k < kSteps; ++k)
#pragma unroll
        for (int i = 0; i < kWidth; ++i) spikes[k][i] = 0.0f;
    if (tile.active) {
        const Normalization<kWidth> norm(norm_of, tile.channel);
        const Normalization<kWidth> shortcut_norm(shortcut_norm_of, tile.channel);
        const long long frame_size = images * pixels * channels;
        for (long long row = tile.first_row(); row < pixels; row += tile.row_step()) {
            const long long neuron = (image * pixels + row) * channels + tile.channel;
            Vector<Element, kWidth> y_seq[kSteps], shortcut_seq[kSteps];
            load_sequence(y, frame_size, neuron, y_seq);
            load_sequence(shortcut, frame_size, neuron, shortcut_seq);
#pragma unroll
            for (int k = 0; k < kSteps; ++k)
                y_seq[k] = residual_sum<kNormShortcut>(norm, shortcut_norm, y_seq[k], shortcut_seq[k]);
            run_through_time<kSteps, kWidth, kReset, kPlain>(
                lif, lif.v_reset, [&](int k, int i) { return to_float(y_seq[k][i]); },
                [&](int k, const float(&h)[kWidth]) {
#pragma unroll
                    for (int i = 0; i < kWidth; ++i) spikes[k][i] += lif.fires(h[i]) ? 1.0f : 0.0f;
                });
        }
    }
#pragma unroll
    for (int k = 0; k < kSteps; ++k)
        sum_over_rows(tile, spikes[k], [&](int i, float count) {
            pooled[(k * images + image) * channels + tile.channel + i] = from_float<Element>(count / pixels);
        });
}

// Pass 1: `grad`, the gradient of the membrane, and partials as in GradientSums. Pass 2 is that of residual_lif.cu.
template <
    typename Element, int kSteps, int kWidth, Reset kReset, bool kPlain, bool kDetached, typename Surrogate,
    bool kNormShortcut>
__global__ void __launch_bounds__(kThreads, 1) residual_lif_pool_backward_sums(
    const Element* __restrict__ grad_pooled, const Element* __restrict__ y, Norm norm_of,
    const Element* __restrict__ shortcut, Norm NULLABLE shortcut_norm_of, LIF lif,
    Element* __restrict__ grad, float* __restrict__ partials, long long images, int pixels, int channels) {
    const Tile<kWidth> tile(channels);
    const long long rows = images * pixels, frame_size = rows * channels;
    const float share = 1.0f / pixels;
    GradientSums<kWidth, kNormShortcut> sums;
    if (tile.active) {
        const Normalization<kWidth> norm(norm_of, tile.channel);
        const Normalization<kWidth> shortcut_norm(shortcut_norm_of, tile.channel);
        for (long long row = tile.first_row(); row < rows; row += tile.row_step()) {
            const long long neuron = row * channels + tile.channel;
            Vector<Element, kWidth> y_seq[kSteps], shortcut_seq[kSteps], membrane_seq[kSteps], grad_seq[kSteps];
            load_sequence(y, frame_size, neuron, y_seq);
            load_sequence(shortcut, frame_size, neuron, shortcut_seq);
            load_sequence(grad_pooled, images * channels, row / pixels * channels + tile.channel, grad_seq);
#pragma unroll
            for (int k = 0; k < kSteps; ++k)
                membrane_seq[k] = residual_sum<kNormShortcut>(norm, shortcut_norm, y_seq[k], shortcut_seq[k]);
            run_back_through_time<kSteps, kWidth, kReset, kPlain, kDetached, Surrogate>(
                lif, lif.v_reset, [&](int k, int i) { return to_float(membrane_seq[k][i]); },
                [&](int k, int i) { return to_float(grad_seq[k][i]) * share; },
                [&](int k, const float(&grad_k)[kWidth]) {
#pragma unroll
                    for (int i = 0; i < kWidth; ++i)
                        sums.add(
                            i, grad_k[i], norm.centred(i, to_float(y_seq[k][i])),
                            shortcut_norm.centred(i, to_float(shortcut_seq[k][i])));
                    store_floats(grad + k * frame_size, neuron, grad_k);
                });
        }
    }
    sums.write(tile, partials, channels);
}
