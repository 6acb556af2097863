// A neuron's whole sequence in registers: forward through kSteps time steps, and back.
#pragma once
#include "lif.cuh"

// Calls emit(k, h) with the membrane potentials before the reset of each time step; input(k, i) is the input.
template <int kSteps, int kWidth, Reset kReset, bool kPlain, typename Input, typename Emit>
__device__ __forceinline__ void run_through_time(const LIF& lif, float v_start, Input input, Emit emit) {
    float v[kWidth];
#pragma unroll
    for (int i = 0; i < kWidth; ++i) v[i] = v_start;
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
        float h[kWidth];
#pragma unroll
        for (int i = 0; i < kWidth; ++i) v[i] = lif.step<kReset, kPlain>(v[i], input(k, i), h[i]);
        emit(k, h);
    }
}

// Calls emit(k, grad_x) with the gradient of the input of each time step, the last step first. input as above,
// grad_spike(k, i) is the gradient of the spikes.
template <
    int kSteps, int kWidth, Reset kReset, bool kPlain, bool kDetached, typename Surrogate, typename Input,
    typename Gradient, typename Emit>
__device__ __forceinline__ void run_back_through_time(
    const LIF& lif, float v_start, Input input, Gradient grad_spike, Emit emit) {
    float h[kSteps][kWidth];
    run_through_time<kSteps, kWidth, kReset, kPlain>(lif, v_start, input, [&](int k, const float(&h_k)[kWidth]) {
#pragma unroll
        for (int i = 0; i < kWidth; ++i) h[k][i] = h_k[i];
    });
    float grad_v[kWidth];
#pragma unroll
    for (int i = 0; i < kWidth; ++i) grad_v[i] = 0.0f;
#pragma unroll
    for (int k = kSteps - 1; k >= 0; --k) {
        float grad_x[kWidth];
#pragma unroll
        for (int i = 0; i < kWidth; ++i) {
            const float grad_h = lif.charge_gradient<kReset, kDetached, Surrogate>(
                h[k][i], grad_spike(k, i), grad_v[i]);
            grad_x[i] = lif.input_gradient<kPlain>(grad_h);
            grad_v[i] = lif.decay * grad_h;
        }
        emit(k, grad_x);
    }
}

// Stores 1 for the neurons that fire at membrane potential h, else 0.
template <int kWidth, typename Element>
__device__ __forceinline__ void store_spikes(
    const LIF& lif, const float (&h)[kWidth], Element* spikes, long long neuron) {
    float s[kWidth];
#pragma unroll
    for (int i = 0; i < kWidth; ++i) s[i] = lif.fires(h[i]) ? 1.0f : 0.0f;
    store_floats(spikes, neuron, s);
}
