// One time step of the leaky integrate-and-fire neuron, forward and backward; float32 throughout.
#pragma once
#include "surrogate.cuh"

enum class Reset { hard, soft };

// Kernels get it by value, packed by gac/ops/cuda/launch.py in the order of these lines.
struct LIF {
    float decay;      // h_t = decay v_{t-1} + gain x_t + bias
    float gain;
    float bias;
    float threshold;  // s_t = [h_t > threshold]
    float v_reset;    // hard: v_t = v_reset where s_t = 1; soft: v_t = h_t - threshold s_t
    float surrogate_a;  // a and b of surrogate.cuh
    float surrogate_b;

    // Each operation rounds on its own (no fused multiply-add), in the order of the reference in gac/ops/lif.py:
    // so the spikes are the reference's, bit for bit. kPlain: gain is 1 and bias 0, which need no instructions then.
    template <bool kPlain>
    __device__ __forceinline__ float charge(float v, float x) const {
        const float leaked = __fmul_rn(decay, v);
        return kPlain ? __fadd_rn(leaked, x) : __fadd_rn(__fadd_rn(leaked, __fmul_rn(gain, x)), bias);
    }

    // The gradient of x_t from that of h_t.
    template <bool kPlain>
    __device__ __forceinline__ float input_gradient(float grad_h) const {
        return kPlain ? grad_h : gain * grad_h;
    }

    __device__ __forceinline__ bool fires(float h) const { return h > threshold; }

    template <Reset kReset>
    __device__ __forceinline__ float after_spike(float h) const {
        return kReset == Reset::hard ? v_reset : __fadd_rn(h, -threshold);
    }

    template <Reset kReset, bool kPlain>
    __device__ __forceinline__ float step(float v, float x, float& h) const {
        h = charge<kPlain>(v, x);
        return fires(h) ? after_spike<kReset>(h) : h;
    }

    // The gradient of h_t from grad_s, that of s_t, and grad_v, that of v_t; decay times it is that of v_{t-1}.
    // kDetached: the spike inside the reset counts as a constant.
    template <Reset kReset, bool kDetached, typename Surrogate>
    __device__ __forceinline__ float charge_gradient(float h, float grad_s, float grad_v) const {
        const float through_reset = kReset == Reset::hard ? v_reset - h : -threshold;
        const float grad_spike = kDetached ? grad_s : grad_s + grad_v * through_reset;
        const float kept = (kReset == Reset::hard && fires(h)) ? 0.0f : grad_v;
        return grad_spike * Surrogate::gradient(h - threshold, surrogate_a, surrogate_b) + kept;
    }
};
