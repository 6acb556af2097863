// Convolutions over spikes by events: out[pixel] += weight[tap, channel] for each spike, and their weight gradient.
//
// Activations have their channels innermost in memory (NHWC). Channels are taken in chunks of CHUNK, outputs in blocks
// of BLOCK: the weights of one tap between such a chunk and block are a tile, which stays in the L1 cache while a strip
// of pixels passes. Every result is a sum of float32 numbers in an order that depends neither on the number of threads
// nor on the width of the vectors.

#include "team.h"

#include <string.h>
#ifdef __AVX__
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define INSTRUCTIONS "AVX-512"
#define LANES 16
#define BLOCK 64
#elif defined(__AVX__)
#define INSTRUCTIONS "AVX"
#define LANES 8
#define BLOCK 64
#else
#define INSTRUCTIONS "baseline"
#define LANES 4
#define BLOCK 32
#endif
#define CHUNK 128
#define VECTORS (BLOCK / LANES)

#define STRIP_PIXELS 128
#define LIST_PIXELS 256
// The weight gradient adds this many pixels, then adds that to the total: rounding errors of long sums stay small.
#define SUM_PIXELS 4096

typedef float Vector __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
// Without full unrolling the accumulators would be kept in memory, which takes twice as long.
#ifdef __clang__
#define UNROLL _Pragma("clang loop unroll(full)")
#else
#define UNROLL _Pragma("GCC unroll 8")
#endif

typedef struct {
    int64_t frames, channels, height, width, outputs, kernel_height, kernel_width, stride, padding, out_height, out_width;
} Shape;

INLINE int64_t taps(const Shape* s) { return s->kernel_height * s->kernel_width; }
INLINE int is_finite(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return (bits & 0x7f800000) != 0x7f800000;
}

const char* instructions(void) { return INSTRUCTIONS; }
int64_t list_stride(const Shape* s) { return least(s->channels, CHUNK); }
int64_t list_count(const Shape* s) { return s->frames * s->height * s->width * parts(s->channels, CHUNK); }
int64_t packed_size(const Shape* s) {
    return parts(s->outputs, BLOCK) * parts(s->channels, CHUNK) * taps(s) * CHUNK * BLOCK;
}

// --- Lists of events: for each pixel and chunk, how many channels spike, and which

#define GROUP 16

// Returns which of GROUP values are not 0, as bits; adds to *others those which are not 1 either.
INLINE uint32_t nonzero(const float* values, uint32_t* others) {
#if defined(__AVX512F__)
    const __m512 all = _mm512_loadu_ps(values);
    const uint32_t bits = _mm512_cmp_ps_mask(all, _mm512_setzero_ps(), _CMP_NEQ_UQ);
    *others |= bits & _mm512_cmp_ps_mask(all, _mm512_set1_ps(1.0f), _CMP_NEQ_UQ);
#elif defined(__AVX__)
    uint32_t bits = 0;
    for (int half = 0; half < GROUP; half += 8) {
        const __m256 all = _mm256_loadu_ps(values + half);
        const __m256 spikes = _mm256_cmp_ps(all, _mm256_setzero_ps(), _CMP_NEQ_UQ);
        const __m256 no_ones = _mm256_cmp_ps(all, _mm256_set1_ps(1.0f), _CMP_NEQ_UQ);
        bits |= (uint32_t)_mm256_movemask_ps(spikes) << half;
        *others |= (uint32_t)_mm256_movemask_ps(_mm256_and_ps(spikes, no_ones));
    }
#else
    uint32_t bits = 0;
    for (int i = 0; i < GROUP; i++) {
        bits |= (uint32_t)(values[i] != 0.0f) << i;
        *others |= (values[i] != 0.0f) & (values[i] != 1.0f);
    }
#endif
    return bits;
}

INLINE uint32_t nonzero_of(const float* values, int64_t size, uint32_t* others) {
    if (size >= GROUP) return nonzero(values, others);
    float padded[GROUP] = {0};
    memcpy(padded, values, size * sizeof(float));
    return nonzero(padded, others);
}

