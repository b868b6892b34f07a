/* CPU kernels: one pass over each tensor that decodes its stored moments, applies the rule, and encodes them again.
 *
 * The specification is the PyTorch twins in codecs.py, blockwise.py and rules.py. No torch headers: mango/native.py
 * compiles this in a second, with the C compiler of the machine, and calls it through ctypes. Work is cut into
 * blocks of 256 entries that stay in the first-level cache; sums are taken per chunk and added in order, so that results
 * do not depend on the number of threads.
 */
#include <stdlib.h>

#include "native_formats.h"

#define CHUNK 65536                       /* entries that one thread takes at a time */
#define SLABS 16                          /* pieces in which row and column sums of one large matrix are taken */
#define AHEAD 4                           /* blocks that memory is asked for in advance where the second moment is factored */
#define FAR 4096                          /* entries of a gradient whose sum of squares is taken beside other work that are asked for in advance */
#define LIMIT 10.0f                       /* rules.UPDATE_LIMIT */

enum { ADAMW, ADAM, SGD, LION };

typedef struct {
    int64_t numel, columns;
    void *param, *grad, *correction;
    void *m_codes, *m_scale, *m_low;
    void *v_codes, *v_scale, *v_low;      /* factored: rows, columns, unused */
    float *sample_mean, *sample_square, *sample_previous, *cosine;
    int64_t sample_stride, sample_count;
    double lr, beta1, beta2, eps, weight_decay, correction1, correction2, scale, window;
    double grad_sq, moved_sq, param_sq, momentum_sq, momentum_grad;      /* results */
    int32_t rule, param_type, grad_type, m_format, v_format, correction_bits, measure, unused;
    uint32_t key, m_chance, v_chance, finite;
} Job;

int64_t job_bytes(void) { return sizeof(Job); }

/* ---- whole tensors, for what is decoded or encoded outside an update ---- */
#define FOR_BLOCKS(n) _Pragma("omp parallel for schedule(static) num_threads(threads) if (n > CHUNK)") \
    for (int64_t at = 0; at < n; at += BLOCK)

void decode_tensor(int format, const void *codes, const void *scale, const void *low, int64_t n, float *out, int threads) {
    FOR_BLOCKS(n) {
        ALIGNED float x[BLOCK];
        int64_t entries = n - at < BLOCK ? n - at : BLOCK;
        decode(format, codes, scale, low, at, entries, x);
        memcpy(out + at, x, (size_t)entries * 4);
    }
}

void encode_tensor(int format, void *codes, void *scale, void *low, int64_t n, const float *in, uint32_t key, uint32_t chance, int threads) {
    FOR_BLOCKS(n) {
        ALIGNED float x[BLOCK];
        int64_t entries = n - at < BLOCK ? n - at : BLOCK;
        memcpy(x, in + at, (size_t)entries * 4);
        if (entries < BLOCK) memset(x + entries, 0, (size_t)(BLOCK - entries) * 4);
        encode(format, codes, scale, low, at, entries, x, key, chance);
    }
}

/* ---- one update ---- */
static void load(const void *source, int type, int64_t start, int64_t entries, float *out) {
    decode(type, source, 0, 0, start, entries, out);
}

static void load_gradient(const Job *job, int64_t start, int64_t entries, float *g) {
    load(job->grad, job->grad_type, start, entries, g);
    float scale = (float)job->scale;
    if (scale != 1.0f) { SIMD for (int j = 0; j < BLOCK; j++) g[j] *= scale; }
}

static void load_param(const Job *job, int64_t start, int64_t entries, float *p) {
    load(job->param, job->param_type, start, entries, p);
    if (job->param_type == FLOAT32) return;
    if (job->correction_bits == 16) {                                     /* float32 = bfloat16 bits << 16, plus the correction */
        const int16_t *x = (const int16_t *)job->correction + start;
        SIMD for (int64_t j = 0; j < entries; j++) p[j] = bits_float(float_bits(p[j]) + (uint32_t)(int32_t)x[j]);
    } else if (job->correction_bits == 8) {
        const int8_t *x = (const int8_t *)job->correction + start;
        SIMD for (int64_t j = 0; j < entries; j++) p[j] = bits_float(float_bits(p[j]) + (uint32_t)((int32_t)x[j] * 256));
    }
}

