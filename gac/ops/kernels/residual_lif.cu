// A residual block's end: membrane = BatchNorm(y) + shortcut, rounded to what is stored, and the spikes of the LIF
// layer that reads it: gac/ops/residual_lif.py. Sequences and kNormShortcut as in residual.cuh.
#include "element.cuh"
#include "lif.cuh"
#include "normalization.cuh"
#include "residual.cuh"
#include "tile.cuh"
#include "time_steps.cuh"

// kSpikes: with a LIF layer; otherwise only the membrane, and `spikes` is not touched.
template <typename Element, int kSteps, int kWidth, Reset kReset, bool kPlain, bool kNormShortcut, bool kSpikes>
__global__ void __launch_bounds__(kThreads, 1) residual_lif_forward(
    const Element* __restrict__ y, Norm norm_of,
    const Element* __restrict__ shortcut, Norm NULLABLE shortcut_norm_of, LIF lif,
    Element* __restrict__ membrane, Element* __restrict__ NULLABLE spikes, long long rows, int channels) {
    const Tile<kWidth> tile(channels);
    if (!tile.active) return;
    const Normalization<kWidth> norm(norm_of, tile.channel);
    const Normalization<kWidth> shortcut_norm(shortcut_norm_of, tile.channel);
    const long long frame_size = rows * channels;

    for (long long row = tile.first_row(); row < rows; row += tile.row_step()) {
        const long long neuron = row * channels + tile.channel;
        Vector<Element, kWidth> y_seq[kSteps], shortcut_seq[kSteps];
        load_sequence(y, frame_size, neuron, y_seq);
        load_sequence(shortcut, frame_size, neuron, shortcut_seq);
#pragma unroll
        for (int k = 0; k < kSteps; ++k) {
            y_seq[k] = residual_sum<kNormShortcut>(norm, shortcut_norm, y_seq[k], shortcut_seq[k]);
            store_vector(membrane + k * frame_size + neuron, y_seq[k]);
        }
        if (kSpikes)
            run_through_time<kSteps, kWidth, kReset, kPlain>(
                lif, lif.v_reset, [&](int k, int i) { return to_float(y_seq[k][i]); },
                [&](int k, const float(&h)[kWidth]) { store_spikes(lif, h, spikes + k * frame_size, neuron); });
    }
}

// Pass 1: `grad`, the whole gradient of the membrane: what comes from it directly (grad_membrane) and, with kSpikes,
// through the spikes (grad_spikes; otherwise it and the membrane are not read). Partials as in GradientSums.
template <
    typename Element, int kSteps, int kWidth, Reset kReset, bool kPlain, bool kDetached, typename Surrogate,
    bool kNormShortcut, bool kSpikes>
__global__ void __launch_bounds__(kThreads, 1) residual_lif_backward_sums(
    const Element* __restrict__ grad_membrane, const Element* __restrict__ NULLABLE grad_spikes,
    const Element* __restrict__ membrane, const Element* __restrict__ y, const float* __restrict__ mean_of,
    const Element* __restrict__ NULLABLE shortcut, const float* __restrict__ NULLABLE shortcut_mean_of,
    LIF lif,
    Element* __restrict__ grad, float* __restrict__ partials, long long rows, int channels) {
    const Tile<kWidth> tile(channels);
    const long long frame_size = rows * channels;
    GradientSums<kWidth, kNormShortcut> sums;
    if (tile.active) {
        float mean[kWidth], shortcut_mean[kWidth];
        load_floats(mean_of, 0.0f, tile.channel, mean);
        load_floats(shortcut_mean_of, 0.0f, tile.channel, shortcut_mean);
        for (long long row = tile.first_row(); row < rows; row += tile.row_step()) {
            const long long neuron = row * channels + tile.channel;
            Vector<Element, kWidth> y_seq[kSteps], shortcut_seq[kSteps], direct_seq[kSteps];
            load_sequence(y, frame_size, neuron, y_seq);
            if (kNormShortcut) load_sequence(shortcut, frame_size, neuron, shortcut_seq);
            load_sequence(grad_membrane, frame_size, neuron, direct_seq);
            const auto take = [&](int k, const float(&through_spikes)[kWidth]) {
                float grad_k[kWidth];
#pragma unroll
                for (int i = 0; i < kWidth; ++i) {
                    grad_k[i] = through_spikes[i] + to_float(direct_seq[k][i]);
                    const float shortcut_k = kNormShortcut ? to_float(shortcut_seq[k][i]) - shortcut_mean[i] : 0.0f;
                    sums.add(i, grad_k[i], to_float(y_seq[k][i]) - mean[i], shortcut_k);
                }
                store_floats(grad + k * frame_size, neuron, grad_k);
            };
            if (kSpikes) {
                Vector<Element, kWidth> membrane_seq[kSteps], grad_seq[kSteps];
                load_sequence(membrane, frame_size, neuron, membrane_seq);
                load_sequence(grad_spikes, frame_size, neuron, grad_seq);
                run_back_through_time<kSteps, kWidth, kReset, kPlain, kDetached, Surrogate>(
                    lif, lif.v_reset,
                    [&](int k, int i) { return to_float(membrane_seq[k][i]); },
                    [&](int k, int i) { return to_float(grad_seq[k][i]); }, take);
            } else {
                const float nothing[kWidth] = {};
#pragma unroll
                for (int k = 0; k < kSteps; ++k) take(k, nothing);
            }
        }
    }
    sums.write(tile, partials, channels);
}

