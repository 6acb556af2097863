// Surrogate gradients ds/dh at u = h - threshold. The host computes the two constants a and b from SpikingJelly's
// alpha in double precision (gac/ops/neuron.py), as SpikingJelly's own expressions do.
#pragma once
#include "device.cuh"

// max(0, a - b |u|), a = alpha, b = alpha^2
struct PiecewiseQuadratic {
    static __device__ __forceinline__ float gradient(float u, float a, float b) {
        return maximum(0.0f, a - b * fabsf(u));
    }
};

// a where |u| < b, a = alpha, b = 1 / (2 alpha)
struct Rect {
    static __device__ __forceinline__ float gradient(float u, float a, float b) {
        return fabsf(u) < b ? a : 0.0f;
    }
};

// a sigmoid(a u) (1 - sigmoid(a u)), a = alpha
struct Sigmoid {
    static __device__ __forceinline__ float gradient(float u, float a, float) {
        const float y = 1.0f / (1.0f + expf(-a * u));
        return a * y * (1.0f - y);
    }
};

// a / (1 + (b u)^2), a = alpha / 2, b = pi alpha / 2
struct ATan {
    static __device__ __forceinline__ float gradient(float u, float a, float b) {
        const float y = b * u;
        return a / (1.0f + y * y);
    }
};
