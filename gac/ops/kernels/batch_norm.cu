// Statistics of BatchNorm, and the second stage of all reductions over rows: gac/ops/batch_norm.py.
//
// Reductions have two stages, each of which adds in a fixed order (no atomics): results repeat bit for bit.
#include "element.cuh"
#include "normalization.cuh"
#include "tile.cuh"

// Of one tensor only, unlike in the other kernels.
constexpr int kMomentRowsInFlight = 8;

// Partials [gridDim.x, 3, channels]: number of rows, mean, and sum of squared deviations from it, of the rows of each
// block. y is [rows, channels]. Values are taken relative to the block's first row, so that a mean that is large
// against the deviations does not cancel them.
template <typename Element, int kWidth>
__global__ void __launch_bounds__(kThreads, 1) batch_moments_partials(
    const Element* __restrict__ y, float* __restrict__ partials, long long rows, int channels) {
    const Tile<kWidth> tile(channels);
    float origin[kWidth], count[kWidth], sum[kWidth], sum_of_squares[kWidth];
    float rows_seen = 0.0f;
#pragma unroll
    for (int i = 0; i < kWidth; ++i) origin[i] = sum[i] = sum_of_squares[i] = 0.0f;
    if (tile.active) {
        const long long first_of_block = static_cast<long long>(blockIdx.x) * tile.rows_per_block;
        const auto first = load_vector<kWidth>(y + first_of_block * channels + tile.channel);
#pragma unroll
        for (int i = 0; i < kWidth; ++i) origin[i] = to_float(first[i]);
        for_rows<kMomentRowsInFlight>(
            tile, rows, [&](long long row) { return load_vector<kWidth>(y + row * channels + tile.channel); },
            [&](long long, const Vector<Element, kWidth>& value) {
                rows_seen += 1.0f;
#pragma unroll
                for (int i = 0; i < kWidth; ++i) {
                    const float deviation = to_float(value[i]) - origin[i];
                    sum[i] += deviation;
                    sum_of_squares[i] += deviation * deviation;
                }
            });
    }
#pragma unroll
    for (int i = 0; i < kWidth; ++i) count[i] = rows_seen;
    // The first row of threads ends up with the totals.
    float counts[kWidth], sums[kWidth];
    sum_over_rows(tile, count, [&](int i, float total) { counts[i] = total; });
    sum_over_rows(tile, sum, [&](int i, float total) { sums[i] = total; });
    float* block = partials + static_cast<long long>(blockIdx.x) * 3 * channels;
    sum_over_rows(tile, sum_of_squares, [&](int i, float total) {
        const float mean = sums[i] / counts[i];
        block[tile.channel + i] = counts[i];
        block[channels + tile.channel + i] = origin[i] + mean;
        block[2 * channels + tile.channel + i] = total - sums[i] * mean;
    });
}

// The block of the second stages: kLanes channels side by side, kSlices threads that share a channel's partials.
constexpr int kLanes = 8;
constexpr int kSlices = 128;

// Adds up the kSlices values of each channel, always in the same order.
__device__ __forceinline__ double sum_over_slices(double value) {
    __shared__ double shared[kSlices * kLanes];
    __syncthreads();
    shared[threadIdx.x] = value;
    for (int half = kSlices / 2; half > 0; half /= 2) {
        __syncthreads();
        if (threadIdx.x < half * kLanes) shared[threadIdx.x] += shared[threadIdx.x + half * kLanes];
    }
    __syncthreads();
    return shared[threadIdx.x % kLanes];
}

struct Moments {
    double mean;
    double variance;
    double unbiased_variance;
};