static void store_param(const Job *job, int64_t start, int64_t entries, const float *p) {
    if (job->param_type == FLOAT32) {
        memcpy((float *)job->param + start, p, (size_t)entries * 4);
    } else if (!job->correction_bits) {
        encode(BFLOAT16, job->param, 0, 0, start, entries, p, mix(job->key + 3), 1);
    } else {
        uint16_t *out = (uint16_t *)job->param + start;
        for (int64_t j = 0; j < entries; j++) {
            uint32_t whole = float_bits(p[j]);
            out[j] = (uint16_t)((whole + 0x8000u) >> 16);                 /* halves away from zero: every rest fits into 16 bits */
            int32_t rest = (int32_t)(whole - ((uint32_t)out[j] << 16));
            if (job->correction_bits == 16) {
                ((int16_t *)job->correction)[start + j] = (int16_t)rest;
            } else {
                int32_t byte = (rest + 128) >> 8;
                ((int8_t *)job->correction)[start + j] = (int8_t)(byte > 127 ? 127 : byte);
            }
        }
    }
}

#include "native_adam.h"

typedef struct { float rows_mean; double moved_sq, param_sq, momentum_sq, momentum_grad; } Part;

static void factored_variance(const Job *job, int64_t start, int64_t entries, float rows_mean, const float *g, float *v) {
    const float *row = job->v_codes, *column = job->v_scale;
    float decay = (float)job->beta2, fresh = (float)(1.0 - job->beta2);
    for (int64_t at = 0; at < entries;) {
        int64_t r = (start + at) / job->columns, c = (start + at) % job->columns;
        int64_t stop = at + job->columns - c < entries ? at + job->columns - c : entries;
        float share = decay * (row[r] / rows_mean);
        SIMD for (int64_t j = at; j < stop; j++) v[j] = share * column[c + j - at] + fresh * g[j] * g[j];
        at = stop;
    }
    for (int64_t j = entries; j < BLOCK; j++) v[j] = 0;
}

/* Bring the entries that come AHEAD blocks later towards the cache. Measured: it gains 5 % between factors, and costs as much
 * elsewhere, where the hardware's own guess is better and the requests are in its way. */
static inline void fetch(const void *array, int64_t bits, int64_t at) {
    const char *from = (const char *)array + at * bits / 8;
    for (int64_t byte = 0; byte < BLOCK * bits / 8; byte += 64) __builtin_prefetch(from + byte, 0, 2);
}

/* sum of squares of a block, the same wherever it is taken */
static double squares(const float *g, int64_t entries) {
    ALIGNED float lanes[64];
    float sum = 0;
    if (entries < BLOCK) {
        for (int64_t j = 0; j < entries; j++) sum += g[j] * g[j];
        return sum;
    }
    SIMD for (int j = 0; j < 64; j++) lanes[j] = g[j] * g[j] + g[j + 64] * g[j + 64] + (g[j + 128] * g[j + 128] + g[j + 192] * g[j + 192]);
    _Pragma("omp simd reduction(+ : sum)") for (int j = 0; j < 64; j++) sum += lanes[j];
    return sum;
}

/* The sums of squares of one thread's part of a gradient, taken block by block beside other work: reading them alone would
 * wait for memory. `per`: blocks at a time. */
typedef struct { const float *g; double *totals; int64_t at, stop, end, per; } Ahead;

static inline void look_ahead(Ahead *a) {
    for (int64_t i = 0; i < a->per && a->at < a->stop; i++, a->at += BLOCK) {
        for (int line = 0; line < BLOCK; line += 16) __builtin_prefetch(a->g + a->at + FAR + line, 0, 2);
        a->totals[a->at / CHUNK] += squares(a->g + a->at, a->end - a->at < BLOCK ? a->end - a->at : BLOCK);
    }
}

