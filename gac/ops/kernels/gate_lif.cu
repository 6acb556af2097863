// The gate of gated attention coding with the LIF layers on both of its sides, from one frame: gac/ops/gate_lif.py.
//
// x and spatial are [images, image_size], the same at every time step; temporal is [T, images]; membrane and spikes
// are [T, images, image_size]. The encoder's LIF layer turns x into spikes s_t, the gate weights them to
// membrane_t = sigmoid(temporal_t * spatial) * s_t, rounded to what is stored, and the first block's LIF layer, with
// the same constants, turns those into `spikes`.
#include "element.cuh"
#include "lif.cuh"
#include "sequence.cuh"
#include "time_steps.cuh"

// The block size that gac/ops/gate_lif.py launches with. Each image has blocks_per_image blocks.
constexpr int kThreads = 128;

// What is stored in half precision is rounded by more than the approximations' error; an exact division and
// exponential would take longer than moving the data does.
template <typename Element>
__device__ __forceinline__ float sigmoid(float score) {
    constexpr float kLog2OfE = 1.44269504f;
    return approximate_reciprocal(1.0f + approximate_exp2(-kLog2OfE * score));
}

template <>
__device__ __forceinline__ float sigmoid<float>(float score) {
    return 1.0f / (1.0f + expf(-score));
}

// Walks the elements of one image, a thread kWidth neighbouring ones at a time.
template <int kWidth>
struct Image {
    long long image;
    long long first;
    long long step;

    __device__ __forceinline__ explicit Image(int blocks_per_image) {
        image = blockIdx.x / blocks_per_image;
        first = (static_cast<long long>(blockIdx.x % blocks_per_image) * kThreads + threadIdx.x) * kWidth;
        step = static_cast<long long>(blocks_per_image) * kThreads * kWidth;
    }
};

template <typename Element, int kSteps, int kWidth, Reset kReset, bool kPlain>
__global__ void __launch_bounds__(kThreads, 1) gate_lif_forward(
    const Element* __restrict__ x, const float* __restrict__ temporal, const Element* __restrict__ spatial,
    LIF lif,
    Element* __restrict__ membrane, Element* __restrict__ spikes,
    long long images, long long image_size, int blocks_per_image) {
    const Image<kWidth> at(blocks_per_image);
    float a[kSteps];
#pragma unroll
    for (int k = 0; k < kSteps; ++k) a[k] = temporal[k * images + at.image];

    for (long long offset = at.first; offset < image_size; offset += at.step) {
        const long long neuron = at.image * image_size + offset;
        const auto x_here = load_vector<kWidth>(x + neuron);
        const auto spatial_here = load_vector<kWidth>(spatial + neuron);
        Vector<Element, kWidth> gated[kSteps];
        run_through_time<kSteps, kWidth, kReset, kPlain>(
            lif, lif.v_reset, [&](int, int i) { return to_float(x_here[i]); },
            [&](int k, const float(&h)[kWidth]) {
#pragma unroll
                for (int i = 0; i < kWidth; ++i)
                    gated[k][i] =
                        from_float<Element>(lif.fires(h[i]) ? sigmoid<Element>(a[k] * to_float(spatial_here[i])) : 0.0f);
                store_vector(membrane + k * images * image_size + neuron, gated[k]);
            });
        run_through_time<kSteps, kWidth, kReset, kPlain>(
            lif, lif.v_reset, [&](int k, int i) { return to_float(gated[k][i]); },
            [&](int k, const float(&h)[kWidth]) {
                store_spikes(lif, h, spikes + k * images * image_size, neuron);
            });
    }
}

// The sum over the block, always in the same order, for the first thread. All threads must call it.
__device__ __forceinline__ float sum_over_block(float value) {
    __shared__ float of_warp[kThreads / 32];
    for (int distance = 16; distance > 0; distance /= 2) value += __shfl_xor_sync(0xffffffffu, value, distance);
    __syncthreads();
    if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = value;
    __syncthreads();
    float sum = 0.0f;
    if (threadIdx.x == 0)
        for (int warp = 0; warp < kThreads / 32; ++warp) sum += of_warp[warp];
    return sum;
}

