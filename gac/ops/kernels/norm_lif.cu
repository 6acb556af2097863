// BatchNorm, then the leaky integrate-and-fire neuron over kSteps time steps: gac/ops/norm_lif.py.
//
// y and spikes are [T, rows, channels], a row being the channels of one pixel of one image.
#include "element.cuh"
#include "lif.cuh"
#include "normalization.cuh"
#include "tile.cuh"
#include "time_steps.cuh"

template <typename Element, int kSteps, int kWidth, Reset kReset, bool kPlain>
__global__ void __launch_bounds__(kThreads, 1) norm_lif_forward(
    const Element* __restrict__ y, Norm norm_of, LIF lif,
    Element* __restrict__ spikes, long long rows, int channels) {
    const Tile<kWidth> tile(channels);
    if (!tile.active) return;
    const Normalization<kWidth> norm(norm_of, tile.channel);
    const long long frame_size = rows * channels;

    for (long long row = tile.first_row(); row < rows; row += tile.row_step()) {
        const long long neuron = row * channels + tile.channel;
        Vector<Element, kWidth> y_seq[kSteps];
        load_sequence(y, frame_size, neuron, y_seq);
        run_through_time<kSteps, kWidth, kReset, kPlain>(
            lif, lif.v_reset, [&](int k, int i) { return norm.apply(i, to_float(y_seq[k][i])); },
            [&](int k, const float(&h)[kWidth]) { store_spikes(lif, h, spikes + k * frame_size, neuron); });
    }
}

// What both passes of the backward do in a row: emit(k, y, grad) gets the input and the gradient of the normalised
// input of each time step.
template <
    int kSteps, int kWidth, Reset kReset, bool kPlain, bool kDetached, typename Surrogate, typename Element,
    typename Emit>
__device__ __forceinline__ void norm_lif_row(
    const Element* grad_spikes, const Element* y, const Normalization<kWidth>& norm, const LIF& lif,
    long long frame_size, long long neuron, Emit emit) {
    Vector<Element, kWidth> y_seq[kSteps], grad_seq[kSteps];
    load_sequence(y, frame_size, neuron, y_seq);
    load_sequence(grad_spikes, frame_size, neuron, grad_seq);
    run_back_through_time<kSteps, kWidth, kReset, kPlain, kDetached, Surrogate>(
        lif, lif.v_reset,
        [&](int k, int i) { return norm.apply(i, to_float(y_seq[k][i])); },
        [&](int k, int i) { return to_float(grad_seq[k][i]); },
        [&](int k, const float(&grad)[kWidth]) { emit(k, y_seq[k], grad); });
}

// Pass 1: partials [gridDim.x, 2, channels] of the sums over all rows and time steps of the gradient of the
// normalised input, and of that times (y - mean).
template <typename Element, int kSteps, int kWidth, Reset kReset, bool kPlain, bool kDetached, typename Surrogate>
__global__ void __launch_bounds__(kThreads, 1) norm_lif_backward_sums(
    const Element* __restrict__ grad_spikes, const Element* __restrict__ y,
    Norm norm_of, LIF lif,
    float* __restrict__ partials, long long rows, int channels) {
    const Tile<kWidth> tile(channels);
    float sum[kWidth], sum_of_products[kWidth];
#pragma unroll
    for (int i = 0; i < kWidth; ++i) sum[i] = sum_of_products[i] = 0.0f;
    if (tile.active) {
        const Normalization<kWidth> norm(norm_of, tile.channel);
        for (long long row = tile.first_row(); row < rows; row += tile.row_step())
            norm_lif_row<kSteps, kWidth, kReset, kPlain, kDetached, Surrogate>(
                grad_spikes, y, norm, lif, rows * channels, row * channels + tile.channel,
                [&](int, const Vector<Element, kWidth>& y_k, const float(&grad)[kWidth]) {
#pragma unroll
                    for (int i = 0; i < kWidth; ++i) {
                        sum[i] += grad[i];
                        sum_of_products[i] += grad[i] * norm.centred(i, to_float(y_k[i]));
                    }
                });
    }
    float* block = partials + static_cast<long long>(blockIdx.x) * 2 * channels;
    sum_over_rows(tile, sum, [&](int i, float total) { block[tile.channel + i] = total; });
    sum_over_rows(tile, sum_of_products, [&](int i, float total) { block[channels + tile.channel + i] = total; });
}

// Pass 2: the gradient of y. sums [2, channels]: of the gradient, and of the gradient times the normalised y before
// weight and bias; inverse_count is one over the number of values that they were taken over, or 0 where mean and
// inverse_std do not depend on y.
template <typename Element, int kSteps, int kWidth, Reset kReset, bool kPlain, bool kDetached, typename Surrogate>
__global__ void __launch_bounds__(kThreads, 1) norm_lif_backward_input(
    const Element* __restrict__ grad_spikes, const Element* __restrict__ y,
    Norm norm_of, LIF lif,
    const float* __restrict__ sums, float inverse_count,
    Element* __restrict__ grad_y, long long rows, int channels) {
    const Tile<kWidth> tile(channels);
    if (!tile.active) return;
    const Normalization<kWidth> norm(norm_of, tile.channel);
    const NormalizationGradient<kWidth> norm_gradient(
        norm_of.weight, norm_of.mean, norm_of.inverse_std, sums, sums + channels, inverse_count, tile.channel);
    const long long frame_size = rows * channels;

    // Begins with the rows that pass 1 ended with, as some of them are still in the L2 cache.
    for (long long done = tile.first_row(); done < rows; done += tile.row_step()) {
        const long long neuron = (rows - 1 - done) * channels + tile.channel;
        norm_lif_row<kSteps, kWidth, kReset, kPlain, kDetached, Surrogate>(
            grad_spikes, y, norm, lif, frame_size, neuron,
            [&](int k, const Vector<Element, kWidth>& y_k, const float(&grad)[kWidth]) {
                float grad_y_k[kWidth];
#pragma unroll
                for (int i = 0; i < kWidth; ++i) grad_y_k[i] = norm_gradient.apply(i, to_float(y_k[i]), grad[i]);
                store_floats(grad_y + k * frame_size, neuron, grad_y_k);
            });
    }
}