static void update_range(const Job *job, int64_t start, int64_t stop, Part *part, Ahead *ahead) {
    const float lr = (float)job->lr, coupled = (float)job->weight_decay;
    const float fresh1 = (float)(1.0 - job->beta1), beta1 = (float)job->beta1, beta2 = (float)job->beta2;
    const float fresh2 = (float)(1.0 - job->beta2);
    const int adam = job->rule == ADAMW || job->rule == ADAM, decoupled = job->rule == ADAMW || job->rule == LION;
    const float decay = decoupled ? (float)(1.0 - job->lr * job->weight_decay) : 1.0f;
    const Adam rule = {beta2, fresh1, fresh2, (float)sqrt(job->correction2), (float)(1.0 / sqrt(job->correction2)),
                       (float)job->eps, lr, (float)(-job->lr / job->correction1), job->v_format != FACTORED};
    const int exact = job->m_format == FLOAT32 && job->v_format == FLOAT32;
#ifdef __AVX512F__
    const int v_fits = job->v_format == FACTORED || (job->v_format == UNSIGNED8 && job->v_chance && job->m_format == SIGNED8);
    const int m_fits = (job->m_format == SIGNED8 && !job->m_chance) || (job->m_format == NF4 && job->m_chance);
    const int registers = adam && m_fits && v_fits && !job->measure && lr > 1e-20f;
#endif
    ALIGNED float buffers[5][BLOCK];
    for (int64_t at = start; at < stop; at += BLOCK) {
        int64_t entries = stop - at < BLOCK ? stop - at : BLOCK;
        look_ahead(ahead);
        if (job->v_format == FACTORED && at + AHEAD * BLOCK + BLOCK <= stop) {
            fetch(job->grad, WIDTH[job->grad_type], at + AHEAD * BLOCK);
            fetch(job->param, WIDTH[job->param_type], at + AHEAD * BLOCK);
            fetch(job->m_codes, WIDTH[job->m_format], at + AHEAD * BLOCK);
        }
        const int whole = entries == BLOCK;                              /* float32 is worked on where it lies */
        float *g = buffers[0], *q = buffers[4];
        float *p = whole && job->param_type == FLOAT32 ? (float *)job->param + at : buffers[1];
        float *m = whole && job->m_format == FLOAT32 ? (float *)job->m_codes + at : buffers[2];
        float *v = whole && job->v_format == FLOAT32 ? (float *)job->v_codes + at : buffers[3];
        if (whole && job->grad_type == FLOAT32 && job->scale == 1.0 && (decoupled || coupled == 0)) g = (float *)job->grad + at;
        else load_gradient(job, at, entries, g);
        if (p == buffers[1]) load_param(job, at, entries, p);
#ifdef __AVX512F__
        if (registers && whole && (job->v_format == FACTORED || ((const float *)job->v_scale)[at / 256] < 0x1p90f)) {
            if (coupled != 0 && !decoupled) { SIMD for (int j = 0; j < BLOCK; j++) g[j] += coupled * p[j]; }
            if (job->v_format == FACTORED) factored_variance(job, at, BLOCK, part->rows_mean, g, v);
            if (job->m_format == NF4) adam_registers(NF4, &rule, job, at, decay, g, p, v);
            else if (job->v_format == FACTORED) adam_registers(SIGNED8, &rule, job, at, decay, g, p, v);
            else adam_registers(SIGNED8, &rule, job, at, decay, g, p, 0);
            if (p == buffers[1]) store_param(job, at, entries, p);
            continue;
        }
#endif
        if (job->measure) memcpy(q, p, BLOCK * sizeof(float));
        if (decay != 1) { SIMD for (int j = 0; j < BLOCK; j++) p[j] *= decay; }
        if (coupled != 0 && !decoupled) { SIMD for (int j = 0; j < BLOCK; j++) g[j] += coupled * p[j]; }
        if (m == buffers[2]) decode(job->m_format, job->m_codes, job->m_scale, job->m_low, at, entries, m);
        if (adam) {
            if (job->v_format == FACTORED) {
                factored_variance(job, at, entries, part->rows_mean, g, v);
            } else if (v == buffers[3]) {
                decode(job->v_format, job->v_codes, job->v_scale, job->v_low, at, entries, v);
            }
            if (exact) adam_exact(&rule, g, m, v, p);
            else adam_block(&rule, g, m, v, p);
            if (job->v_format != FACTORED && v == buffers[3])
                encode(job->v_format, job->v_codes, job->v_scale, job->v_low, at, entries, v, mix(job->key + 2), job->v_chance);
        } else if (job->rule == SGD) {
            SIMD for (int j = 0; j < BLOCK; j++) { m[j] = beta1 * m[j] + g[j]; p[j] -= lr * m[j]; }
        } else {
            SIMD for (int j = 0; j < BLOCK; j++) {
                float c = beta1 * m[j] + fresh1 * g[j];
                p[j] -= lr * (float)((c > 0) - (c < 0));
                m[j] = beta2 * m[j] + fresh2 * g[j];
            }
        }
        if (job->measure) {
            float moved = 0, size = 0, mm = 0, mg = 0;
            if (!whole) for (int64_t j = entries; j < BLOCK; j++) p[j] = q[j] = 0;
            _Pragma("omp simd reduction(+ : moved, size, mm, mg)") for (int j = 0; j < BLOCK; j++) {
                moved += (p[j] - q[j]) * (p[j] - q[j]); size += p[j] * p[j]; mm += m[j] * m[j]; mg += m[j] * g[j];
            }
            part->moved_sq += moved; part->param_sq += size; part->momentum_sq += mm; part->momentum_grad += mg;
        }
        if (p == buffers[1]) store_param(job, at, entries, p);
        if (m == buffers[2]) encode(job->m_format, job->m_codes, job->m_scale, job->m_low, at, entries, m, mix(job->key + 1), job->m_chance);
    }
}

