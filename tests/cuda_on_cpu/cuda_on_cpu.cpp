// Runs CUDA threads as fibers on one CPU core.
//
// Every thread of a block has its own stack; blocks run one after another. A thread runs until it ends or waits for
// others, so a missing barrier shows as results that depend on the order of the threads, and a barrier that some
// threads never reach is an error.
#include "cuda_on_cpu.h"

#include <stdio.h>
#include <ucontext.h>

#include <algorithm>
#include <memory>
#include <random>
#include <vector>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif

dim3 gridDim, blockDim, blockIdx, threadIdx;

namespace cuda_on_cpu {

constexpr int kWarp = 32;
constexpr size_t kStackBytes = 64 * 1024;

struct Thread {
    ucontext_t context;
    std::unique_ptr<char[]> stack{new char[kStackBytes]};
    void* sanitizer_stack = nullptr;
    State state;
    int line;  // of the barrier it waits at
    int shuffles;
    unsigned long long slot[2];  // what it gives to shuffles; two, because a fast lane may be one shuffle ahead
};

static std::vector<Thread> threads;
static std::vector<void*> poisoned;
static ucontext_t scheduler;
[[maybe_unused]] static void* scheduler_sanitizer_stack;
[[maybe_unused]] static const void* scheduler_stack_bottom;
[[maybe_unused]] static size_t scheduler_stack_size;
static size_t running;
static void (*call_kernel)(void**);
static void** kernel_arguments;
static char error[256];

static void switch_to_thread(size_t index) {
    running = index;
    threadIdx = {unsigned(index % blockDim.x), unsigned(index / blockDim.x % blockDim.y),
                 unsigned(index / blockDim.x / blockDim.y)};
    Thread& thread = threads[index];
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_start_switch_fiber(&scheduler_sanitizer_stack, thread.stack.get(), kStackBytes);
#endif
    swapcontext(&scheduler, &thread.context);
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(scheduler_sanitizer_stack, nullptr, nullptr);
#endif
}

static void switch_to_scheduler() {
    Thread& thread = threads[running];
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_start_switch_fiber(
        thread.state == State::ended ? nullptr : &thread.sanitizer_stack, scheduler_stack_bottom, scheduler_stack_size);
#endif
    swapcontext(&thread.context, &scheduler);
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(thread.sanitizer_stack, &scheduler_stack_bottom, &scheduler_stack_size);
#endif
}

static void run_body() {
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack_bottom, &scheduler_stack_size);
#endif
    call_kernel(kernel_arguments);
    threads[running].state = State::ended;
    switch_to_scheduler();
}

void wait(State state, int line) {
    threads[running].state = state;
    threads[running].line = line;
    switch_to_scheduler();
}

int lane() { return int(running % kWarp); }

static int lanes_in_warp() { return int(std::min<size_t>(kWarp, threads.size() - running / kWarp * kWarp)); }

int lane_below(int delta) { return lane() + delta < lanes_in_warp() ? lane() + delta : lane(); }

unsigned long long exchange(unsigned int mask, unsigned long long given, int source, int line) {
    const unsigned int all = lanes_in_warp() == kWarp ? ~0u : (1u << lanes_in_warp()) - 1u;
    if (mask != all || source < 0 || source >= lanes_in_warp())
        snprintf(error, sizeof error, "line %d: the mask or the source lane of a shuffle is not the warp's", line);
    Thread& self = threads[running];
    const int slot = self.shuffles++ % 2;
    self.slot[slot] = given;
    wait(State::at_warp_barrier, line);
    return threads[running / kWarp * kWarp + source].slot[slot];
}

void poison_once_per_block(void* variable, size_t bytes) {
    if (std::find(poisoned.begin(), poisoned.end(), variable) != poisoned.end()) return;
    poisoned.push_back(variable);
    memset(variable, 0xff, bytes);
}

// Lets the threads first .. last - 1 go on if all of them wait at the same barrier of this kind.
static bool release(size_t first, size_t last, State state) {
    for (size_t i = first; i < last; ++i)
        if (threads[i].state != state || threads[i].line != threads[first].line) return false;
    for (size_t i = first; i < last; ++i) threads[i].state = State::ready;
    return true;
}

static bool run_block(const std::vector<size_t>& order) {
    poisoned.clear();
    for (Thread& thread : threads) {
        thread.state = State::ready;
        thread.shuffles = 0;
        getcontext(&thread.context);
        thread.context.uc_stack.ss_sp = thread.stack.get();
        thread.context.uc_stack.ss_size = kStackBytes;
        thread.context.uc_link = nullptr;
        makecontext(&thread.context, run_body, 0);
    }
    for (;;) {
        for (size_t index : order) {
            if (threads[index].state == State::ready) switch_to_thread(index);
            if (error[0]) return false;
        }
        bool released = release(0, threads.size(), State::at_block_barrier);
        for (size_t first = 0; first < threads.size(); first += kWarp)
            released |= release(first, std::min(first + kWarp, threads.size()), State::at_warp_barrier);
        if (released) continue;
        for (const Thread& thread : threads)
            if (thread.state != State::ended) {
                snprintf(error, sizeof error, "line %d: a barrier that not all threads reach", thread.line);
                return false;
            }
        return true;
    }
}

const char* launch(dim3 grid, dim3 block, Order order, void (*kernel)(void**), void** arguments) {
    gridDim = grid;
    blockDim = block;
    call_kernel = kernel;
    kernel_arguments = arguments;
    error[0] = '\0';
    threads = std::vector<Thread>(size_t(block.x) * block.y * block.z);
    std::mt19937 random(0);
    const auto arrange = [&](size_t count) {
        std::vector<size_t> indices(count);
        for (size_t i = 0; i < count; ++i) indices[i] = order == descending ? count - 1 - i : i;
        if (order == shuffled) std::shuffle(indices.begin(), indices.end(), random);
        return indices;
    };
    for (size_t index : arrange(size_t(grid.x) * grid.y * grid.z)) {
        blockIdx = {unsigned(index % grid.x), unsigned(index / grid.x % grid.y), unsigned(index / grid.x / grid.y)};
        if (!run_block(arrange(threads.size()))) return error;
    }
    return nullptr;
}

}  // namespace cuda_on_cpu
