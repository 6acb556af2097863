// The last LIF layer and the average of its spikes over each image: gac/ops/lif_pool.py.
//
// x is [T, images, pixels, channels], pooled is [T, images, channels].
#include "element.cuh"
#include "lif.cuh"
#include "sequence.cuh"
#include "tile.cuh"
#include "time_steps.cuh"

// One block (of the grid's first dimension) an image.
template <typename Element, int kSteps, int kWidth, Reset kReset, bool kPlain>
__global__ void __launch_bounds__(kThreads, 1) lif_pool_forward(
    const Element* __restrict__ x, LIF lif,
    Element* __restrict__ pooled, long long images, int pixels, int channels) {
    const Tile<kWidth> tile(channels, 0, 1);
    const long long image = blockIdx.x;
    float spikes[kSteps][kWidth];
#pragma unroll
    for (int k = 0; k < kSteps; ++k)
#pragma unroll
        for (int i = 0; i < kWidth; ++i) spikes[k][i] = 0.0f;
    if (tile.active)
        for (long long row = tile.first_row(); row < pixels; row += tile.row_step()) {
            Vector<Element, kWidth> x_seq[kSteps];
            load_sequence(x, images * pixels * channels, (image * pixels + row) * channels + tile.channel, x_seq);
            run_through_time<kSteps, kWidth, kReset, kPlain>(
                lif, lif.v_reset, [&](int k, int i) { return to_float(x_seq[k][i]); },
                [&](int k, const float(&h)[kWidth]) {
#pragma unroll
                    for (int i = 0; i < kWidth; ++i) spikes[k][i] += lif.fires(h[i]) ? 1.0f : 0.0f;
                });
        }
#pragma unroll
    for (int k = 0; k < kSteps; ++k)
        sum_over_rows(tile, spikes[k], [&](int i, float count) {
            pooled[(k * images + image) * channels + tile.channel + i] = from_float<Element>(count / pixels);
        });
}

template <typename Element, int kSteps, int kWidth, Reset kReset, bool kPlain, bool kDetached, typename Surrogate>
__global__ void __launch_bounds__(kThreads, 1) lif_pool_backward(
    const Element* __restrict__ grad_pooled, const Element* __restrict__ x,
    LIF lif,
    Element* __restrict__ grad_x, long long images, int pixels, int channels) {
    const Tile<kWidth> tile(channels);
    if (!tile.active) return;
    const long long rows = images * pixels, frame_size = rows * channels;
    const float share = 1.0f / pixels;

    for (long long row = tile.first_row(); row < rows; row += tile.row_step()) {
        const long long neuron = row * channels + tile.channel;
        Vector<Element, kWidth> x_seq[kSteps], grad_seq[kSteps];
        load_sequence(x, frame_size, neuron, x_seq);
        load_sequence(grad_pooled, images * channels, row / pixels * channels + tile.channel, grad_seq);
        run_back_through_time<kSteps, kWidth, kReset, kPlain, kDetached, Surrogate>(
            lif, lif.v_reset, [&](int k, int i) { return to_float(x_seq[k][i]); },
            [&](int k, int i) { return to_float(grad_seq[k][i]) * share; },
            [&](int k, const float(&grad)[kWidth]) { store_floats(grad_x + k * frame_size, neuron, grad); });
    }
}
