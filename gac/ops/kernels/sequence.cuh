// The values of neighbouring neurons at several time steps, of a sequence that is a flat [T, frame_size] array.
#pragma once
#include "vector.cuh"

// Loads the time steps start .. start + kSteps - 1; no load waits for another.
template <int kSteps, bool kWholeSequence, int kWidth, typename Element>
__device__ __forceinline__ void load_chunk(
    const Element* sequence, int start, int T, long long frame_size, long long neuron,
    Vector<Element, kWidth> (&chunk)[kSteps]) {
#pragma unroll
    for (int k = 0; k < kSteps; ++k)
        if (kWholeSequence || start + k < T)
            chunk[k] = load_vector<kWidth>(sequence + (start + k) * frame_size + neuron);
}

// The same for a sequence of exactly kSteps time steps.
template <int kSteps, int kWidth, typename Element>
__device__ __forceinline__ void load_sequence(
    const Element* sequence, long long frame_size, long long neuron, Vector<Element, kWidth> (&chunk)[kSteps]) {
    load_chunk<kSteps, true>(sequence, 0, kSteps, frame_size, neuron, chunk);
}

// A null address stands for a tensor full of `otherwise`.
template <int kWidth>
__device__ __forceinline__ void load_floats(
    const float* address, float otherwise, long long neuron, float (&values)[kWidth]) {
    Vector<float, kWidth> loaded;
    if (address) loaded = load_vector<kWidth>(address + neuron);
#pragma unroll
    for (int lane = 0; lane < kWidth; ++lane) values[lane] = address ? loaded[lane] : otherwise;
}

template <int kWidth, typename Element>
__device__ __forceinline__ void store_floats(Element* address, long long neuron, const float (&values)[kWidth]) {
    Vector<Element, kWidth> packed;
#pragma unroll
    for (int lane = 0; lane < kWidth; ++lane) packed[lane] = from_float<Element>(values[lane]);
    store_vector(address + neuron, packed);
}
