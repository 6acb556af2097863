// The leaky integrate-and-fire neuron over T time steps, one thread for kWidth neighbouring neurons.
//
// Every tensor is a flat [T, N] (sequences) or [N] (membrane potentials) array, N = frame_size neurons.
// The sequence is walked in chunks of kSteps time steps that fit into registers. kWholeSequence: T == kSteps, one
// chunk, every loop unrolled; otherwise any T, with the last chunk partly filled.
#include "element.cuh"
#include "lif.cuh"
#include "sequence.cuh"

// The block size that gac/ops/lif.py launches with; small, because long sequences need up to 255 registers a thread.
// The 1 beside it in __launch_bounds__ keeps the compiler from spilling registers to fit one more block.
constexpr int kThreads = 128;

template <int kWidth>
__device__ __forceinline__ long long first_neuron() {
    return (static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x) * kWidth;
}

// v_init may be null (all neurons start at v_start), v_final may be null (not wanted).
template <typename Element, int kSteps, bool kWholeSequence, int kWidth, Reset kReset, bool kPlain>
__global__ void __launch_bounds__(kThreads, 1) lif_forward(
    const Element* __restrict__ x_seq, const float* __restrict__ NULLABLE v_init, float v_start,
    LIF lif,
    Element* __restrict__ spikes, float* __restrict__ NULLABLE v_final, long long frame_size, int T) {
    const long long neuron = first_neuron<kWidth>();
    if (neuron >= frame_size) return;
    const int length = kWholeSequence ? kSteps : T;

    float v[kWidth];
    load_floats(v_init, v_start, neuron, v);
    for (int start = 0; start < length; start += kSteps) {
        Vector<Element, kWidth> x[kSteps];
        load_chunk<kSteps, kWholeSequence>(x_seq, start, T, frame_size, neuron, x);
#pragma unroll
        for (int k = 0; k < kSteps; ++k) {
            if (!kWholeSequence && start + k >= T) continue;
            Vector<Element, kWidth> s;
#pragma unroll
            for (int lane = 0; lane < kWidth; ++lane) {
                float h;
                v[lane] = lif.step<kReset, kPlain>(v[lane], to_float(x[k][lane]), h);
                s[lane] = from_float<Element>(lif.fires(h) ? 1.0f : 0.0f);
            }
            store_vector(spikes + (start + k) * frame_size + neuron, s);
        }
    }
    if (v_final) store_floats(v_final, neuron, v);
}

// Membrane potentials are not stored by the forward pass but computed again, chunk by chunk from the last one.
// Where there are several chunks, a first sweep leaves the potential before each chunk but the first in
// v_boundary [chunks - 1, N]. Each gradient may be null: incoming ones are zero then, outgoing ones not wanted.
template <
    typename Element, int kSteps, bool kWholeSequence, int kWidth, Reset kReset, bool kPlain, bool kDetached,
    typename Surrogate>
__global__ void __launch_bounds__(kThreads, 1) lif_backward(
    const Element* __restrict__ NULLABLE grad_spikes, const float* __restrict__ NULLABLE grad_v_final,
    const Element* __restrict__ x_seq, const float* __restrict__ NULLABLE v_init, float v_start,
    LIF lif,
    Element* __restrict__ NULLABLE grad_x, float* __restrict__ NULLABLE grad_v_init, float* NULLABLE v_boundary,
    long long frame_size, int T) {
    const long long neuron = first_neuron<kWidth>();
    if (neuron >= frame_size) return;
    const int chunks = kWholeSequence ? 1 : (T + kSteps - 1) / kSteps;

    float v[kWidth];
    if (!kWholeSequence) {
        load_floats(v_init, v_start, neuron, v);
        for (int chunk = 0; chunk < chunks - 1; ++chunk) {
            Vector<Element, kWidth> x[kSteps];
            load_chunk<kSteps, true>(x_seq, chunk * kSteps, T, frame_size, neuron, x);
#pragma unroll
            for (int k = 0; k < kSteps; ++k)
#pragma unroll
                for (int lane = 0; lane < kWidth; ++lane) {
                    float h;
                    v[lane] = lif.step<kReset, kPlain>(v[lane], to_float(x[k][lane]), h);
                }
            store_floats(v_boundary + chunk * frame_size, neuron, v);
        }
    }

    float grad_v[kWidth];
    load_floats(grad_v_final, 0.0f, neuron, grad_v);
    for (int chunk = chunks - 1; chunk >= 0; --chunk) {
        const int start = chunk * kSteps;
        Vector<Element, kWidth> x[kSteps];
        load_chunk<kSteps, kWholeSequence>(x_seq, start, T, frame_size, neuron, x);
        Vector<Element, kWidth> grad_s[kSteps];
        if (grad_spikes) load_chunk<kSteps, kWholeSequence>(grad_spikes, start, T, frame_size, neuron, grad_s);

        // Not one load from either: it would go through the read-only path, which must not see what this kernel wrote.
        if (kWholeSequence || chunk == 0)
            load_floats(v_init, v_start, neuron, v);
        else
            load_floats(v_boundary + (chunk - 1) * frame_size, v_start, neuron, v);
        float h[kSteps][kWidth];
#pragma unroll
        for (int k = 0; k < kSteps; ++k)
#pragma unroll
            for (int lane = 0; lane < kWidth; ++lane)
                if (kWholeSequence || start + k < T)
                    v[lane] = lif.step<kReset, kPlain>(v[lane], to_float(x[k][lane]), h[k][lane]);

#pragma unroll
        for (int k = kSteps - 1; k >= 0; --k) {
            if (!kWholeSequence && start + k >= T) continue;
            Vector<Element, kWidth> grad_x_t;
#pragma unroll
            for (int lane = 0; lane < kWidth; ++lane) {
                const float grad_h = lif.charge_gradient<kReset, kDetached, Surrogate>(
                    h[k][lane], grad_spikes ? to_float(grad_s[k][lane]) : 0.0f, grad_v[lane]);
                grad_x_t[lane] = from_float<Element>(lif.input_gradient<kPlain>(grad_h));
                grad_v[lane] = lif.decay * grad_h;
            }
            if (grad_x) store_vector(grad_x + (start + k) * frame_size + neuron, grad_x_t);
        }
    }
    if (grad_v_init) store_floats(grad_v_init, neuron, grad_v);
}
