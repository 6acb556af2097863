// The fused operations on the CPU, float32: the kernels of batch_norm.cu, norm_lif.cu, residual_lif.cu, gate_lif.cu,
// residual_lif_pool.cu and lif.cu, under their names and with their arguments, which are documented there.
//
// Work goes in tiles of up to TILE neighbouring values of a frame, all time steps of one before the next, so that
// membrane potentials and all that is computed from them stay in the L1 cache. Each operation rounds on its own
// (-ffp-contract=off), in the order of the references. Reductions leave partial sums for each block of rows, of which
// there are as many for any number of threads: results repeat bit for bit.

#include "team.h"

#include <math.h>
#include <string.h>

#define TILE 512
#define MAX_STEPS 16

// What a kernel's instance (its template's arguments) and its grid come to.
typedef struct {
    Team team;
    int64_t blocks, quantities;
    int64_t steps;
    int64_t soft, detached, surrogate;
    int64_t norm_shortcut, with_spikes;
} Launch;

typedef struct {
    const Launch* launch;
    void** arguments;
    int64_t next;
} Job;

#define POINTER(index) (*(float* const*)job->arguments[index])
#define FLOAT(index) (*(const float*)job->arguments[index])
#define INT(index) (*(const int32_t*)job->arguments[index])
#define LONG(index) (*(const int64_t*)job->arguments[index])
#define STRUCT(type, index) (*(const type*)job->arguments[index])

