// Threads that share the tasks of a job.
#pragma once
#include <stdint.h>

#define INLINE static inline __attribute__((always_inline))

// GOMP_parallel of the OpenMP runtime that torch uses: calls work(job) in each of the threads, and waits for all.
typedef void (*Parallel)(void (*work)(void*), void* job, unsigned threads, unsigned flags);

typedef struct {
    Parallel parallel;  // may be null: one thread
    int64_t threads;
} Team;

static void run(const Team* team, void (*work)(void*), void* job) {
    if (team->parallel && team->threads > 1) {
        team->parallel(work, job, (unsigned)team->threads, 0);
    } else {
        work(job);
    }
}

INLINE int64_t take(int64_t* next) { return __atomic_fetch_add(next, 1, __ATOMIC_RELAXED); }
INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t parts(int64_t whole, int64_t part) { return (whole + part - 1) / part; }