// grad_temporal_partials: [blocks_per_image, T, images].
template <typename Element, int kSteps, int kWidth, Reset kReset, bool kPlain, bool kDetached, typename Surrogate>
__global__ void __launch_bounds__(kThreads, 1) gate_lif_backward(
    const Element* __restrict__ grad_membrane, const Element* __restrict__ grad_spikes,
    const Element* __restrict__ x, const float* __restrict__ temporal, const Element* __restrict__ spatial,
    LIF lif,
    Element* __restrict__ grad_x, float* __restrict__ grad_temporal_partials, Element* __restrict__ grad_spatial,
    long long images, long long image_size, int blocks_per_image) {
    const Image<kWidth> at(blocks_per_image);
    float a[kSteps], grad_a[kSteps];
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
        a[k] = temporal[k * images + at.image];
        grad_a[k] = 0.0f;
    }

    for (long long offset = at.first; offset < image_size; offset += at.step) {
        const long long neuron = at.image * image_size + offset;
        const auto x_here = load_vector<kWidth>(x + neuron);
        const auto spatial_here = load_vector<kWidth>(spatial + neuron);
        Vector<Element, kWidth> direct_seq[kSteps], grad_seq[kSteps];
        load_sequence(grad_membrane, images * image_size, neuron, direct_seq);
        load_sequence(grad_spikes, images * image_size, neuron, grad_seq);

        float h[kSteps][kWidth];  // the encoder's membrane potentials
        run_through_time<kSteps, kWidth, kReset, kPlain>(
            lif, lif.v_reset, [&](int, int i) { return to_float(x_here[i]); },
            [&](int k, const float(&h_k)[kWidth]) {
#pragma unroll
                for (int i = 0; i < kWidth; ++i) h[k][i] = h_k[i];
            });
        float grad_v[kWidth], grad_x_here[kWidth], grad_spatial_here[kWidth];
#pragma unroll
        for (int i = 0; i < kWidth; ++i) grad_v[i] = grad_x_here[i] = grad_spatial_here[i] = 0.0f;
        run_back_through_time<kSteps, kWidth, kReset, kPlain, kDetached, Surrogate>(
            lif, lif.v_reset,
            [&](int k, int i) {
                const float gate = sigmoid<Element>(a[k] * to_float(spatial_here[i]));
                return to_float(from_float<Element>(lif.fires(h[k][i]) ? gate : 0.0f));
            },
            [&](int k, int i) { return to_float(grad_seq[k][i]); },
            [&](int k, const float(&through_spikes)[kWidth]) {
#pragma unroll
                for (int i = 0; i < kWidth; ++i) {
                    const float grad = through_spikes[i] + to_float(direct_seq[k][i]);
                    const float score_factor = to_float(spatial_here[i]);
                    const float gate = sigmoid<Element>(a[k] * score_factor);
                    const float grad_score = lif.fires(h[k][i]) ? grad * gate * (1.0f - gate) : 0.0f;
                    grad_spatial_here[i] += a[k] * grad_score;
                    grad_a[k] += score_factor * grad_score;
                    const float grad_h = lif.charge_gradient<kReset, kDetached, Surrogate>(
                        h[k][i], grad * gate, grad_v[i]);
                    grad_x_here[i] += lif.input_gradient<kPlain>(grad_h);
                    grad_v[i] = lif.decay * grad_h;
                }
            });
        store_floats(grad_x, neuron, grad_x_here);
        store_floats(grad_spatial, neuron, grad_spatial_here);
    }
    float* block = grad_temporal_partials + blockIdx.x % blocks_per_image * kSteps * images;
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
        const float sum = sum_over_block(grad_a[k]);
        if (threadIdx.x == 0) block[k * images + at.image] = sum;
    }
}