// A kernel: its blocks, shared among the threads.
#define KERNEL(name)                                                                      \
    static void name##_block(const Job* job, int64_t block);                              \
    static void name##_blocks(void* argument) {                                           \
        Job* job = argument;                                                              \
        for (int64_t block; (block = take(&job->next)) < job->launch->blocks;) name##_block(job, block); \
    }                                                                                     \
    void name(const Launch* launch, void** arguments) {                                   \
        Job job = {launch, arguments, 0};                                                 \
        run(&launch->team, name##_blocks, &job);                                          \
    }                                                                                     \
    static void name##_block(const Job* job, int64_t block)

// --- Tiles

// The rows of a block, and how they are taken: `together` rows of all channels, or one of TILE channels.
typedef struct {
    int64_t begin, end, together;
} Rows;

INLINE Rows rows_of_block(const Launch* launch, int64_t block, int64_t rows, int64_t channels) {
    const int64_t share = parts(rows, launch->blocks);
    const int64_t begin = least(block * share, rows);
    return (Rows){begin, least(begin + share, rows), channels < TILE ? TILE / channels : 1};
}

#define FOR_CHANNELS(channels) \
    for (int64_t channel = 0, width; channel < (channels) && (width = least(TILE, (channels)-channel)); channel += TILE)

// With `at`, where the tile begins in a frame, and its number n of values.
#define FOR_TILES(rows, channels)                                                                              \
    for (int64_t row = rows.begin, n, at;                                                                      \
         row < rows.end && (n = least(rows.together, rows.end - row) * width) && ((at = row * (channels) + channel), 1); \
         row += rows.together)

// Repeats what belongs to channels for the rows of a tile; `otherwise` where there is no such thing.
INLINE void repeat(const float* of_channels, float otherwise, int64_t width, const Rows* rows, float* tile) {
    for (int64_t i = 0; i < rows->together * width; i++) tile[i] = of_channels ? of_channels[i % width] : otherwise;
}

// Adds what the rows of a tile have to what is theirs in common.
INLINE void fold(const float* tile, int64_t width, const Rows* rows, double* of_channels) {
    for (int64_t c = 0; c < width; c++) of_channels[c] = 0.0;
    for (int64_t i = 0; i < rows->together * width; i++) of_channels[i % width] += tile[i];
}

INLINE void fill(float* tile, float value, int64_t n) {
    for (int64_t i = 0; i < n; i++) tile[i] = value;
}

// Copies what a tile begins with; `otherwise` where there is nothing to copy.
INLINE void begin(const float* from, float otherwise, int64_t at, int64_t n, float* tile) {
    if (from) memcpy(tile, from + at, n * sizeof(float));
    else fill(tile, otherwise, n);
}

// --- BatchNorm as an affine map

typedef struct {
    const float *weight, *bias, *mean, *inverse_std;
} Norm;

typedef struct {
    float mean[TILE], scale[TILE], bias[TILE];
} Normalization;

INLINE void normalization(const Norm* of, int64_t channel, int64_t width, const Rows* rows, Normalization* tile) {
    repeat(of->mean + channel, 0.0f, width, rows, tile->mean);
    repeat(of->bias + channel, 0.0f, width, rows, tile->bias);
    for (int64_t i = 0; i < rows->together * width; i++) {
        tile->scale[i] = of->inverse_std[channel + i % width] * of->weight[channel + i % width];
    }
}

INLINE float normalized(const Normalization* norm, int64_t i, float y) {
    return (y - norm->mean[i]) * norm->scale[i] + norm->bias[i];
}

typedef struct {
    float mean[TILE], scale[TILE], constant[TILE], slope[TILE];
} NormalizationGradient;

INLINE void normalization_gradient(
    const float* weight, const float* mean, const float* inverse_std, const float* sums, const float* sums_of_products,
    float inverse_count, int64_t channel, int64_t width, const Rows* rows, NormalizationGradient* tile
) {
    for (int64_t i = 0; i < rows->together * width; i++) {
        const int64_t c = channel + i % width;
        tile->mean[i] = mean[c];
        tile->scale[i] = inverse_std[c] * weight[c];
        tile->constant[i] = sums[c] * inverse_count;
        tile->slope[i] = inverse_std[c] * sums_of_products[c] * inverse_count;
    }
}

INLINE float gradient_of_normalized(const NormalizationGradient* norm, int64_t i, float y, float grad) {
    return norm->scale[i] * (grad - norm->constant[i] - (y - norm->mean[i]) * norm->slope[i]);
}

// --- The neuron: lif.cuh and surrogate.cuh

typedef struct {
    float decay, gain, bias, threshold, v_reset, surrogate_a, surrogate_b;
} LIF;

enum { PIECEWISE_QUADRATIC, RECT, SIGMOID, ATAN };

INLINE float charge(const LIF* lif, float v, float x) { return lif->decay * v + lif->gain * x + lif->bias; }

INLINE float after(const LIF* lif, int soft, float h) {
    const float spiked = soft ? h - lif->threshold : lif->v_reset;
    return h > lif->threshold ? spiked : h;
}

// exp within 2 units in the last place; at least that of -87, and infinite above 88.
INLINE float exponential(float given) {
    float x = given < -87.0f ? -87.0f : given;
    x = x > 88.0f ? 88.0f : x;
    const float round = 0x1.8p23f;
    const float shifted = x * 0x1.715476p0f + round, power = shifted - round;
    const float r = (x - power * 0x1.62ep-1f) - power * 0x1.0bfbe8p-15f;
    float y = 1.9875691500e-4f;
    y = y * r + 1.3981999507e-3f;
    y = y * r + 8.3334519073e-3f;
    y = y * r + 4.1665795894e-2f;
    y = y * r + 1.6666665459e-1f;
    y = y * r + 5.0000001201e-1f;
    y = y * r * r + r + 1.0f;
    union {
        float value;
        uint32_t bits;
    } number = {shifted}, scale;
    scale.bits = (number.bits - 0x4b400000u + 127u) << 23;
    return given > 88.0f ? INFINITY : y * scale.value;
}

INLINE float sigmoid(float x) { return 1.0f / (1.0f + exponential(-x)); }

INLINE float surrogate_gradient(int surrogate, float u, float a, float b) {
    if (surrogate == PIECEWISE_QUADRATIC) {
        const float value = a - b * fabsf(u);
        return value < 0.0f ? 0.0f : value;
    }
    if (surrogate == RECT) return fabsf(u) < b ? a : 0.0f;
    if (surrogate == SIGMOID) {
        const float y = sigmoid(a * u);
        return a * y * (1.0f - y);
    }
    const float y = b * u;
    return a / (1.0f + y * y);
}

// A time step backwards for n neurons: from their potentials h, grad_s of the spikes (null: 0) and grad_v of the
// potential after the spike, to grad_h; grad_v becomes that of the potential before the step.
typedef void (*StepBack)(
    const LIF*, int64_t n, const float* restrict h, const float* restrict grad_s, float* restrict grad_v,
    float* restrict grad_h
);

INLINE void step_back(
    const int soft, const int detached, const int surrogate, const LIF* given, int64_t n, const float* restrict h,
    const float* restrict grad_s, float* restrict grad_v, float* restrict grad_h
) {
    const LIF lif = *given;
    for (int64_t i = 0; i < n; i++) {
        const float through_reset = soft ? -lif.threshold : lif.v_reset - h[i];
        const float grad = grad_s ? grad_s[i] : 0.0f;
        const float grad_spike = detached ? grad : grad + grad_v[i] * through_reset;
        const float kept = !soft && h[i] > lif.threshold ? 0.0f : grad_v[i];
        const float value =
            grad_spike * surrogate_gradient(surrogate, h[i] - lif.threshold, lif.surrogate_a, lif.surrogate_b) + kept;
        grad_h[i] = value;
        grad_v[i] = lif.decay * value;
    }
}

#define STEP_BACK(soft, detached, surrogate)                                                                   \
    static void step_back_##soft##detached##surrogate(                                                         \
        const LIF* lif, int64_t n, const float* restrict h, const float* restrict grad_s, float* restrict grad_v, \
        float* restrict grad_h                                                                                 \
    ) {                                                                                                        \
        if (grad_s) step_back(soft, detached, surrogate, lif, n, h, grad_s, grad_v, grad_h);                   \
        else step_back(soft, detached, surrogate, lif, n, h, 0, grad_v, grad_h);                               \
    }
#define STEPS_BACK(soft, detached) \
    STEP_BACK(soft, detached, 0) STEP_BACK(soft, detached, 1) STEP_BACK(soft, detached, 2) STEP_BACK(soft, detached, 3)