// Pass 2: the gradient of y and, with kNormShortcut, that of the shortcut (otherwise it is `grad` itself). sums
// [2 or 3, channels] and inverse_count as in norm_lif_backward_input, and like that it begins with the last rows.
template <typename Element, int kSteps, int kWidth, bool kNormShortcut>
__global__ void __launch_bounds__(kThreads, 1) residual_lif_backward_inputs(
    const Element* __restrict__ grad, const Element* __restrict__ y, const float* __restrict__ weight_of,
    const float* __restrict__ mean_of, const float* __restrict__ inverse_std_of,
    const Element* __restrict__ NULLABLE shortcut, const float* __restrict__ NULLABLE shortcut_weight_of,
    const float* __restrict__ NULLABLE shortcut_mean_of, const float* __restrict__ NULLABLE shortcut_inverse_std_of,
    const float* __restrict__ sums, float inverse_count,
    Element* __restrict__ grad_y, Element* __restrict__ NULLABLE grad_shortcut, long long rows, int channels) {
    const Tile<kWidth> tile(channels);
    if (!tile.active) return;
    const NormalizationGradient<kWidth> norm(
        weight_of, mean_of, inverse_std_of, sums, sums + channels, inverse_count, tile.channel);
    const NormalizationGradient<kWidth> shortcut_norm(
        shortcut_weight_of, shortcut_mean_of, shortcut_inverse_std_of, sums, kNormShortcut ? sums + 2 * channels : sums,
        inverse_count, tile.channel);
    const long long frame_size = rows * channels;

    for (long long done = tile.first_row(); done < rows; done += tile.row_step()) {
        const long long neuron = (rows - 1 - done) * channels + tile.channel;
        Vector<Element, kWidth> grad_seq[kSteps], y_seq[kSteps], shortcut_seq[kSteps];
        load_sequence(grad, frame_size, neuron, grad_seq);
        load_sequence(y, frame_size, neuron, y_seq);
        if (kNormShortcut) load_sequence(shortcut, frame_size, neuron, shortcut_seq);
#pragma unroll
        for (int k = 0; k < kSteps; ++k) {
            float grad_y_k[kWidth], grad_shortcut_k[kWidth];
#pragma unroll
            for (int i = 0; i < kWidth; ++i) {
                const float g = to_float(grad_seq[k][i]);
                grad_y_k[i] = norm.apply(i, to_float(y_seq[k][i]), g);
                if (kNormShortcut) grad_shortcut_k[i] = shortcut_norm.apply(i, to_float(shortcut_seq[k][i]), g);
            }
            store_floats(grad_y + k * frame_size, neuron, grad_y_k);
            if (kNormShortcut) store_floats(grad_shortcut + k * frame_size, neuron, grad_shortcut_k);
        }
    }
}