typedef struct {
    const Shape* shape;
    const float* spikes;
    uint8_t *index, *count;
    int64_t next, events;
    uint32_t others;
} ListJob;

// Returns the number of events of a pixel's chunk.
INLINE int list_chunk(const float* values, int64_t channels, uint8_t* list, uint32_t* others) {
    int count = 0;
    // 64 channels at once: where a loop over few events ends is what a CPU predicts badly.
    for (int64_t first = 0; first < channels; first += 64) {
        uint64_t bits = 0;
        for (int64_t c = first; c < least(first + 64, channels); c += GROUP) {
            bits |= (uint64_t)nonzero_of(values + c, channels - c, others) << (c - first);
        }
        for (; bits; bits &= bits - 1) list[count++] = (uint8_t)(first + __builtin_ctzll(bits));
    }
    return count;
}

static void list_pixels(void* argument) {
    ListJob* job = argument;
    const Shape* s = job->shape;
    const int64_t pixels = s->frames * s->height * s->width, chunks = parts(s->channels, CHUNK), stride = list_stride(s);
    const int leaves_out = taps(s) == 1 && s->stride > 1;
    int64_t events = 0;
    uint32_t others = 0;
    for (int64_t task; (task = take(&job->next)) * LIST_PIXELS < pixels;) {
        const int64_t end = least((task + 1) * LIST_PIXELS, pixels);
        for (int64_t pixel = task * LIST_PIXELS; pixel < end; pixel++) {
            const int64_t y = pixel / s->width % s->height + s->padding, x = pixel % s->width + s->padding;
            if (leaves_out && (y % s->stride != 0 || x % s->stride != 0)) continue;
            for (int64_t chunk = 0; chunk < chunks; chunk++) {
                const float* values = job->spikes + pixel * s->channels + chunk * CHUNK;
                const int64_t list = pixel * chunks + chunk, channels = least(CHUNK, s->channels - chunk * CHUNK);
                events += job->count[list] = (uint8_t)list_chunk(values, channels, job->index + list * stride, &others);
            }
        }
    }
    __atomic_fetch_add(&job->events, events, __ATOMIC_RELAXED);
    __atomic_fetch_or(&job->others, others, __ATOMIC_RELAXED);
}

// Returns the number of events, or -1 if there are other values than 0 and 1. Pixels that a strided 1 x 1 convolution
// passes over have no list.
int64_t list_events(const Shape* s, const Team* team, const float* spikes, uint8_t* index, uint8_t* count) {
    ListJob job = {.shape = s, .spikes = spikes, .index = index, .count = count};
    run(team, list_pixels, &job);
    return job.others ? -1 : job.events;
}

// --- Memory order

typedef struct {
    int64_t frames, rows, columns;
    const float* from;
    float* to;
    int64_t next;
} TransposeJob;

static void transpose_frames(void* argument) {
    TransposeJob* job = argument;
    const int64_t rows = job->rows, columns = job->columns, blocks = parts(rows, GROUP);
    for (int64_t task; (task = take(&job->next)) < job->frames * blocks;) {
        const int64_t frame = task / blocks, top = task % blocks * GROUP, bottom = least(top + GROUP, rows);
        const float* from = job->from + frame * rows * columns;
        float* to = job->to + frame * rows * columns;
        for (int64_t left = 0; left < columns; left += GROUP) {
            for (int64_t column = left; column < least(left + GROUP, columns); column++) {
                for (int64_t row = top; row < bottom; row++) to[column * rows + row] = from[row * columns + column];
            }
        }
    }
}

// Writes frames [rows][columns] as [columns][rows]: NHWC as NCHW and back.
void transpose(const Team* team, int64_t frames, int64_t rows, int64_t columns, const float* from, float* to) {
    TransposeJob job = {frames, rows, columns, from, to, 0};
    run(team, transpose_frames, &job);
}

// --- Weights in tiles: [blocks of outputs][chunks of channels][taps][CHUNK][BLOCK]