// The moments over all rows from the blocks' partials, of the channel of each of the block's first kLanes threads. All
// threads must call it.
__device__ __forceinline__ Moments moments_of(const float* partials, int blocks, int channel, int channels) {
    double count = 0.0, sum = 0.0, sum_of_squares = 0.0;
    if (channel < channels)
#pragma unroll 4
        for (int block = threadIdx.x / kLanes; block < blocks; block += kSlices) {
            const float* partial = partials + static_cast<long long>(block) * 3 * channels + channel;
            const double n = partial[0], mean = partial[channels], squared_deviations = partial[2 * channels];
            count += n;
            sum += n * mean;
            sum_of_squares += squared_deviations + n * mean * mean;
        }
    count = sum_over_slices(count);
    sum = sum_over_slices(sum);
    sum_of_squares = sum_over_slices(sum_of_squares);
    const double mean = sum / count;
    double squared_deviations = sum_of_squares - count * mean * mean;
    // Rounding; not fmax, which would turn a NaN into 0 and hide it.
    if (squared_deviations < 0.0) squared_deviations = 0.0;
    return {mean, squared_deviations / count, squared_deviations / (count - 1.0)};
}

// moments [3, channels]: mean, variance and unbiased variance.
__global__ void __launch_bounds__(kLanes * kSlices, 1) batch_moments_total(
    const float* __restrict__ partials, float* __restrict__ moments, int blocks, int channels) {
    const int channel = blockIdx.x * kLanes + threadIdx.x % kLanes;
    const Moments of_channel = moments_of(partials, blocks, channel, channels);
    if (threadIdx.x >= kLanes || channel >= channels) return;
    moments[channel] = static_cast<float>(of_channel.mean);
    moments[channels + channel] = static_cast<float>(of_channel.variance);
    moments[2 * channels + channel] = static_cast<float>(of_channel.unbiased_variance);
}

// mean and inverse_std [channels]; moves the running statistics and counts the batch, where these are not null.
__global__ void __launch_bounds__(kLanes * kSlices, 1) batch_statistics_total(
    const float* __restrict__ partials, float* __restrict__ mean, float* __restrict__ inverse_std,
    float* __restrict__ NULLABLE running_mean, float* __restrict__ NULLABLE running_var,
    long long* __restrict__ NULLABLE batches, float eps, float momentum, int blocks, int channels) {
    const int channel = blockIdx.x * kLanes + threadIdx.x % kLanes;
    const Moments of_channel = moments_of(partials, blocks, channel, channels);
    if (batches && blockIdx.x == 0 && threadIdx.x == 0) *batches += 1;
    if (threadIdx.x >= kLanes || channel >= channels) return;
    const float new_mean = static_cast<float>(of_channel.mean);
    const float unbiased_variance = static_cast<float>(of_channel.unbiased_variance);
    mean[channel] = new_mean;
    inverse_std[channel] = 1.0f / sqrtf(static_cast<float>(of_channel.variance) + eps);
    if (running_mean) running_mean[channel] += momentum * (new_mean - running_mean[channel]);
    if (running_var) running_var[channel] += momentum * (unbiased_variance - running_var[channel]);
}

// totals [quantities, channels] of partials [blocks, quantities, channels], quantity being blockIdx.y. The second and
// the third are multiplied by the channel's factor.
__global__ void __launch_bounds__(kLanes * kSlices, 1) total_of_partials(
    const float* __restrict__ partials, const float* __restrict__ NULLABLE second_factor,
    const float* __restrict__ NULLABLE third_factor, float* __restrict__ totals, int blocks, int channels) {
    const int channel = blockIdx.x * kLanes + threadIdx.x % kLanes;
    const int quantity = blockIdx.y, quantities = gridDim.y;
    double sum = 0.0;
    if (channel < channels)
#pragma unroll 4
        for (int block = threadIdx.x / kLanes; block < blocks; block += kSlices)
            sum += partials[(static_cast<long long>(block) * quantities + quantity) * channels + channel];
    sum = sum_over_slices(sum);
    if (threadIdx.x < kLanes && channel < channels) {
        const float* factors = quantity == 1 ? second_factor : quantity == 2 ? third_factor : nullptr;
        const double factor = factors ? factors[channel] : 1.0;
        totals[quantity * channels + channel] = static_cast<float>(sum * factor);
    }
}