/* sum of squares of entries start .. stop of the gradient; with `columns` also by row and by column, coupled weight decay in it */
static double square_sums(const Job *job, int64_t start, int64_t stop, float *rows, float *columns) {
    ALIGNED float g[BLOCK], p[BLOCK];
    const float coupled = columns && job->rule == ADAM ? (float)job->weight_decay : 0.0f;
    double total = 0;
    for (int64_t at = start; at < stop; at += BLOCK) {
        int64_t entries = stop - at < BLOCK ? stop - at : BLOCK;
        load_gradient(job, at, entries, g);
        if (!columns || coupled != 0) total += squares(g, BLOCK);
        if (!columns) continue;
        if (coupled != 0) {
            load_param(job, at, entries, p);
            SIMD for (int j = 0; j < BLOCK; j++) g[j] += coupled * p[j];
        }
        for (int64_t from = 0; from < entries;) {
            int64_t r = (at + from) / job->columns, c = (at + from) % job->columns;
            int64_t to = from + job->columns - c < entries ? from + job->columns - c : entries;
            float *into = columns + c - from, sum = 0;
            _Pragma("omp simd reduction(+ : sum)") for (int64_t j = from; j < to; j++) { float s = g[j] * g[j]; sum += s; into[j] += s; }
            rows[r] += sum;
            if (coupled == 0) total += sum;
            from = to;
        }
    }
    return total;
}

static void samples(Job *job) {
    /* streaming mean and variance of the sampled entries (Welford 1962), and the cosine with the gradient before */
    double dot = 0, one = 0, other = 0;
    const float inverse = (float)(1.0 / job->window);
    for (int64_t k = 0; k < job->sample_count; k++) {
        int64_t at = k * job->sample_stride;
        float x = (job->grad_type == FLOAT32 ? ((const float *)job->grad)[at] : bf16_float(((const uint16_t *)job->grad)[at]));
        float before = job->sample_previous[k], delta = x - job->sample_mean[k];
        job->sample_mean[k] += delta * inverse;
        job->sample_square[k] += delta * (x - job->sample_mean[k]);
        job->sample_previous[k] = x;
        dot += (double)x * before; one += (double)x * x; other += (double)before * before;
    }
    if (one > 0 && other > 0) *job->cosine += (float)(dot / (sqrt(one) * sqrt(other)));
}

static void finish_factors(Job *job, const float *rows, const float *columns, int64_t row_count) {
    float *row = job->v_codes, *column = job->v_scale;
    const float beta2 = (float)job->beta2, fresh_row = (float)((1.0 - job->beta2) / (double)job->columns);
    const float fresh_column = (float)((1.0 - job->beta2) / (double)row_count);
    SIMD for (int64_t r = 0; r < row_count; r++) row[r] = beta2 * row[r] + fresh_row * rows[r];
    SIMD for (int64_t c = 0; c < job->columns; c++) column[c] = beta2 * column[c] + fresh_column * columns[c];
}

static float rows_mean(const Job *job, int64_t row_count) {
    double sum = 0;
    for (int64_t r = 0; r < row_count; r++) sum += ((const float *)job->v_codes)[r];
    float mean = (float)(sum / (double)row_count);
    return mean > 0 ? mean : 1.0f;
}

/* Whether the gradient's sum of squares is all that must be known of it before the update, and can be read as it lies. */
static int simple(const Job *job) { return job->v_format != FACTORED && job->grad_type == FLOAT32 && fabs(job->scale) == 1.0; }

static int64_t chunks_of(const Job *job) { return (job->numel + CHUNK - 1) / CHUNK; }

/* The chunks from where one of so many threads works, of a tensor with that many. */
static int64_t first_of(int64_t chunks, int thread, int threads) { return chunks * thread / threads; }

static Ahead ahead_of(const Job *job, double *totals, int thread, int threads) {
    const int64_t chunks = chunks_of(job), end = job->numel, stop = first_of(chunks, thread + 1, threads) * CHUNK;
    return (Ahead){job->grad, totals, first_of(chunks, thread, threads) * CHUNK, stop < end ? stop : end, end, INT64_MAX};
}