typedef struct {
    const Shape* shape;
    float *weight, *packed;
    int64_t channel_stride, tap_stride;  // of the weight; an output's weights are contiguous
    int unpacks;
    int64_t next;
    int infinite;
} PackJob;

#define LINE 16  // outputs that are moved together: a cache line of the tile

static void pack_tiles(void* argument) {
    PackJob* job = argument;
    const Shape* s = job->shape;
    const int64_t chunks = parts(s->channels, CHUNK), blocks = parts(s->outputs, BLOCK);
    int infinite = 0;
    for (int64_t task; (task = take(&job->next)) < blocks * chunks;) {
        const int64_t block = task / chunks, chunk = task % chunks;
        const int64_t channels = least(CHUNK, s->channels - chunk * CHUNK);
        float* tiles = job->packed + task * taps(s) * CHUNK * BLOCK;
        for (int64_t first = 0; first < BLOCK; first += LINE) {
            const int64_t output = block * BLOCK + first, lines = least(LINE, s->outputs - output);
            if (lines <= 0 && job->unpacks) break;
            // The inner loop is over what is contiguous in the weight.
            const int taps_inside = job->tap_stride == 1;
            for (int64_t outer = 0; outer < (taps_inside ? channels : taps(s)); outer++) {
                for (int64_t inner = 0; inner < (taps_inside ? taps(s) : channels); inner++) {
                    const int64_t c = taps_inside ? outer : inner, tap = taps_inside ? inner : outer;
                    float* tile = tiles + (tap * CHUNK + c) * BLOCK + first;
                    const int64_t offset = (chunk * CHUNK + c) * job->channel_stride + tap * job->tap_stride;
                    for (int64_t k = 0; k < lines; k++) {
                        float* weight = job->weight + (output + k) * s->channels * taps(s) + offset;
                        if (job->unpacks) {
                            *weight = tile[k];
                        } else {
                            tile[k] = *weight;
                            infinite |= !is_finite(*weight);
                        }
                    }
                    for (int64_t k = lines < 0 ? 0 : lines; k < LINE && !job->unpacks; k++) tile[k] = 0.0f;
                }
            }
        }
    }
    __atomic_fetch_or(&job->infinite, infinite, __ATOMIC_RELAXED);
}

// Returns whether all weights are finite.
int pack(const Shape* s, const Team* team, float* weight, int64_t channel_stride, int64_t tap_stride, float* packed) {
    PackJob job = {s, weight, packed, channel_stride, tap_stride, 0, 0, 0};
    run(team, pack_tiles, &job);
    return !job.infinite;
}

// --- What convolution and weight gradient share: which pixels of a row a tap reaches

typedef struct {
    int64_t begin, end;
} Range;

// The outputs whose input, output * stride + offset, is one of 0 ... inputs - 1.
INLINE Range reached(int64_t outputs, int64_t inputs, int64_t offset, int64_t stride) {
    Range range = {offset >= 0 ? 0 : parts(-offset, stride), inputs <= offset ? 0 : parts(inputs - offset, stride)};
    range.end = least(range.end, outputs);
    return range;
}

typedef struct {
    const Shape* shape;
    const uint8_t *index, *count;
    const float* packed;  // weights
    const float* gradient;
    float* result;  // outputs, or the packed weight gradient
    int64_t next;
} EventJob;

// Which of VECTORS, VECTORS / 2, ... 1 vectors hold the outputs of a block.
#define WITH_VECTORS(FUNCTION, width, ...)                                           \
    do {                                                                             \
        if ((width) > BLOCK / 2) FUNCTION(__VA_ARGS__, width, VECTORS);              \
        else if ((width) > BLOCK / 4) FUNCTION(__VA_ARGS__, width, VECTORS / 2);     \
        else if (VECTORS <= 4 || (width) > BLOCK / 8) FUNCTION(__VA_ARGS__, width, VECTORS / 4); \
        else FUNCTION(__VA_ARGS__, width, VECTORS / 8 ? VECTORS / 8 : 1);            \
    } while (0)

// --- Convolution

