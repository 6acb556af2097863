// Which part of a channels_last activation a thread works on. An activation is a matrix: one row for each pixel of
// each image, one column for each channel. A thread takes kWidth neighbouring channels, the same in all of its rows,
// so that it loads what belongs to a channel once; a block takes `rows_per_block` rows at a time.
#pragma once

// The block size that gac/ops/channels.py launches with.
constexpr int kThreads = 128;

template <int kWidth>
struct Tile {
    int lanes;           // threads side by side in a row
    int rows_per_block;  // rows that a block covers at a time
    int row_in_block;
    int lane;
    int channel;         // first of the thread's channels
    bool active;         // threads that do not fill a row are idle

    // The rows are shared by the blocks of the grid's first dimension, or by `blocks` ones of which this is `block`.
    __device__ __forceinline__ explicit Tile(
        int channels, long long block = blockIdx.x, long long blocks = gridDim.x)
        : block_(block), blocks_(blocks) {
        const int vectors = channels / kWidth;
        lanes = vectors < kThreads ? vectors : kThreads;
        rows_per_block = kThreads / lanes;
        row_in_block = threadIdx.x / lanes;
        lane = threadIdx.x % lanes;
        channel = (blockIdx.y * lanes + lane) * kWidth;
        active = row_in_block < rows_per_block && channel < channels;
    }

    // The thread's rows are first_row(), first_row() + row_step(), ...
    __device__ __forceinline__ long long first_row() const {
        return block_ * rows_per_block + row_in_block;
    }

    __device__ __forceinline__ long long row_step() const {
        return blocks_ * rows_per_block;
    }

private:
    long long block_, blocks_;
};

// Calls use(row, load(row)) for each of the thread's rows, in their order. The loads of kBatch rows are issued before the
// first is used: one row's few bytes in flight would leave most of the memory's bandwidth unused.
template <int kBatch, int kWidth, typename Load, typename Use>
__device__ __forceinline__ void for_rows(const Tile<kWidth>& tile, long long rows, Load load, Use use) {
    const long long step = tile.row_step();
    for (long long first = tile.first_row(); first < rows; first += kBatch * step) {
        decltype(load(first)) loaded[kBatch];
#pragma unroll
        for (int j = 0; j < kBatch; ++j)
            if (first + j * step < rows) loaded[j] = load(first + j * step);
#pragma unroll
        for (int j = 0; j < kBatch; ++j)
            if (first + j * step < rows) use(first + j * step, loaded[j]);
    }
}

// Adds up kWidth values of each thread over the rows of the block, always in the same order, and calls
// write(i, sum) for the channels channel + i of each lane in its first row. All threads of the block must call it.
template <int kWidth, typename Write>
__device__ __forceinline__ void sum_over_rows(const Tile<kWidth>& tile, const float (&values)[kWidth], Write write) {
    // Neighbouring threads, which differ in row or lane, are neighbours in each part: no two meet in a bank.
    __shared__ float shared[kWidth * kThreads];
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kWidth; ++i) shared[i * kThreads + threadIdx.x] = tile.active ? values[i] : 0.0f;
    __syncthreads();
    if (tile.active && tile.row_in_block == 0)
#pragma unroll
        for (int i = 0; i < kWidth; ++i) {
            float sum = 0.0f;
            // Called once for each time step: unrolled further it only makes the compiler slow.
#pragma unroll 2
            for (int row = 0; row < tile.rows_per_block; ++row) sum += shared[i * kThreads + row * tile.lanes + tile.lane];
            write(i, sum);
        }
}