/* The update of one tensor. `known`: sums of squares of its gradient by chunk, where they were taken before; freed here. Those
 * of `next`, the tensor after it, are taken on the way and returned. Every thread takes sums from its first chunk to its last
 * and updates from its last to its first, which so finds in its cache the gradients it read last. */
static double *whole_job(Job *job, double *known, const Job *next, int threads) {
    const int64_t n = job->numel, factored = job->v_format == FACTORED, chunks = chunks_of(job);
    const int64_t row_count = factored ? n / job->columns : 0;
    int64_t slabs = chunks;
    if (factored && slabs > SLABS) slabs = SLABS;
    if (factored && slabs > row_count) slabs = row_count;
    const int64_t slab = factored ? (row_count + slabs - 1) / slabs * job->columns : CHUNK;
    float *sums = factored ? calloc((size_t)(row_count + slabs * job->columns), 4) : 0;
    double *totals = known ? known : calloc((size_t)slabs, sizeof(double));
    double *following = next ? calloc((size_t)chunks_of(next), sizeof(double)) : 0;
    Part *parts = calloc((size_t)chunks, sizeof(Part));
    const int failed = !parts || !totals || (factored && !sums) || (next && !following);
    if (chunks == 1 || threads < 1) threads = 1;
    if (failed) goto end;
    if (!known) {
        _Pragma("omp parallel for schedule(static, 1) num_threads(threads) if (threads > 1)")
        for (int t = 0; t < threads; t++) {
            Ahead own = ahead_of(job, totals, t, threads);
            if (simple(job)) look_ahead(&own);
            else for (int64_t s = first_of(slabs, t, threads); s < first_of(slabs, t + 1, threads); s++) {
                int64_t from = s * slab, to = from + slab < n ? from + slab : n;
                if (from < to) totals[s] = square_sums(job, from, to, sums, factored ? sums + row_count + s * job->columns : 0);
            }
        }
    }
    job->grad_sq = 0;
    for (int64_t s = 0; s < slabs; s++) job->grad_sq += totals[s];
    job->finite = job->grad_sq < 0x1p127 ? 1 : 0;                        /* sums of squares by row and column are float */
    if (job->finite) {
        float mean = factored ? rows_mean(job, row_count) : 0.0f;
        _Pragma("omp parallel for schedule(static, 1) num_threads(threads) if (threads > 1)")
        for (int t = 0; t < threads; t++) {
            const int64_t first = first_of(chunks, t, threads), last = first_of(chunks, t + 1, threads);
            Ahead ahead = {0};
            if (next) ahead = ahead_of(next, following, t, threads);
            ahead.per = last > first ? (ahead.stop - ahead.at) / ((last - first) * CHUNK) + 1 : 0;
            for (int64_t k = last; k-- > first;) {
                parts[k].rows_mean = mean;
                update_range(job, k * CHUNK, (k + 1) * CHUNK < n ? (k + 1) * CHUNK : n, parts + k, &ahead);
            }
            ahead.per = INT64_MAX;
            look_ahead(&ahead);
        }
        for (int64_t s = 1; factored && s < slabs; s++)
            for (int64_t c = 0; c < job->columns; c++) sums[row_count + c] += sums[row_count + s * job->columns + c];
        if (factored) finish_factors(job, sums, sums + row_count, row_count);
        job->moved_sq = job->param_sq = job->momentum_sq = job->momentum_grad = 0;
        for (int64_t k = 0; k < chunks; k++) {
            job->moved_sq += parts[k].moved_sq; job->param_sq += parts[k].param_sq;
            job->momentum_sq += parts[k].momentum_sq; job->momentum_grad += parts[k].momentum_grad;
        }
        samples(job);
    }
end:
    if (failed) job->finite = 2;
    free(sums);
    free(totals);
    free(parts);
    if (!failed && job->finite) return following;
    free(following);
    return 0;
}

/* Update every tensor. A tensor whose gradient is not finite is left as it is, and its `finite` says 0. */
void update(Job *jobs, int64_t count, int threads) {
    _Pragma("omp parallel for schedule(dynamic) num_threads(threads) if (count > 4 && threads > 1)")
    for (int64_t i = 0; i < count; i++) if (jobs[i].numel <= CHUNK) whole_job(jobs + i, 0, 0, 1);
    double *known = 0;
    for (int64_t i = 0, next; i < count; i = next) {
        for (next = i + 1; next < count && jobs[next].numel <= CHUNK; next++) {}
        if (jobs[i].numel > CHUNK) known = whole_job(jobs + i, known, next < count && simple(jobs + next) ? jobs + next : 0, threads);
    }
}