INLINE void convolve_strip(
    const EventJob* job, int64_t block, int64_t begin, int64_t end, const int64_t width, const int vectors
) {
    const Shape* s = job->shape;
    // Not read again for each pixel, as stores to the output might have changed them.
    const uint8_t *indices = job->index, *counts = job->count;
    const int64_t chunks = parts(s->channels, CHUNK), stride = list_stride(s), step = s->stride * chunks;
    const int64_t outputs = s->outputs;
    float* result = job->result + block * BLOCK;
    for (int64_t pixel = begin * s->out_width; pixel < end * s->out_width; pixel++) {
        memset(result + pixel * outputs, 0, width * sizeof(float));
    }
    for (int64_t chunk = 0; chunk < chunks; chunk++) {
        for (int64_t tap = 0; tap < taps(s); tap++) {
            const float* tile = job->packed + ((block * chunks + chunk) * taps(s) + tap) * CHUNK * BLOCK;
            const int64_t dy = tap / s->kernel_width - s->padding, dx = tap % s->kernel_width - s->padding;
            const Range rows = reached(s->out_height, s->height, dy, s->stride);
            const Range columns = reached(s->out_width, s->width, dx, s->stride);
            for (int64_t line = begin; line < end; line++) {
                const int64_t frame = line / s->out_height, y = line % s->out_height;
                if (y < rows.begin || y >= rows.end) continue;
                const int64_t input = (frame * s->height + y * s->stride + dy) * s->width + dx;
                int64_t list = (input + columns.begin * s->stride) * chunks + chunk;
                float* out = result + (line * s->out_width + columns.begin) * outputs;
                for (int64_t x = columns.begin; x < columns.end; x++, list += step, out += outputs) {
                    const int events = counts[list];
                    if (!events) continue;
                    const uint8_t* index = indices + list * stride;
                    float copy[BLOCK];
                    float* sums = out;
                    if (width < vectors * LANES) sums = memcpy(copy, out, width * sizeof(float));
                    Vector sum[VECTORS];
                    UNROLL for (int i = 0; i < vectors; i++) sum[i] = *(Vector*)(sums + i * LANES);
                    for (int event = 0; event < events; event++) {
                        const float* weights = tile + (int64_t)index[event] * BLOCK;
                        UNROLL for (int i = 0; i < vectors; i++) sum[i] += *(const Vector*)(weights + i * LANES);
                    }
                    UNROLL for (int i = 0; i < vectors; i++) *(Vector*)(sums + i * LANES) = sum[i];
                    if (sums == copy) memcpy(out, copy, width * sizeof(float));
                }
            }
        }
    }
}

static void convolve_strips(void* argument) {
    EventJob* job = argument;
    const Shape* s = job->shape;
    const int64_t lines = s->frames * s->out_height;
    const int64_t strip = s->out_width < STRIP_PIXELS ? STRIP_PIXELS / s->out_width : 1;
    const int64_t strips = parts(lines, strip), blocks = parts(s->outputs, BLOCK);
    for (int64_t task; (task = take(&job->next)) < strips * blocks;) {
        // Neighbouring tasks share the weights of a block.
        const int64_t block = task / strips, begin = task % strips * strip, end = least(begin + strip, lines);
        const int64_t width = least(BLOCK, s->outputs - block * BLOCK);
        WITH_VECTORS(convolve_strip, width, job, block, begin, end);
    }
}

void convolve(
    const Shape* s, const Team* team, const uint8_t* index, const uint8_t* count, const float* packed, float* out
) {
    EventJob job = {s, index, count, packed, 0, out, 0};
    run(team, convolve_strips, &job);
}

// --- Weight gradient: each tile is one thread's, so that nothing is to be added across threads

