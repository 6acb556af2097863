// Enough of CUDA C++ for g++ to compile the kernels and run them on the CPU; cuda_on_cpu.cpp has the scheduler.
//
// The names outside namespace cuda_on_cpu are CUDA's. Light on headers: every kernel instance includes this file.
#pragma once
#include <math.h>
#include <string.h>

#define __global__ [[maybe_unused]] static
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static
#define __syncthreads() cuda_on_cpu::wait(cuda_on_cpu::State::at_block_barrier, __LINE__)
#define __syncwarp() cuda_on_cpu::wait(cuda_on_cpu::State::at_warp_barrier, __LINE__)
#define __shfl_sync(mask, value, lane) cuda_on_cpu::shuffle(mask, value, lane, __LINE__)
#define __shfl_xor_sync(mask, value, bits) \
    cuda_on_cpu::shuffle(mask, value, cuda_on_cpu::lane() ^ (bits), __LINE__)
#define __shfl_down_sync(mask, value, delta) \
    cuda_on_cpu::shuffle(mask, value, cuda_on_cpu::lane_below(delta), __LINE__)

struct dim3 {
    unsigned int x, y, z;
};

extern dim3 gridDim, blockDim, blockIdx, threadIdx;

inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }

inline unsigned int __float_as_uint(float value) {
    unsigned int bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

inline float __uint_as_float(unsigned int bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

namespace cuda_on_cpu {

enum class State { ready, at_block_barrier, at_warp_barrier, ended };
enum Order { ascending, descending, shuffled };

// Runs the kernel for every thread of the grid. Returns null, or the error in one line.
// The order applies to the threads of a block and to the blocks.
const char* launch(dim3 grid, dim3 block, Order order, void (*call_kernel)(void**), void** arguments);

// Suspends the running thread until all threads of its block or warp wait at this line.
void wait(State barrier, int line);

// Called after the declaration of each __shared__ variable: what a block did not write there is NaN.
void poison_once_per_block(void* variable, size_t bytes);

int lane();
int lane_below(int delta);

// Gives 8 bytes to the other lanes of the warp and returns those of lane `source`.
unsigned long long exchange(unsigned int mask, unsigned long long given, int source, int line);

template <typename Value>
Value shuffle(unsigned int mask, Value value, int source, int line) {
    static_assert(sizeof(Value) <= sizeof(unsigned long long), "a shuffle moves at most 8 bytes");
    unsigned long long bytes = 0;
    memcpy(&bytes, &value, sizeof value);
    bytes = exchange(mask, bytes, source, line);
    memcpy(&value, &bytes, sizeof value);
    return value;
}

}  // namespace cuda_on_cpu