STEPS_BACK(0, 0) STEPS_BACK(0, 1) STEPS_BACK(1, 0) STEPS_BACK(1, 1)
#define NAMES(soft, detached)                                                                        \
    {step_back_##soft##detached##0, step_back_##soft##detached##1, step_back_##soft##detached##2, \
     step_back_##soft##detached##3}
static const StepBack STEP_BACK_OF[2][2][4] = {{NAMES(0, 0), NAMES(0, 1)}, {NAMES(1, 0), NAMES(1, 1)}};

INLINE StepBack step_back_of(const Launch* launch) {
    return STEP_BACK_OF[launch->soft][launch->detached][launch->surrogate];
}

// Time steps forwards for n neurons with inputs x (`frame` apart in memory): spikes (null: not wanted) and potentials
// before the reset, TILE apart (null: not wanted). v becomes the potential after the last step.
INLINE void steps_with(
    const int soft, const LIF* given, int64_t steps, int64_t n, const float* restrict x, int64_t frame, float* restrict v,
    float* restrict h, float* restrict spikes
) {
    const LIF lif = *given;
    for (int64_t k = 0; k < steps; k++, x += frame) {
        for (int64_t i = 0; i < n; i++) {
            const float potential = charge(&lif, v[i], x[i]);
            if (h) h[k * TILE + i] = potential;
            if (spikes) spikes[k * frame + i] = potential > lif.threshold ? 1.0f : 0.0f;
            v[i] = after(&lif, soft, potential);
        }
    }
}

static void steps(
    const Launch* launch, const LIF* lif, int64_t steps, int64_t n, const float* restrict x, int64_t frame,
    float* restrict v, float* restrict h, float* restrict spikes
) {
    if (launch->soft) {
        if (h) steps_with(1, lif, steps, n, x, frame, v, h, 0);
        else steps_with(1, lif, steps, n, x, frame, v, 0, spikes);
    } else {
        if (h) steps_with(0, lif, steps, n, x, frame, v, h, 0);
        else steps_with(0, lif, steps, n, x, frame, v, 0, spikes);
    }
}

// --- batch_norm.cu

KERNEL(batch_moments_partials) {
    const float* y = POINTER(0);
    const int64_t count = LONG(2), channels = INT(3);
    float* partials = POINTER(1) + block * 3 * channels;
    const Rows rows = rows_of_block(job->launch, block, count, channels);
    FOR_CHANNELS(channels) {
        float origin[TILE], sum[TILE], sum_of_squares[TILE];
        repeat(rows.begin < rows.end ? y + rows.begin * channels + channel : 0, 0.0f, width, &rows, origin);
        fill(sum, 0.0f, TILE);
        fill(sum_of_squares, 0.0f, TILE);
        FOR_TILES(rows, channels) {
            for (int64_t i = 0; i < n; i++) {
                const float deviation = y[at + i] - origin[i];
                sum[i] += deviation;
                sum_of_squares[i] += deviation * deviation;
            }
        }
        double sums[TILE], squares[TILE];
        fold(sum, width, &rows, sums);
        fold(sum_of_squares, width, &rows, squares);
        const double seen = (double)(rows.end - rows.begin);
        for (int64_t c = 0; c < width; c++) {
            const double mean = seen > 0.0 ? sums[c] / seen : 0.0;
            partials[channel + c] = (float)seen;
            partials[channels + channel + c] = (float)(origin[c] + mean);
            // As if taken about the mean that is stored, which is rounded.
            const double shift = (double)partials[channels + channel + c] - origin[c];
            partials[2 * channels + channel + c] = (float)(squares[c] - 2.0 * shift * sums[c] + seen * shift * shift);
        }
    }
}

typedef struct {
    double mean, variance, unbiased_variance;
} Moments;

INLINE Moments moments_of(const float* partials, int64_t blocks, int64_t channel, int64_t channels) {
    double count = 0.0, sum = 0.0, sum_of_squares = 0.0;
    for (int64_t block = 0; block < blocks; block++) {
        const float* partial = partials + block * 3 * channels + channel;
        const double n = partial[0], mean = partial[channels], squared_deviations = partial[2 * channels];
        count += n;
        sum += n * mean;
        sum_of_squares += squared_deviations + n * mean * mean;
    }
    const double mean = sum / count;
    double squared_deviations = sum_of_squares - count * mean * mean;
    if (squared_deviations < 0.0) squared_deviations = 0.0;  // rounding; NaN stays
    return (Moments){mean, squared_deviations / count, squared_deviations / (count - 1.0)};
}

void batch_moments_total(const Launch* launch, void** arguments) {
    const Job given = {launch, arguments, 0}, *job = &given;
    float* moments = POINTER(1);
    const int64_t channels = INT(3);
    for (int64_t c = 0; c < channels; c++) {
        const Moments of_channel = moments_of(POINTER(0), INT(2), c, channels);
        moments[c] = (float)of_channel.mean;
        moments[channels + c] = (float)of_channel.variance;
        moments[2 * channels + c] = (float)of_channel.unbiased_variance;
    }
}

void batch_statistics_total(const Launch* launch, void** arguments) {
    const Job given = {launch, arguments, 0}, *job = &given;
    float *mean = POINTER(1), *inverse_std = POINTER(2), *running_mean = POINTER(3), *running_var = POINTER(4);
    int64_t* batches = *(int64_t* const*)arguments[5];
    const float eps = FLOAT(6), momentum = FLOAT(7);
    const int64_t channels = INT(9);
    if (batches) *batches += 1;
    for (int64_t c = 0; c < channels; c++) {
        const Moments of_channel = moments_of(POINTER(0), INT(8), c, channels);
        mean[c] = (float)of_channel.mean;
        inverse_std[c] = 1.0f / sqrtf((float)of_channel.variance + eps);
        if (running_mean) running_mean[c] += momentum * (mean[c] - running_mean[c]);
        if (running_var) running_var[c] += momentum * ((float)of_channel.unbiased_variance - running_var[c]);
    }
}

void total_of_partials(const Launch* launch, void** arguments) {
    const Job given = {launch, arguments, 0}, *job = &given;
    const float* partials = POINTER(0);
    const int64_t blocks = INT(4), channels = INT(5), quantities = launch->quantities;
    float* totals = POINTER(3);
    for (int64_t quantity = 0; quantity < quantities; quantity++) {
        const float* factors = quantity == 1 ? POINTER(1) : quantity == 2 ? POINTER(2) : 0;
        for (int64_t c = 0; c < channels; c++) {
            double sum = 0.0;
            for (int64_t block = 0; block < blocks; block++) sum += partials[(block * quantities + quantity) * channels + c];
            totals[quantity * channels + c] = (float)(sum * (factors ? factors[c] : 1.0));
        }
    }
}

// --- norm_lif.cu

INLINE void norm_lif_tile(
    const int soft, const LIF* given, int64_t steps, int64_t n, const float* restrict y, int64_t frame,
    const Normalization* restrict norm, float* restrict spikes, float* restrict h
) {
    const LIF lif = *given;
    float v[TILE];
    fill(v, lif.v_reset, n);
    for (int64_t k = 0; k < steps; k++) {
        for (int64_t i = 0; i < n; i++) {
            const float potential = charge(&lif, v[i], normalized(norm, i, y[k * frame + i]));
            if (h) h[k * TILE + i] = potential;
            if (spikes) spikes[k * frame + i] = potential > lif.threshold ? 1.0f : 0.0f;
            v[i] = after(&lif, soft, potential);
        }
    }
}

KERNEL(norm_lif_forward) {
    const float* y = POINTER(0);
    const Norm norm_of = STRUCT(Norm, 1);
    const LIF lif = STRUCT(LIF, 2);
    float* spikes = POINTER(3);
    const int64_t count = LONG(4), channels = INT(5), frame = count * channels, steps = job->launch->steps;
    const Rows rows = rows_of_block(job->launch, block, count, channels);
    FOR_CHANNELS(channels) {
        Normalization norm;
        normalization(&norm_of, channel, width, &rows, &norm);
        FOR_TILES(rows, channels) {
            if (job->launch->soft) norm_lif_tile(1, &lif, steps, n, y + at, frame, &norm, spikes + at, 0);
            else norm_lif_tile(0, &lif, steps, n, y + at, frame, &norm, spikes + at, 0);
        }
    }
}

INLINE void potentials_of_normalized(
    const Launch* launch, const LIF* lif, int64_t n, const float* y, int64_t frame, const Normalization* norm, float* h
) {
    if (launch->soft) norm_lif_tile(1, lif, launch->steps, n, y, frame, norm, 0, h);
    else norm_lif_tile(0, lif, launch->steps, n, y, frame, norm, 0, h);
}

KERNEL(norm_lif_backward_sums) {
    const float *grad_spikes = POINTER(0), *y = POINTER(1);
    const Norm norm_of = STRUCT(Norm, 2);
    const LIF lif = STRUCT(LIF, 3);
    const int64_t count = LONG(5), channels = INT(6), frame = count * channels;
    float* partials = POINTER(4) + block * 2 * channels;
    const Rows rows = rows_of_block(job->launch, block, count, channels);
    const StepBack back = step_back_of(job->launch);
    FOR_CHANNELS(channels) {
        Normalization norm;
        normalization(&norm_of, channel, width, &rows, &norm);
        float sum[TILE], sum_of_products[TILE], h[MAX_STEPS * TILE], grad_v[TILE], grad[TILE];
        fill(sum, 0.0f, TILE);
        fill(sum_of_products, 0.0f, TILE);
        FOR_TILES(rows, channels) {
            potentials_of_normalized(job->launch, &lif, n, y + at, frame, &norm, h);
            fill(grad_v, 0.0f, n);
            for (int64_t k = job->launch->steps - 1; k >= 0; k--) {
                back(&lif, n, h + k * TILE, grad_spikes + k * frame + at, grad_v, grad);
                const float* y_k = y + k * frame + at;
                for (int64_t i = 0; i < n; i++) {
                    const float grad_x = lif.gain * grad[i];
                    sum[i] += grad_x;
                    sum_of_products[i] += grad_x * (y_k[i] - norm.mean[i]);
                }
            }
        }
        double of_channels[TILE];
        fold(sum, width, &rows, of_channels);
        for (int64_t c = 0; c < width; c++) partials[channel + c] = (float)of_channels[c];
        fold(sum_of_products, width, &rows, of_channels);
        for (int64_t c = 0; c < width; c++) partials[channels + channel + c] = (float)of_channels[c];
    }
}

KERNEL(norm_lif_backward_input) {
    const float *grad_spikes = POINTER(0), *y = POINTER(1);
    const Norm norm_of = STRUCT(Norm, 2);
    const LIF lif = STRUCT(LIF, 3);
    const float *sums = POINTER(4), inverse_count = FLOAT(5);
    float* grad_y = POINTER(6);
    const int64_t count = LONG(7), channels = INT(8), frame = count * channels;
    const Rows rows = rows_of_block(job->launch, block, count, channels);
    const StepBack back = step_back_of(job->launch);
    FOR_CHANNELS(channels) {
        Normalization norm;
        normalization(&norm_of, channel, width, &rows, &norm);
        NormalizationGradient norm_gradient;
        normalization_gradient(
            norm_of.weight, norm_of.mean, norm_of.inverse_std, sums, sums + channels, inverse_count, channel, width, &rows,
            &norm_gradient
        );
        float h[MAX_STEPS * TILE], grad_v[TILE], grad[TILE];
        FOR_TILES(rows, channels) {
            potentials_of_normalized(job->launch, &lif, n, y + at, frame, &norm, h);
            fill(grad_v, 0.0f, n);
            for (int64_t k = job->launch->steps - 1; k >= 0; k--) {
                back(&lif, n, h + k * TILE, grad_spikes + k * frame + at, grad_v, grad);
                const float* restrict y_k = y + k * frame + at;
                float* restrict grad_y_k = grad_y + k * frame + at;
                for (int64_t i = 0; i < n; i++) {
                    grad_y_k[i] = gradient_of_normalized(&norm_gradient, i, y_k[i], lif.gain * grad[i]);
                }
            }
        }
    }
}

// --- residual.cuh

// shortcut_norm: null for a shortcut that is added as it is.
INLINE void residual_sum(
    const Normalization* restrict norm, const Normalization* restrict shortcut_norm, int64_t n, const float* restrict y,
    const float* restrict shortcut, float* restrict membrane
) {
    if (shortcut_norm) {
        for (int64_t i = 0; i < n; i++) {
            membrane[i] = normalized(norm, i, y[i]) + normalized(shortcut_norm, i, shortcut[i]);
        }
    } else {
        for (int64_t i = 0; i < n; i++) membrane[i] = normalized(norm, i, y[i]) + shortcut[i];
    }
}

// shortcut: null where it is added as it is, which has no sum of its own.
INLINE void add_to_gradient_sums(
    float sums[3][TILE], int64_t n, const float* restrict grad, const float* restrict y, const float* restrict mean,
    const float* restrict shortcut, const float* restrict shortcut_mean
) {
    for (int64_t i = 0; i < n; i++) {
        sums[0][i] += grad[i];
        sums[1][i] += grad[i] * (y[i] - mean[i]);
    }
    for (int64_t i = 0; shortcut && i < n; i++) sums[2][i] += grad[i] * (shortcut[i] - shortcut_mean[i]);
}

INLINE void write_gradient_sums(
    float sums[3][TILE], int64_t quantities, int64_t channel, int64_t width, const Rows* rows, float* partials,
    int64_t channels
) {
    for (int64_t quantity = 0; quantity < quantities; quantity++) {
        double of_channels[TILE];
        fold(sums[quantity], width, rows, of_channels);
        for (int64_t c = 0; c < width; c++) partials[quantity * channels + channel + c] = (float)of_channels[c];
    }
}

// --- residual_lif.cu

KERNEL(residual_lif_forward) {
    const float *y = POINTER(0), *shortcut = POINTER(2);
    const Norm norm_of = STRUCT(Norm, 1), shortcut_norm_of = STRUCT(Norm, 3);
    const LIF lif = STRUCT(LIF, 4);
    float *membrane = POINTER(5), *spikes = POINTER(6);
    const int64_t count = LONG(7), channels = INT(8), frame = count * channels;
    const Rows rows = rows_of_block(job->launch, block, count, channels);
    FOR_CHANNELS(channels) {
        Normalization norm, of_shortcut, *shortcut_norm = job->launch->norm_shortcut ? &of_shortcut : 0;
        normalization(&norm_of, channel, width, &rows, &norm);
        if (shortcut_norm) normalization(&shortcut_norm_of, channel, width, &rows, shortcut_norm);
        float v[TILE];
        FOR_TILES(rows, channels) {
            fill(v, lif.v_reset, n);
            for (int64_t k = 0; k < job->launch->steps; k++) {
                const int64_t here = k * frame + at;
                residual_sum(&norm, shortcut_norm, n, y + here, shortcut + here, membrane + here);
                if (job->launch->with_spikes) steps(job->launch, &lif, 1, n, membrane + here, frame, v, 0, spikes + here);
            }
        }
    }
}

KERNEL(residual_lif_backward_sums) {
    const float *grad_membrane = POINTER(0), *grad_spikes = POINTER(1), *membrane = POINTER(2), *y = POINTER(3);
    const float *mean_of = POINTER(4), *shortcut = POINTER(5), *shortcut_mean_of = POINTER(6);
    const LIF lif = STRUCT(LIF, 7);
    float* grad = POINTER(8);
    const int64_t count = LONG(10), channels = INT(11), frame = count * channels, quantities = shortcut ? 3 : 2;
    float* partials = POINTER(9) + block * quantities * channels;
    const Rows rows = rows_of_block(job->launch, block, count, channels);
    const StepBack back = step_back_of(job->launch);
    FOR_CHANNELS(channels) {
        float mean[TILE], shortcut_mean[TILE], sums[3][TILE];
        float h[MAX_STEPS * TILE], v[TILE], grad_v[TILE], grad_h[TILE];
        repeat(mean_of + channel, 0.0f, width, &rows, mean);
        repeat(shortcut ? shortcut_mean_of + channel : 0, 0.0f, width, &rows, shortcut_mean);
        fill(sums[0], 0.0f, 3 * TILE);
        FOR_TILES(rows, channels) {
            if (grad_spikes) {
                fill(v, lif.v_reset, n);
                steps(job->launch, &lif, job->launch->steps, n, membrane + at, frame, v, h, 0);
            }
            fill(grad_v, 0.0f, n);
            fill(grad_h, 0.0f, n);
            for (int64_t k = job->launch->steps - 1; k >= 0; k--) {
                const int64_t here = k * frame + at;
                if (grad_spikes) back(&lif, n, h + k * TILE, grad_spikes + here, grad_v, grad_h);
                const float* restrict direct = grad_membrane + here;
                float* restrict grad_k = grad + here;
                for (int64_t i = 0; i < n; i++) grad_k[i] = lif.gain * grad_h[i] + direct[i];
                add_to_gradient_sums(sums, n, grad_k, y + here, mean, shortcut ? shortcut + here : 0, shortcut_mean);
            }
        }
        write_gradient_sums(sums, quantities, channel, width, &rows, partials, channels);
    }
}

INLINE void input_gradient(
    const NormalizationGradient* restrict norm, int64_t n, const float* restrict y, const float* restrict grad,
    float* restrict grad_y
) {
    for (int64_t i = 0; i < n; i++) grad_y[i] = gradient_of_normalized(norm, i, y[i], grad[i]);
}

KERNEL(residual_lif_backward_inputs) {
    const float *grad = POINTER(0), *y = POINTER(1), *weight = POINTER(2), *mean = POINTER(3), *inverse_std = POINTER(4);
    const float *shortcut = POINTER(5), *shortcut_weight = POINTER(6), *shortcut_mean = POINTER(7);
    const float *shortcut_inverse_std = POINTER(8), *sums = POINTER(9), inverse_count = FLOAT(10);
    float *grad_y = POINTER(11), *grad_shortcut = POINTER(12);
    const int64_t count = LONG(13) * job->launch->steps, channels = INT(14);
    const Rows rows = rows_of_block(job->launch, block, count, channels);
    FOR_CHANNELS(channels) {
        NormalizationGradient norm, shortcut_norm;
        normalization_gradient(
            weight, mean, inverse_std, sums, sums + channels, inverse_count, channel, width, &rows, &norm
        );
        if (shortcut) {
            normalization_gradient(
                shortcut_weight, shortcut_mean, shortcut_inverse_std, sums, sums + 2 * channels, inverse_count, channel,
                width, &rows, &shortcut_norm
            );
        }
        FOR_TILES(rows, channels) {
            input_gradient(&norm, n, y + at, grad + at, grad_y + at);
            if (shortcut) input_gradient(&shortcut_norm, n, shortcut + at, grad + at, grad_shortcut + at);
        }
    }
}

// --- residual_lif_pool.cu

KERNEL(residual_lif_pool_forward) {
    const float *y = POINTER(0), *shortcut = POINTER(2);
    const Norm norm_of = STRUCT(Norm, 1), shortcut_norm_of = STRUCT(Norm, 3);
    const LIF lif = STRUCT(LIF, 4);
    float* pooled = POINTER(5);
    const int64_t images = LONG(6), pixels = INT(7), channels = INT(8), frame = images * pixels * channels;
    const Rows rows = {block * pixels, (block + 1) * pixels, channels < TILE ? TILE / channels : 1};
    FOR_CHANNELS(channels) {
        Normalization norm, of_shortcut, *shortcut_norm = job->launch->norm_shortcut ? &of_shortcut : 0;
        normalization(&norm_of, channel, width, &rows, &norm);
        if (shortcut_norm) normalization(&shortcut_norm_of, channel, width, &rows, shortcut_norm);
        float membrane[TILE], v[TILE], spikes[TILE], counts[MAX_STEPS][TILE];
        fill(counts[0], 0.0f, MAX_STEPS * TILE);
        FOR_TILES(rows, channels) {
            fill(v, lif.v_reset, n);
            for (int64_t k = 0; k < job->launch->steps; k++) {
                residual_sum(&norm, shortcut_norm, n, y + k * frame + at, shortcut + k * frame + at, membrane);
                steps(job->launch, &lif, 1, n, membrane, 0, v, 0, spikes);
                for (int64_t i = 0; i < n; i++) counts[k][i] += spikes[i];
            }
        }
        for (int64_t k = 0; k < job->launch->steps; k++) {
            double of_channels[TILE];
            fold(counts[k], width, &rows, of_channels);
            float* rates = pooled + (k * images + block) * channels + channel;
            for (int64_t c = 0; c < width; c++) rates[c] = (float)of_channels[c] / (float)pixels;
        }
    }
}

KERNEL(residual_lif_pool_backward_sums) {
    const float *grad_pooled = POINTER(0), *y = POINTER(1), *shortcut = POINTER(3);
    const Norm norm_of = STRUCT(Norm, 2), shortcut_norm_of = STRUCT(Norm, 4);
    const LIF lif = STRUCT(LIF, 5);
    float* grad = POINTER(6);
    const int64_t images = LONG(8), pixels = INT(9), channels = INT(10), frame = images * pixels * channels;
    const int64_t quantities = job->launch->norm_shortcut ? 3 : 2;
    float* partials = POINTER(7) + block * quantities * channels;
    const float share = 1.0f / (float)pixels;
    const Rows rows = rows_of_block(job->launch, block, images * pixels, channels);
    const StepBack back = step_back_of(job->launch);
    FOR_CHANNELS(channels) {
        Normalization norm, of_shortcut, *shortcut_norm = job->launch->norm_shortcut ? &of_shortcut : 0;
        normalization(&norm_of, channel, width, &rows, &norm);
        if (shortcut_norm) normalization(&shortcut_norm_of, channel, width, &rows, shortcut_norm);
        float membrane[TILE], h[MAX_STEPS * TILE], v[TILE], grad_spikes[TILE], grad_v[TILE], grad_h[TILE], sums[3][TILE];
        fill(sums[0], 0.0f, 3 * TILE);
        FOR_TILES(rows, channels) {
            fill(v, lif.v_reset, n);
            for (int64_t k = 0; k < job->launch->steps; k++) {
                residual_sum(&norm, shortcut_norm, n, y + k * frame + at, shortcut + k * frame + at, membrane);
                steps(job->launch, &lif, 1, n, membrane, 0, v, h + k * TILE, 0);
            }
            fill(grad_v, 0.0f, n);
            for (int64_t k = job->launch->steps - 1; k >= 0; k--) {
                const int64_t here = k * frame + at;
                for (int64_t r = 0; r * width < n; r++) {
                    const float* of_image = grad_pooled + (k * images + (row + r) / pixels) * channels + channel;
                    for (int64_t c = 0; c < width; c++) grad_spikes[r * width + c] = of_image[c] * share;
                }
                back(&lif, n, h + k * TILE, grad_spikes, grad_v, grad_h);
                float* restrict grad_k = grad + here;
                for (int64_t i = 0; i < n; i++) grad_k[i] = lif.gain * grad_h[i];
                add_to_gradient_sums(
                    sums, n, grad_k, y + here, norm.mean, shortcut_norm ? shortcut + here : 0, of_shortcut.mean
                );
            }
        }
        write_gradient_sums(sums, quantities, channel, width, &rows, partials, channels);
    }
}

// --- gate_lif.cu

// Values of an image that a block has.
typedef struct {
    int64_t image, begin, end;
} Span;

INLINE Span span_of_block(int64_t block, int64_t image_size, int64_t blocks_per_image) {
    const int64_t share = parts(parts(image_size, blocks_per_image), TILE) * TILE, begin = block % blocks_per_image * share;
    return (Span){block / blocks_per_image, least(begin, image_size), least(begin + share, image_size)};
}

// The encoder's potentials h of n values, TILE apart.
INLINE void encode(const Launch* launch, const LIF* lif, int64_t n, const float* x, float* h) {
    float v[TILE];
    fill(v, lif->v_reset, n);
    steps(launch, lif, launch->steps, n, x, 0, v, h, 0);
}

INLINE void gated(const LIF* lif, float temporal, int64_t n, const float* restrict h, const float* restrict spatial,
                  float* restrict membrane) {
    const float threshold = lif->threshold;
    for (int64_t i = 0; i < n; i++) membrane[i] = h[i] > threshold ? sigmoid(temporal * spatial[i]) : 0.0f;
}

KERNEL(gate_lif_forward) {
    const float *x = POINTER(0), *temporal = POINTER(1), *spatial = POINTER(2);
    const LIF lif = STRUCT(LIF, 3);
    float *membrane = POINTER(4), *spikes = POINTER(5);
    const int64_t images = LONG(6), image_size = LONG(7), frame = images * image_size;
    const Span span = span_of_block(block, image_size, INT(8));
    float h[MAX_STEPS * TILE], v[TILE];
    for (int64_t first = span.begin; first < span.end; first += TILE) {
        const int64_t n = least(TILE, span.end - first), at = span.image * image_size + first;
        encode(job->launch, &lif, n, x + at, h);
        fill(v, lif.v_reset, n);
        for (int64_t k = 0; k < job->launch->steps; k++) {
            float* membrane_k = membrane + k * frame + at;
            gated(&lif, temporal[k * images + span.image], n, h + k * TILE, spatial + at, membrane_k);
            steps(job->launch, &lif, 1, n, membrane_k, frame, v, 0, spikes + k * frame + at);
        }
    }
}

KERNEL(gate_lif_backward) {
    const float *grad_membrane = POINTER(0), *grad_spikes = POINTER(1), *x = POINTER(2), *temporal = POINTER(3);
    const float* spatial = POINTER(4);
    const LIF lif = STRUCT(LIF, 5);
    float *grad_x = POINTER(6), *grad_spatial = POINTER(8);
    const int64_t images = LONG(9), image_size = LONG(10), blocks_per_image = INT(11), frame = images * image_size;
    const int64_t steps_of_net = job->launch->steps;
    float* partials = POINTER(7) + block % blocks_per_image * steps_of_net * images;
    const Span span = span_of_block(block, image_size, blocks_per_image);
    const StepBack back = step_back_of(job->launch);
    float h[MAX_STEPS * TILE], membrane[MAX_STEPS * TILE], inner[MAX_STEPS * TILE], v[TILE];
    float grad_v[TILE], grad_inner_v[TILE], grad[TILE], grad_gate[TILE], grad_h[TILE];
    double grad_temporal[MAX_STEPS] = {0.0};
    for (int64_t first = span.begin; first < span.end; first += TILE) {
        const int64_t n = least(TILE, span.end - first), at = span.image * image_size + first;
        const float* restrict spatial_here = spatial + at;
        encode(job->launch, &lif, n, x + at, h);
        for (int64_t k = 0; k < steps_of_net; k++) {
            gated(&lif, temporal[k * images + span.image], n, h + k * TILE, spatial_here, membrane + k * TILE);
        }
        fill(v, lif.v_reset, n);
        steps(job->launch, &lif, steps_of_net, n, membrane, TILE, v, inner, 0);
        fill(grad_v, 0.0f, n);
        fill(grad_inner_v, 0.0f, n);
        fill(grad_x + at, 0.0f, n);
        fill(grad_spatial + at, 0.0f, n);
        for (int64_t k = steps_of_net - 1; k >= 0; k--) {
            const float a = temporal[k * images + span.image];
            const float* h_k = h + k * TILE;
            const float* restrict direct = grad_membrane + k * frame + at;
            back(&lif, n, inner + k * TILE, grad_spikes + k * frame + at, grad_inner_v, grad);
            for (int64_t i = 0; i < n; i++) grad[i] = lif.gain * grad[i] + direct[i];
            float with_scores[TILE];
            for (int64_t i = 0; i < n; i++) {
                const float gate = sigmoid(a * spatial_here[i]);
                const float grad_score = h_k[i] > lif.threshold ? grad[i] * gate * (1.0f - gate) : 0.0f;
                grad_spatial[at + i] += a * grad_score;
                with_scores[i] = spatial_here[i] * grad_score;
                grad_gate[i] = grad[i] * gate;
            }
            for (int64_t i = 0; i < n; i++) grad_temporal[k] += with_scores[i];
            back(&lif, n, h_k, grad_gate, grad_v, grad_h);
            for (int64_t i = 0; i < n; i++) grad_x[at + i] += lif.gain * grad_h[i];
        }
    }
    for (int64_t k = 0; k < steps_of_net; k++) partials[k * images + span.image] = (float)grad_temporal[k];
}

// --- lif.cu: any number of time steps

#define FOR_NEURONS(frame)                                                                         \
    const int64_t share = parts(frame, job->launch->blocks), until = least((block + 1) * share, frame); \
    for (int64_t at = block * share, n; at < until && (n = least(TILE, until - at)); at += TILE)

KERNEL(lif_forward) {
    const float *x = POINTER(0), *v_init = POINTER(1), v_start = FLOAT(2);
    const LIF lif = STRUCT(LIF, 3);
    float *spikes = POINTER(4), *v_final = POINTER(5), v[TILE];
    const int64_t frame = LONG(6);
    FOR_NEURONS(frame) {
        begin(v_init, v_start, at, n, v);
        steps(job->launch, &lif, INT(7), n, x + at, frame, v, 0, spikes + at);
        if (v_final) memcpy(v_final + at, v, n * sizeof(float));
    }
}

KERNEL(lif_backward) {
    const float *grad_spikes = POINTER(0), *grad_v_final = POINTER(1), *x = POINTER(2), *v_init = POINTER(3);
    const float v_start = FLOAT(4);
    const LIF lif = STRUCT(LIF, 5);
    float *grad_x = POINTER(6), *grad_v_init = POINTER(7), *v_boundary = POINTER(8);
    const int64_t frame = LONG(9), all_steps = INT(10);
    const StepBack back = step_back_of(job->launch);
    float v[TILE], grad_v[TILE], grad_h[TILE], h[MAX_STEPS * TILE];
    FOR_NEURONS(frame) {
        begin(v_init, v_start, at, n, v);
        for (int64_t k = 0; k + MAX_STEPS < all_steps; k += MAX_STEPS) {
            steps(job->launch, &lif, MAX_STEPS, n, x + k * frame + at, frame, v, h, 0);
            memcpy(v_boundary + k / MAX_STEPS * frame + at, v, n * sizeof(float));
        }
        begin(grad_v_final, 0.0f, at, n, grad_v);
        for (int64_t end = all_steps, first; end > 0; end = first) {
            first = (end - 1) / MAX_STEPS * MAX_STEPS;
            if (first > 0) begin(v_boundary + (first / MAX_STEPS - 1) * frame, 0.0f, at, n, v);
            else begin(v_init, v_start, at, n, v);
            steps(job->launch, &lif, end - first, n, x + first * frame + at, frame, v, h, 0);
            for (int64_t k = end - 1; k >= first; k--) {
                back(&lif, n, h + (k - first) * TILE, grad_spikes ? grad_spikes + k * frame + at : 0, grad_v, grad_h);
                for (int64_t i = 0; grad_x && i < n; i++) grad_x[k * frame + at + i] = lif.gain * grad_h[i];
            }
        }
        if (grad_v_init) memcpy(grad_v_init + at, grad_v, n * sizeof(float));
    }
}