INLINE void sum_tile(const EventJob* job, int64_t block, int64_t chunk, int64_t tap, const int64_t width, const int vectors) {
    const Shape* s = job->shape;
    const uint8_t *indices = job->index, *counts = job->count;
    const float* all_gradients = job->gradient + block * BLOCK;
    const int64_t chunks = parts(s->channels, CHUNK), stride = list_stride(s), step = s->stride * chunks;
    const int64_t outputs = s->outputs;
    const int64_t lines = s->frames * s->out_height, together = parts(SUM_PIXELS, s->out_width);
    const int64_t dy = tap / s->kernel_width - s->padding, dx = tap % s->kernel_width - s->padding;
    const Range rows = reached(s->out_height, s->height, dy, s->stride);
    const Range columns = reached(s->out_width, s->width, dx, s->stride);
    float* total = job->result + ((block * chunks + chunk) * taps(s) + tap) * CHUNK * BLOCK;
    float tile[CHUNK * BLOCK] __attribute__((aligned(64)));
    memset(total, 0, sizeof tile);
    for (int64_t begin = 0; begin < lines; begin += together) {
        memset(tile, 0, sizeof tile);
        for (int64_t line = begin; line < least(begin + together, lines); line++) {
            const int64_t frame = line / s->out_height, y = line % s->out_height;
            if (y < rows.begin || y >= rows.end) continue;
            const int64_t input = (frame * s->height + y * s->stride + dy) * s->width + dx;
            int64_t list = (input + columns.begin * s->stride) * chunks + chunk;
            const float* gradients = all_gradients + (line * s->out_width + columns.begin) * outputs;
            for (int64_t x = columns.begin; x < columns.end; x++, list += step, gradients += outputs) {
                const int events = counts[list];
                if (!events) continue;
                const uint8_t* index = indices + list * stride;
                const float* source = gradients;
                float copy[BLOCK];
                if (width < vectors * LANES) {
                    memset(copy, 0, sizeof copy);
                    source = memcpy(copy, gradients, width * sizeof(float));
                }
                Vector gradient[VECTORS];
                UNROLL for (int i = 0; i < vectors; i++) gradient[i] = *(const Vector*)(source + i * LANES);
                for (int event = 0; event < events; event++) {
                    float* sums = tile + (int64_t)index[event] * BLOCK;
                    UNROLL for (int i = 0; i < vectors; i++) *(Vector*)(sums + i * LANES) += gradient[i];
                }
            }
        }
        for (int64_t i = 0; i < CHUNK * BLOCK; i++) total[i] += tile[i];
    }
}

static void sum_tiles(void* argument) {
    EventJob* job = argument;
    const Shape* s = job->shape;
    const int64_t chunks = parts(s->channels, CHUNK), blocks = parts(s->outputs, BLOCK);
    for (int64_t task; (task = take(&job->next)) < blocks * chunks * taps(s);) {
        const int64_t block = task / taps(s) / chunks, chunk = task / taps(s) % chunks, tap = task % taps(s);
        const int64_t width = least(BLOCK, s->outputs - block * BLOCK);
        WITH_VECTORS(sum_tile, width, job, block, chunk, tap);
    }
}

typedef struct {
    const float* values;
    int64_t size, next;
    int infinite;
} FiniteJob;

static void find_infinite(void* argument) {
    FiniteJob* job = argument;
    int infinite = 0;
    for (int64_t task; (task = take(&job->next)) << 16 < job->size;) {
        const int64_t end = least((task + 1) << 16, job->size);
        for (int64_t i = task << 16; i < end; i++) infinite |= !is_finite(job->values[i]);
    }
    __atomic_fetch_or(&job->infinite, infinite, __ATOMIC_RELAXED);
}

// Writes the weight gradient by way of packed; returns 0, with nothing written, if a gradient is not finite.
int weight_gradient(
    const Shape* s, const Team* team, const uint8_t* index, const uint8_t* count, const float* gradient, float* packed,
    float* weight, int64_t channel_stride, int64_t tap_stride
) {
    FiniteJob finite = {gradient, s->frames * s->out_height * s->out_width * s->outputs, 0, 0};
    run(team, find_infinite, &finite);
    if (finite.infinite) return 0;
    EventJob job = {s, index, count, 0, gradient, packed, 0};
    run(team, sum_tiles, &job);
    PackJob unpack = {s, weight, packed, channel_stride, tap_stride, 1, 0, 0};
    run(team, pack_tiles, &unpack);
    return 1;
}
