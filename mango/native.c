/* CPU kernels: one pass over each tensor that decodes its stored moments, applies the rule, and encodes them again.
 *
 * The specification is the PyTorch twins in codecs.py, blockwise.py and rules.py. No torch headers: mango/native.py
 * compiles this file in a second, with the C compiler of the machine, and calls it through ctypes. Work is cut into
 * blocks of 256 entries that stay in the first-level cache; sums are taken per chunk and added in order, so that results
 * do not depend on the number of threads.
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

#define BLOCK 256
#define GOLDEN 0x9E3779B9u
#define CHUNK 65536                       /* entries that one thread takes at a time */
#define SLABS 16                          /* pieces in which row and column sums of one large matrix are taken */
#define AHEAD 4                           /* blocks that memory is asked for in advance */
#define LIMIT 10.0f                       /* rules.UPDATE_LIMIT */
#define SIMD _Pragma("omp simd")
#define ALIGNED __attribute__((aligned(64)))

enum { ADAMW, ADAM, SGD, LION };
enum { FLOAT32, BFLOAT16, SIGNED8, NF4, TERNARY2, UNSIGNED8, LOG4, FACTORED, LOG6, NONE };

static const int64_t WIDTH[] = {32, 16, 8, 4, 2, 8, 4, 0, 6, 0};          /* bits of an entry, by format */

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

/* plain comparisons, which vectorise where fmaxf and fminf do not; inputs are finite */
static inline float more(float a, float b) { return a > b ? a : b; }
static inline float less(float a, float b) { return a < b ? a : b; }

/* ---- noise: a counter in, a number out (noise.py) ---- */
static inline uint32_t mix(uint32_t x) {
    x ^= x >> 16; x *= 0x85ebca6bu; x ^= x >> 13; x *= 0xc2b2ae35u; return x ^ (x >> 16);
}

static inline uint32_t block_key(uint32_t key, int64_t start) {
    uint32_t high = (uint32_t)((uint64_t)start >> 32);
    return (high ? mix(key + high) : key) + (uint32_t)start * GOLDEN;
}

/* 256 numbers in (0, 1): the two halves of 128 hashes. Without chance all are one half, which rounds to nearest. */
static void noise(uint32_t key, int64_t start, uint32_t chance, float *u) {
    if (!chance) { SIMD for (int j = 0; j < BLOCK; j++) u[j] = 0.5f; return; }
    uint32_t base = block_key(key, start);
    SIMD for (int j = 0; j < BLOCK / 2; j++) {
        uint32_t bits = mix(base + (uint32_t)j * GOLDEN);
        u[j] = (float)(int32_t)(bits & 0xffffu) * 0x1p-16f + 0x1p-17f;
        u[j + BLOCK / 2] = (float)(int32_t)(bits >> 16) * 0x1p-16f + 0x1p-17f;
    }
}

/* ---- bfloat16 ---- */
static inline float bf16_float(uint16_t b) { uint32_t i = (uint32_t)b << 16; float f; memcpy(&f, &i, 4); return f; }
static inline uint32_t float_bits(float f) { uint32_t i; memcpy(&i, &f, 4); return i; }
static inline float bits_float(uint32_t i) { float f; memcpy(&f, &i, 4); return f; }
static inline uint16_t float_bf16(float f) {                              /* to nearest, ties to even; finite input */
    uint32_t i = float_bits(f);
    return (uint16_t)((i + 0x7fffu + ((i >> 16) & 1u)) >> 16);
}

/* ---- sixteen levels: look up, and find the level at or below ---- */
static void lookup16(const float *table, const uint8_t *codes, float *out, int n) {
#ifdef __AVX512F__
    __m512 levels = _mm512_loadu_ps(table);
    for (int j = 0; j < n; j += 16) {
        __m512i index = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(codes + j)));
        _mm512_storeu_ps(out + j, _mm512_permutexvar_ps(index, levels));
    }
#else
    for (int j = 0; j < n; j++) out[j] = table[codes[j]];
#endif
}

/* the level at or below x * unit, or the next one where that is past a share u of the way to it */
static void level_codes(const float *table, const float *x, float unit, const float *u, uint8_t *codes, int n) {
#ifdef __AVX512F__
    __m512 levels = _mm512_loadu_ps(table);
    __m512i one = _mm512_set1_epi32(1), last = _mm512_set1_epi32(15);
    for (int j = 0; j < n; j += 16) {
        __m512 v = _mm512_mul_ps(_mm512_loadu_ps(x + j), _mm512_set1_ps(unit));
        __m512i low = _mm512_setzero_si512();
        for (int step = 8; step; step >>= 1) {
            __m512i next = _mm512_add_epi32(low, _mm512_set1_epi32(step));
            __mmask16 reached = _mm512_cmp_ps_mask(v, _mm512_permutexvar_ps(next, levels), _CMP_GE_OQ);
            low = _mm512_mask_mov_epi32(low, reached, next);
        }
        __m512i high = _mm512_min_epi32(_mm512_add_epi32(low, one), last);
        __m512 floor = _mm512_permutexvar_ps(low, levels);
        __m512 width = _mm512_sub_ps(_mm512_permutexvar_ps(high, levels), floor);
        __m512 need = _mm512_mul_ps(_mm512_loadu_ps(u + j), width);
        __mmask16 up = _mm512_cmp_ps_mask(_mm512_sub_ps(v, floor), need, _CMP_GT_OQ);
        _mm_storeu_si128((__m128i *)(codes + j), _mm512_cvtepi32_epi8(_mm512_mask_mov_epi32(low, up, high)));
    }
#else
    for (int j = 0; j < n; j++) {
        int low = 0;
        float y = x[j] * unit;
        for (int step = 8; step; step >>= 1) low += y >= table[low + step] ? step : 0;
        int high = low < 15 ? low + 1 : 15;
        codes[j] = (uint8_t)(y - table[low] > u[j] * (table[high] - table[low]) ? high : low);
    }
#endif
}

/* The code c of |x| * unit among the squares 0, 1, 4, 9 .. (levels)^2: the one at or below, or the next where it is past
 * a share u of the way. c^2 + u (2c + 1) < a is the same as c < sqrt(a - u + u^2) - u, so that is rounded up. */
static void root_codes(const float *x, float unit, const float *u, uint32_t chance, float levels, int is_signed, uint8_t *codes, int n) {
#ifdef __AVX512F__
    const __m512 by = _mm512_set1_ps(unit), most = _mm512_set1_ps(levels), least = _mm512_set1_ps(1e-12f);
    const __m512 half = _mm512_set1_ps(0.5f), three = _mm512_set1_ps(1.5f), zero = _mm512_setzero_ps(), quarter = _mm512_set1_ps(0.25f);
    for (int j = 0; j < n; j += 16) {
        __m512 v = _mm512_loadu_ps(x + j);
        __m512i code;
        if (chance) {
            __m512 share = _mm512_loadu_ps(u + j);
            __m512 a = _mm512_max_ps(_mm512_fmadd_ps(_mm512_abs_ps(v), by, _mm512_fmsub_ps(share, share, share)), least);
            __m512 r = _mm512_rsqrt14_ps(a), s = _mm512_mul_ps(a, r);
            s = _mm512_mul_ps(s, _mm512_fnmadd_ps(_mm512_mul_ps(half, s), r, three));
            s = _mm512_min_ps(_mm512_sub_ps(s, share), most);
            code = _mm512_cvt_roundps_epi32(s, _MM_FROUND_TO_POS_INF | _MM_FROUND_NO_EXC);
        } else {                                                          /* a root that is off by 2^-14 moves the ties by 1 % of a bin */
            __m512 a = _mm512_max_ps(_mm512_fmsub_ps(_mm512_abs_ps(v), by, quarter), least);
            code = _mm512_cvtps_epi32(_mm512_min_ps(_mm512_mul_ps(a, _mm512_rsqrt14_ps(a)), most));
        }
        if (is_signed) {
            code = _mm512_mask_sub_epi32(code, _mm512_cmp_ps_mask(v, zero, _CMP_LT_OQ), _mm512_setzero_si512(), code);
        } else {
            code = _mm512_mask_max_epi32(code, _mm512_cmp_ps_mask(v, zero, _CMP_GT_OQ), code, _mm512_set1_epi32(1));
        }
        _mm_storeu_si128((__m128i *)(codes + j), _mm512_cvtepi32_epi8(code));
    }
#else
    for (int j = 0; j < n; j++) {
        float a = more(fabsf(x[j]) * unit + (u[j] * u[j] - u[j]), 1e-12f);
        int32_t code = (int32_t)ceilf(less(sqrtf(a) - u[j], levels)), sign = -(x[j] < 0);
        codes[j] = (uint8_t)(is_signed ? (code ^ sign) - sign : code + (code == 0 && x[j] > 0));
    }
#endif
}

/* ---- lognormal6: a sign and one of 31 levels, or zero ---- */
static float LOG6_STEPS[256];             /* the ratio of neighbours, by the code of the span: exp(-s / 1500) */
__attribute__((constructor)) static void log6_steps(void) {
    double step = 1.0;                    /* by multiplication, as the twin has it: no library's exp is the same everywhere */
    for (int s = 0; s < 256; s++) { LOG6_STEPS[s] = (float)step; step *= 0.9993335555061811; }
}

/* 0, then r^30, r^29 .. r, 1 */
static void log6_levels(uint8_t span, float *levels) {
    float r = LOG6_STEPS[span];
#ifdef __AVX512F__
    __m512 power = _mm512_set1_ps(1.0f);                                  /* lane i: r^(15 - i), the lower bits first, as below */
    power = _mm512_mask_mul_ps(power, 0x5555, power, _mm512_set1_ps(r)); r *= r;
    power = _mm512_mask_mul_ps(power, 0x3333, power, _mm512_set1_ps(r)); r *= r;
    power = _mm512_mask_mul_ps(power, 0x0f0f, power, _mm512_set1_ps(r)); r *= r;
    power = _mm512_mask_mul_ps(power, 0x00ff, power, _mm512_set1_ps(r)); r *= r;
    _mm512_storeu_ps(levels + 16, power);
    _mm512_storeu_ps(levels, _mm512_maskz_mul_ps(0xfffe, power, _mm512_set1_ps(r)));
#else
    float power[32] = {1.0f};
    for (int width = 1; width < 32; width *= 2) {
        for (int k = 0; k < width; k++) power[width + k] = power[k] * r;
        r *= r;
    }
    levels[0] = 0.0f;
    for (int k = 0; k < 31; k++) levels[31 - k] = power[k];
#endif
}

/* How far the levels of 64 entries reach, in fiftieths of a nat: closed form in the deviation of log|x|, read off the
 * floats' bits in units of 1/128 octave; whole numbers, so that the order of sums makes no difference. And the largest |x|. */
static uint8_t log6_span(const float *x, float *most) {
    uint32_t high = 0;
    _Pragma("omp simd reduction(max : high)") for (int j = 0; j < 64; j++) {
        uint32_t bits = float_bits(x[j]) & 0x7fffffffu;
        high = bits > high ? bits : high;
    }
    *most = bits_float(high);
    int32_t count = 0, total = 0, squares = 0;
    _Pragma("omp simd reduction(+ : count, total, squares)") for (int j = 0; j < 64; j++) {
        uint32_t bits = float_bits(x[j]) & 0x7fffffffu;
        int32_t below = (int32_t)((high - bits) >> 16), some = -(bits != 0);
        below = (below > 4095 ? 4095 : below) & some;
        count -= some; total += below; squares += below * below;
    }
    if (!count) return 1;
    double variance = (double)((int64_t)count * squares - (int64_t)total * total) / (double)(count * count) * 2.9324524775280846e-05;
    double span = rint(240.0 * sqrt(variance / (variance + 0.6)));
    return (uint8_t)(span < 1 ? 1 : span);
}

/* as level_codes, for |x| * unit among 32 levels, with the sign in bit 5 of what is not zero */
static void log6_codes(const float *table, const float *x, float unit, const float *u, uint8_t *codes, int n) {
#ifdef __AVX512F__
    const __m512 below = _mm512_loadu_ps(table), above = _mm512_loadu_ps(table + 16), by = _mm512_set1_ps(unit);
    const __m512i one = _mm512_set1_epi32(1), last = _mm512_set1_epi32(31), sign = _mm512_set1_epi32(32);
    for (int j = 0; j < n; j += 16) {
        __m512 from = _mm512_loadu_ps(x + j), v = _mm512_mul_ps(_mm512_abs_ps(from), by);
        __m512i low = _mm512_setzero_si512();
        for (int step = 16; step; step >>= 1) {
            __m512i next = _mm512_add_epi32(low, _mm512_set1_epi32(step));
            __mmask16 reached = _mm512_cmp_ps_mask(v, _mm512_permutex2var_ps(below, next, above), _CMP_GE_OQ);
            low = _mm512_mask_mov_epi32(low, reached, next);
        }
        __m512i high = _mm512_min_epi32(_mm512_add_epi32(low, one), last);
        __m512 floor = _mm512_permutex2var_ps(below, low, above);
        __m512 width = _mm512_sub_ps(_mm512_permutex2var_ps(below, high, above), floor);
        __m512 need = _mm512_mul_ps(_mm512_loadu_ps(u + j), width);
        __m512i code = _mm512_mask_mov_epi32(low, _mm512_cmp_ps_mask(_mm512_sub_ps(v, floor), need, _CMP_GT_OQ), high);
        __mmask16 negative = _mm512_test_epi32_mask(code, code) & _mm512_cmp_ps_mask(from, _mm512_setzero_ps(), _CMP_LT_OQ);
        _mm_storeu_si128((__m128i *)(codes + j), _mm512_cvtepi32_epi8(_mm512_mask_or_epi32(code, negative, code, sign)));
    }
#else
    for (int j = 0; j < n; j++) {
        int low = 0;
        float y = fabsf(x[j]) * unit;
        for (int step = 16; step; step >>= 1) low += y >= table[low + step] ? step : 0;
        int high = low < 31 ? low + 1 : 31;
        int code = y - table[low] > u[j] * (table[high] - table[low]) ? high : low;
        codes[j] = (uint8_t)(code && x[j] < 0 ? code | 32 : code);
    }
#endif
}

static void log6_values(const float *table, const uint8_t *codes, float scale, float *out, int n) {
#ifdef __AVX512F__
    const __m512 below = _mm512_loadu_ps(table), above = _mm512_loadu_ps(table + 16), by = _mm512_set1_ps(scale);
    for (int j = 0; j < n; j += 16) {
        __m512i code = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(codes + j)));
        __m512 value = _mm512_mul_ps(_mm512_permutex2var_ps(below, code, above), by);
        __mmask16 negative = _mm512_test_epi32_mask(code, _mm512_set1_epi32(32));
        _mm512_storeu_ps(out + j, _mm512_mask_sub_ps(value, negative, _mm512_setzero_ps(), value));
    }
#else
    for (int j = 0; j < n; j++) {
        float value = table[codes[j] & 31] * scale;
        out[j] = codes[j] & 32 ? -value : value;
    }
#endif
}

/* four codes of six bits in three bytes, low bits first */
static void unpack6(const uint8_t *packed, uint8_t *codes, int64_t entries) {
    ALIGNED uint8_t whole[BLOCK * 3 / 4 + 4] = {0};
    ALIGNED uint32_t words[BLOCK / 4];
    memcpy(whole, packed, (size_t)((3 * entries + 3) / 4));
    for (int j = 0; j < BLOCK / 4; j++) memcpy(words + j, whole + 3 * j, 4);
    SIMD for (int j = 0; j < BLOCK / 4; j++) {
        uint32_t w = words[j];
        words[j] = (w & 63) | (w & 63 << 6) << 2 | (w & 63 << 12) << 4 | (w & 63 << 18) << 6;
    }
    memcpy(codes, words, BLOCK);
}

static void pack6(const uint8_t *codes, uint8_t *packed, int64_t entries) {
    ALIGNED uint8_t whole[BLOCK * 3 / 4 + 4];
    ALIGNED uint32_t words[BLOCK / 4];
    memcpy(words, codes, BLOCK);
    SIMD for (int j = 0; j < BLOCK / 4; j++) {
        uint32_t w = words[j];
        words[j] = (w & 63) | (w >> 2 & 63 << 6) | (w >> 4 & 63 << 12) | (w >> 6 & 63 << 18);
    }
    for (int j = 0; j < BLOCK / 4; j++) memcpy(whole + 3 * j, words + j, 4);     /* each overwrites what the one before has too many */
    memcpy(packed, whole, (size_t)((3 * entries + 3) / 4));
}

static void unpack4(const uint8_t *packed, uint8_t *codes, int64_t entries) {
    int64_t bytes = (entries + 1) / 2;
    ALIGNED uint8_t whole[BLOCK / 2] = {0};
    memcpy(whole, packed, (size_t)bytes);
    SIMD for (int j = 0; j < BLOCK / 2; j++) { codes[2 * j] = whole[j] & 15; codes[2 * j + 1] = whole[j] >> 4; }
}

static void pack4(const uint8_t *codes, uint8_t *packed, int64_t entries) {
    ALIGNED uint8_t whole[BLOCK / 2];
    SIMD for (int j = 0; j < BLOCK / 2; j++) whole[j] = (uint8_t)(codes[2 * j] | (codes[2 * j + 1] << 4));
    memcpy(packed, whole, (size_t)((entries + 1) / 2));
}

static float largest(const float *x, int n) {
    float high = 0;
    _Pragma("omp simd reduction(max : high)") for (int j = 0; j < n; j++) high = more(high, fabsf(x[j]));
    return high;
}

/* 1 / scale; where that would overflow the block is lifted first */
static float unit_of(const float **x, float scale, float *lifted, int n) {
    if (scale >= 0x1p-100f) return 1.0f / scale;
    SIMD for (int j = 0; j < n; j++) lifted[j] = (*x)[j] * 0x1p100f;
    *x = lifted;
    return scale > 0 ? 1.0f / (scale * 0x1p100f) : 0.0f;
}

static const float NF4_LEVELS[16] = {
    -1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f, -0.28444138169288635f, -0.18477343022823334f,
    -0.09105003625154495f, 0.0f, 0.07958029955625534f, 0.16093020141124725f, 0.24611230194568634f, 0.33791524171829224f,
    0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.0f};

static void log4_levels(float low, float high, float *levels) {
    /* 0, then low * r^k for k = 0..14 with r^14 = high / low; powers by doubling, as the twin does it */
    float top = high > 0 ? high : 1.0f, start = low > 0 ? low : top, ratio = top / start;
    float r = expf(more(logf(ratio), 0.0f) / 14.0f), power[16] = {1.0f};
    for (int width = 1; width < 16; width *= 2) {
        for (int k = 0; k < width; k++) power[width + k] = power[k] * r;
        r *= r;
    }
    levels[0] = 0.0f;
    for (int k = 0; k < 15; k++) levels[k + 1] = start * power[k];
    levels[15] = more(high, start);
}

/* ---- decode one block: entries start .. start + BLOCK of a tensor, zeros past its end ---- */
static inline __attribute__((always_inline)) void decode_entries(int format, const void *codes, const void *scale, const void *low, int64_t start, int64_t entries, float *out) {
    ALIGNED uint8_t c[BLOCK];
    if (entries < BLOCK) memset(out, 0, BLOCK * sizeof(float));
    switch (format) {
    case NONE:
        memset(out, 0, BLOCK * sizeof(float));
        break;
    case FLOAT32:
        memcpy(out, (const float *)codes + start, (size_t)entries * 4);
        break;
    case BFLOAT16: {
        const uint16_t *x = (const uint16_t *)codes + start;
        SIMD for (int64_t j = 0; j < entries; j++) out[j] = bf16_float(x[j]);
        break;
    }
    case SIGNED8: {
        const int8_t *x = (const int8_t *)codes + start;
        for (int64_t at = 0; at < entries; at += 128) {
            float step = bf16_float(((const uint16_t *)scale)[(start + at) / 128]) / 16129.0f;
            int64_t stop = entries - at < 128 ? entries : at + 128;
            SIMD for (int64_t j = at; j < stop; j++) { float v = x[j]; out[j] = v * fabsf(v) * step; }
        }
        break;
    }
    case NF4:
        unpack4((const uint8_t *)codes + start / 2, c, entries);
        lookup16(NF4_LEVELS, c, out, BLOCK);
        for (int64_t at = 0; at < entries; at += 64) {
            float s = bf16_float(((const uint16_t *)scale)[(start + at) / 64]);
            SIMD for (int j = 0; j < 64; j++) out[at + j] *= s;
        }
        break;
    case TERNARY2: {
        ALIGNED uint32_t words[BLOCK / 16] = {0};                          /* sixteen codes each */
        memcpy(words, (const uint8_t *)codes + start / 4, (size_t)(entries + 3) / 4);
        for (int64_t at = 0; at < entries; at += 16) {
            float s = bf16_float(((const uint16_t *)scale)[(start + at) / 64]);
            uint32_t word = words[at / 16];
            SIMD for (int j = 0; j < 16; j++) out[at + j] = (float)((int32_t)(word >> (2 * j) & 3) - 1) * s;
        }
        break;
    }
    case UNSIGNED8: {
        const uint8_t *x = (const uint8_t *)codes + start;
        float s = ((const float *)scale)[start / 256] / 65025.0f;
        SIMD for (int64_t j = 0; j < entries; j++) { float v = x[j]; out[j] = v * v * s; }
        break;
    }
    case LOG4:
        unpack4((const uint8_t *)codes + start / 2, c, entries);
        for (int64_t at = 0; at < entries; at += 128) {
            ALIGNED float levels[16];
            log4_levels(bf16_float(((const uint16_t *)low)[(start + at) / 128]), ((const float *)scale)[(start + at) / 128], levels);
            lookup16(levels, c + at, out + at, 128);
        }
        break;
    case LOG6:
        unpack6((const uint8_t *)codes + start / 4 * 3, c, entries);
        for (int64_t at = 0; at < entries; at += 64) {
            ALIGNED float levels[32];
            log6_levels(((const uint8_t *)low)[(start + at) / 64], levels);
            log6_values(levels, c + at, bf16_float(((const uint16_t *)scale)[(start + at) / 64]), out + at, 64);
        }
        break;
    }
    if (entries < BLOCK) memset(out + entries, 0, (size_t)(BLOCK - entries) * sizeof(float));
}

static void decode(int format, const void *codes, const void *scale, const void *low, int64_t start, int64_t entries, float *out) {
    if (entries == BLOCK) decode_entries(format, codes, scale, low, start, BLOCK, out);       /* all sizes known: no calls, full vectors */
    else decode_entries(format, codes, scale, low, start, entries, out);
}

/* ---- encode one block ---- */
static inline __attribute__((always_inline)) void encode_entries(int format, void *codes, void *scale, void *low, int64_t start, int64_t entries, const float *x, uint32_t key, uint32_t chance) {
    ALIGNED float u[BLOCK], y[BLOCK];
    ALIGNED uint8_t c[BLOCK];
    if (format == NONE) return;
    if (format != FLOAT32 && format != BFLOAT16) noise(key, start, chance, u);
    switch (format) {
    case FLOAT32:
        memcpy((float *)codes + start, x, (size_t)entries * 4);
        break;
    case BFLOAT16: {
        uint16_t *out = (uint16_t *)codes + start;
        uint32_t base = block_key(key, start);
        if (chance) {
            ALIGNED uint32_t bits[BLOCK];
            SIMD for (int j = 0; j < BLOCK / 2; j++) bits[j] = mix(base + (uint32_t)j * GOLDEN);
            SIMD for (int j = 0; j < BLOCK / 2; j++) bits[j + BLOCK / 2] = (float_bits(x[j + BLOCK / 2]) + (bits[j] >> 16)) >> 16;
            SIMD for (int j = 0; j < BLOCK / 2; j++) bits[j] = (float_bits(x[j]) + (bits[j] & 0xffffu)) >> 16;
            SIMD for (int64_t j = 0; j < entries; j++) out[j] = (uint16_t)bits[j];
        } else {
            SIMD for (int64_t j = 0; j < entries; j++) out[j] = float_bf16(x[j]);
        }
        break;
    }
    case SIGNED8:
        for (int at = 0; at < entries; at += 128) {
            uint16_t s = float_bf16(largest(x + at, 128));
            const float *from = x + at;
            ((uint16_t *)scale)[(start + at) / 128] = s;
            float unit = unit_of(&from, bf16_float(s), y, 128);
            root_codes(from, unit * 16129.0f, u + at, chance, 127.0f, 1, c + at, 128);
        }
        memcpy((int8_t *)codes + start, c, (size_t)entries);
        break;
    case NF4:
        for (int at = 0; at < entries; at += 64) {
            uint16_t s = float_bf16(largest(x + at, 64));
            const float *from = x + at;
            ((uint16_t *)scale)[(start + at) / 64] = s;
            float unit = unit_of(&from, bf16_float(s), y, 64);
            level_codes(NF4_LEVELS, from, unit, u + at, c + at, 64);
        }
        pack4(c, (uint8_t *)codes + start / 2, entries);
        break;
    case TERNARY2: {
        for (int at = 0; at < entries; at += 64) {
            float high = largest(x + at, 64), sum = 0;
            const float *from = x + at;
            float unit = unit_of(&from, high, y, 64);
            _Pragma("omp simd reduction(+ : sum)") for (int j = 0; j < 64; j++) { float part = from[j] * unit; sum += part * part; }
            float filled = entries - at < 64 ? (float)(entries - at) : 64.0f;
            uint16_t s = float_bf16(high * sqrtf(sum / filled) * (chance ? 1.5f : 1.224f));
            ((uint16_t *)scale)[(start + at) / 64] = s;
            from = x + at;
            unit = unit_of(&from, bf16_float(s), y, 64);
            SIMD for (int j = 0; j < 64; j++) {
                int32_t code = fabsf(from[j] * unit) > u[at + j], sign = -(from[j] < 0);
                c[at + j] = (uint8_t)((code ^ sign) - sign + 1);
            }
        }
        memset(c + entries, 0, (size_t)(BLOCK - entries));
        ALIGNED uint8_t packed[BLOCK / 4];
        SIMD for (int j = 0; j < BLOCK / 4; j++)
            packed[j] = (uint8_t)(c[4 * j] | c[4 * j + 1] << 2 | c[4 * j + 2] << 4 | c[4 * j + 3] << 6);
        memcpy((uint8_t *)codes + start / 4, packed, (size_t)(entries + 3) / 4);
        break;
    }
    case UNSIGNED8: {
        const float *from = x;
        float s = largest(x, BLOCK), unit = unit_of(&from, s, y, BLOCK);
        ((float *)scale)[start / 256] = s;
        root_codes(from, unit * 65025.0f, u, chance, 255.0f, 0, c, BLOCK);
        memcpy((uint8_t *)codes + start, c, (size_t)entries);
        break;
    }
    case LOG4:
        for (int at = 0; at < entries; at += 128) {
            float high = largest(x + at, 128), least = high;
            _Pragma("omp simd reduction(min : least)") for (int j = 0; j < 128; j++) least = less(least, x[at + j] > 0 ? x[at + j] : high);
            float floor = bf16_float(float_bf16(more(more(least, high * 1e-8f), 0x1p-126f))), top = bf16_float(float_bf16(high));
            uint16_t l = float_bf16(less(floor, top));
            ((float *)scale)[(start + at) / 128] = high;
            ((uint16_t *)low)[(start + at) / 128] = l;
            ALIGNED float levels[16];
            log4_levels(bf16_float(l), high, levels);
            SIMD for (int j = 0; j < 128; j++) y[at + j] = x[at + j] > 0 ? more(x[at + j], levels[1]) : 0.0f;
            level_codes(levels, y + at, 1.0f, u + at, c + at, 128);
        }
        pack4(c, (uint8_t *)codes + start / 2, entries);
        break;
    case LOG6:
        for (int at = 0; at < entries; at += 64) {
            ALIGNED float levels[32];
            float high;
            uint8_t span = log6_span(x + at, &high);
            uint16_t s = float_bf16(high);
            const float *from = x + at;
            ((uint16_t *)scale)[(start + at) / 64] = s;
            ((uint8_t *)low)[(start + at) / 64] = span;
            float unit = unit_of(&from, bf16_float(s), y, 64);
            log6_levels(span, levels);
            log6_codes(levels, from, unit, u + at, c + at, 64);
        }
        memset(c + entries, 0, (size_t)(BLOCK - entries));
        pack6(c, (uint8_t *)codes + start / 4 * 3, entries);
        break;
    }
}

static void encode(int format, void *codes, void *scale, void *low, int64_t start, int64_t entries, const float *x, uint32_t key, uint32_t chance) {
    if (entries == BLOCK) encode_entries(format, codes, scale, low, start, BLOCK, x, key, chance);
    else encode_entries(format, codes, scale, low, start, entries, x, key, chance);
}

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

typedef struct { float beta2, fresh1, fresh2, root2, unbias2, eps, lr, stride; int advance; } Adam;

/* Full precision: the operations of torch.optim.AdamW, in its order and with its fused multiply-adds. */
static void adam_exact(const Adam *a, const float *g, float *m, float *v, float *p) {
    SIMD for (int j = 0; j < BLOCK; j++) {
        m[j] = fmaf(a->fresh1, g[j] - m[j], m[j]);
        v[j] = fmaf(a->fresh2 * g[j], g[j], v[j] * a->beta2);
        float under = sqrtf(v[j]) / a->root2 + a->eps, step = a->stride * m[j] / under;
        p[j] += step;
    }
}

/* Advance m and v (v only with `advance`) and move p. An entry whose second moment is zero stays, none moves beyond LIMIT lr.
 * Square roots and quotients are good to a relative 1e-7. */
static void adam_block(const Adam *a, const float *g, float *m, float *v, float *p) {
#ifdef __AVX512F__
    const __m512 beta2 = _mm512_set1_ps(a->beta2), fresh1 = _mm512_set1_ps(a->fresh1), fresh2 = _mm512_set1_ps(a->fresh2);
    const __m512 unbias2 = _mm512_set1_ps(a->unbias2), eps = _mm512_set1_ps(a->eps), half = _mm512_set1_ps(0.5f);
    const __m512 three = _mm512_set1_ps(1.5f), two = _mm512_set1_ps(2.0f), zero = _mm512_setzero_ps();
    const __m512 stride = _mm512_set1_ps(a->stride), most = _mm512_set1_ps(LIMIT * a->lr), least = _mm512_set1_ps(-LIMIT * a->lr);
    for (int j = 0; j < BLOCK; j += 16) {
        __m512 grad = _mm512_loadu_ps(g + j), avg = _mm512_loadu_ps(m + j), square = _mm512_loadu_ps(v + j), at = _mm512_loadu_ps(p + j);
        avg = _mm512_fmadd_ps(fresh1, _mm512_sub_ps(grad, avg), avg);
        _mm512_storeu_ps(m + j, avg);
        if (a->advance) {
            square = _mm512_fmadd_ps(_mm512_mul_ps(fresh2, grad), grad, _mm512_mul_ps(square, beta2));
            _mm512_storeu_ps(v + j, square);
        }
        __mmask16 some = _mm512_cmp_ps_mask(square, zero, _CMP_GT_OQ);
        __m512 r = _mm512_maskz_rsqrt14_ps(some, square), root = _mm512_mul_ps(square, r);
        root = _mm512_mul_ps(root, _mm512_fnmadd_ps(_mm512_mul_ps(half, root), r, three));
        __m512 under = _mm512_fmadd_ps(root, unbias2, eps);
        __m512 inverse = _mm512_rcp14_ps(under);
        inverse = _mm512_mul_ps(inverse, _mm512_fnmadd_ps(under, inverse, two));
        __m512 move = _mm512_mul_ps(_mm512_mul_ps(avg, inverse), stride);
        move = _mm512_min_ps(_mm512_max_ps(move, least), most);
        _mm512_storeu_ps(p + j, _mm512_mask_add_ps(at, some, at, move));
    }
#else
    if (a->advance) { SIMD for (int j = 0; j < BLOCK; j++) v[j] = v[j] * a->beta2 + a->fresh2 * g[j] * g[j]; }
    SIMD for (int j = 0; j < BLOCK; j++) m[j] += a->fresh1 * (g[j] - m[j]);
    const float most = LIMIT * a->lr;
    SIMD for (int j = 0; j < BLOCK; j++) {
        float move = v[j] > 0 ? a->stride * (m[j] / (sqrtf(v[j]) * a->unbias2 + a->eps)) : 0.0f;
        p[j] += less(more(move, -most), most);
    }
#endif
}

#ifdef __AVX512F__
static inline __m512i mix16(__m512i x) {
    x = _mm512_mullo_epi32(_mm512_xor_si512(x, _mm512_srli_epi32(x, 16)), _mm512_set1_epi32((int)0x85ebca6bu));
    x = _mm512_mullo_epi32(_mm512_xor_si512(x, _mm512_srli_epi32(x, 13)), _mm512_set1_epi32((int)0xc2b2ae35u));
    return _mm512_xor_si512(x, _mm512_srli_epi32(x, 16));
}

/* root_codes to nearest, signed. Below a quarter of the first level the root is no number, and what it converts to ends in a
 * zero byte. The scale is the largest |x| to 2^-8, which is not enough to pass 127.5. */
static inline __m128i nearest_root(__m512 x, __m512 unit) {
    __m512 a = _mm512_fmsub_ps(_mm512_abs_ps(x), unit, _mm512_set1_ps(0.25f)), root = _mm512_mul_ps(a, _mm512_rsqrt14_ps(a));
    const __m512i sign = _mm512_set1_epi32(INT32_MIN);
    __m512i whole = _mm512_ternarylogic_epi32(sign, _mm512_castps_si512(x), _mm512_castps_si512(root), 0xca);     /* sign ? x : root */
    return _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(_mm512_castsi512_ps(whole)));
}

/* root_codes by chance, unsigned, from bits below 2^16. What is not zero gets a code of at least one, also where the root is no number. */
static inline __m128i chance_root(__m512 x, __m512 unit, __m512i bits) {
    __m512 share = _mm512_fmadd_ps(_mm512_cvtepi32_ps(bits), _mm512_set1_ps(0x1p-16f), _mm512_set1_ps(0x1p-17f));
    __m512 a = _mm512_fmadd_ps(x, unit, _mm512_fmsub_ps(share, share, share));
    __m512 r = _mm512_rsqrt14_ps(a), s = _mm512_mul_ps(a, r);
    s = _mm512_fmsub_ps(_mm512_mul_ps(s, _mm512_fnmadd_ps(s, r, _mm512_set1_ps(3.0f))), _mm512_set1_ps(0.5f), share);
    __mmask16 some = _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_GT_OQ);
    s = _mm512_maskz_max_ps(some, s, _mm512_set1_ps(0x1p-20f));                                                   /* no number: the other one */
    return _mm512_cvtusepi32_epi8(_mm512_cvt_roundps_epi32(s, _MM_FROUND_TO_POS_INF | _MM_FROUND_NO_EXC));
}

/* A whole block of float32 between 8-bit moments, kept in registers: what the general way does in passes over buffers, with
 * constants multiplied together beforehand. The second moment is worked on in units of fresh2 / fresh1^2. */
static void adam_8_8(const Adam *a, const Job *job, int64_t at, float decay) {
    const float *g = (const float *)job->grad + at, share = a->fresh2 / (a->fresh1 * a->fresh1);
    float *p = (float *)job->param + at, *v_scale = (float *)job->v_scale + at / 256, m_high[2];
    uint16_t *m_scale = (uint16_t *)job->m_scale + at / 128;
    uint8_t *m_codes = (uint8_t *)job->m_codes + at, *v_codes = (uint8_t *)job->v_codes + at;
    const __m512 fresh1 = _mm512_set1_ps(a->fresh1), three = _mm512_set1_ps(3.0f), two = _mm512_set1_ps(2.0f), zero = _mm512_setzero_ps();
    const __m512 keep = _mm512_set1_ps(decay), most = _mm512_set1_ps(LIMIT * a->lr);
    const __m512 over = _mm512_set1_ps(0.5f * sqrtf(share) * a->unbias2 / a->stride), eps = _mm512_set1_ps(a->eps / a->stride);
    const __m512 v_keep = _mm512_set1_ps(*v_scale / 65025.0f * (a->beta2 / share));
    ALIGNED float m[BLOCK], v[BLOCK];
    __m512 v_most = zero;
    for (int part = 0; part < 2; part++) {
        const __m512 m_keep = _mm512_set1_ps(bf16_float(m_scale[part]) / 16129.0f * (1.0f - a->fresh1));
        __m512 m_most = zero;
        for (int j = 128 * part; j < 128 * part + 128; j += 16) {
            __m512 grad = _mm512_mul_ps(_mm512_loadu_ps(g + j), fresh1);
            __m512 avg = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(m_codes + j))));
            __m512 square = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(v_codes + j))));
            avg = _mm512_fmadd_ps(_mm512_mul_ps(avg, _mm512_abs_ps(avg)), m_keep, grad);
            square = _mm512_fmadd_ps(grad, grad, _mm512_mul_ps(_mm512_mul_ps(square, square), v_keep));
            _mm512_store_ps(m + j, avg);
            _mm512_store_ps(v + j, square);
            m_most = _mm512_max_ps(m_most, _mm512_abs_ps(avg));
            v_most = _mm512_max_ps(v_most, square);
            __mmask16 some = _mm512_cmp_ps_mask(square, zero, _CMP_GT_OQ);
            __m512 r = _mm512_rsqrt14_ps(square), root = _mm512_mul_ps(square, r);
            root = _mm512_mul_ps(root, _mm512_fnmadd_ps(root, r, three));                         /* twice the root */
            __m512 under = _mm512_fmadd_ps(root, over, eps), inverse = _mm512_rcp14_ps(under);
            __m512 move = _mm512_mul_ps(_mm512_mul_ps(avg, inverse), _mm512_fnmadd_ps(under, inverse, two));
            move = _mm512_maskz_range_ps(some, move, most, 0x2);                                  /* the smaller in size, the sign of move */
            _mm512_storeu_ps(p + j, _mm512_fmadd_ps(_mm512_loadu_ps(p + j), keep, move));
        }
        m_high[part] = _mm512_reduce_max_ps(m_most);
    }
    const float v_high = _mm512_reduce_max_ps(v_most), v_most_true = v_high * share;
    if (less(less(m_high[0], m_high[1]), less(v_high, v_most_true)) < 0x1p-99f) {                 /* zeros, or so small that 1 / scale overflows */
        SIMD for (int j = 0; j < BLOCK; j++) v[j] *= share;
        encode(SIGNED8, job->m_codes, job->m_scale, 0, at, BLOCK, m, mix(job->key + 1), 0);
        encode(UNSIGNED8, job->v_codes, job->v_scale, 0, at, BLOCK, v, mix(job->key + 2), 1);
        return;
    }
    for (int part = 0; part < 2; part++) m_scale[part] = float_bf16(m_high[part]);
    *v_scale = v_most_true;
    const __m512 one_unit = _mm512_set1_ps(16129.0f / bf16_float(m_scale[0])), other_unit = _mm512_set1_ps(16129.0f / bf16_float(m_scale[1]));
    const __m512 v_unit = _mm512_set1_ps(65025.0f / v_high);
    const __m512i low = _mm512_set1_epi32(0xffff), lanes = _mm512_set1_epi32((int)(16 * GOLDEN));
    __m512i count = _mm512_mullo_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15), _mm512_set1_epi32((int)GOLDEN));
    count = _mm512_add_epi32(count, _mm512_set1_epi32((int)block_key(mix(job->key + 2), at)));
    for (int j = 0; j < 128; j += 16) {
        __m512i bits = mix16(count);
        count = _mm512_add_epi32(count, lanes);
        _mm_storeu_si128((__m128i *)(v_codes + j), chance_root(_mm512_load_ps(v + j), v_unit, _mm512_and_si512(bits, low)));
        _mm_storeu_si128((__m128i *)(v_codes + j + 128), chance_root(_mm512_load_ps(v + j + 128), v_unit, _mm512_srli_epi32(bits, 16)));
        _mm_storeu_si128((__m128i *)(m_codes + j), nearest_root(_mm512_load_ps(m + j), one_unit));
        _mm_storeu_si128((__m128i *)(m_codes + j + 128), nearest_root(_mm512_load_ps(m + j + 128), other_unit));
    }
}
#endif

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

/* bring the entries that come AHEAD blocks later towards the cache: short strides over many arrays defeat the hardware's guess */
static inline void fetch(const void *array, int64_t bits, int64_t at) {
    const char *from = (const char *)array + at * bits / 8;
    for (int64_t byte = 0; byte < BLOCK * bits / 8; byte += 64) __builtin_prefetch(from + byte, 0, 2);
}

static void update_range(const Job *job, int64_t start, int64_t stop, Part *part) {
    const float lr = (float)job->lr, decay = (float)(1.0 - job->lr * job->weight_decay), coupled = (float)job->weight_decay;
    const float fresh1 = (float)(1.0 - job->beta1), beta1 = (float)job->beta1, beta2 = (float)job->beta2;
    const float fresh2 = (float)(1.0 - job->beta2);
    const int adam = job->rule == ADAMW || job->rule == ADAM, decoupled = job->rule == ADAMW || job->rule == LION;
    const Adam rule = {beta2, fresh1, fresh2, (float)sqrt(job->correction2), (float)(1.0 / sqrt(job->correction2)),
                       (float)job->eps, lr, (float)(-job->lr / job->correction1), job->v_format != FACTORED};
    const int exact = job->m_format == FLOAT32 && job->v_format == FLOAT32;
#ifdef __AVX512F__
    const int eight = adam && job->m_format == SIGNED8 && !job->m_chance && job->v_format == UNSIGNED8 && job->v_chance && !job->measure
        && job->param_type == FLOAT32 && job->grad_type == FLOAT32 && job->scale == 1.0 && (decoupled || coupled == 0) && lr > 1e-20f;
#endif
    ALIGNED float buffers[5][BLOCK];
    for (int64_t at = start; at < stop; at += BLOCK) {
        int64_t entries = stop - at < BLOCK ? stop - at : BLOCK;
        if (at + AHEAD * BLOCK + BLOCK <= stop) {
            fetch(job->grad, WIDTH[job->grad_type], at + AHEAD * BLOCK);
            fetch(job->param, WIDTH[job->param_type], at + AHEAD * BLOCK);
            fetch(job->m_codes, WIDTH[job->m_format], at + AHEAD * BLOCK);
            if (job->v_format != FACTORED) fetch(job->v_codes, WIDTH[job->v_format], at + AHEAD * BLOCK);
        }
        const int whole = entries == BLOCK;                              /* float32 is worked on where it lies */
#ifdef __AVX512F__
        if (eight && whole) { adam_8_8(&rule, job, at, decay); continue; }
#endif
        float *g = buffers[0], *q = buffers[4];
        float *p = whole && job->param_type == FLOAT32 ? (float *)job->param + at : buffers[1];
        float *m = whole && job->m_format == FLOAT32 ? (float *)job->m_codes + at : buffers[2];
        float *v = whole && job->v_format == FLOAT32 ? (float *)job->v_codes + at : buffers[3];
        if (whole && job->grad_type == FLOAT32 && job->scale == 1.0 && (decoupled || coupled == 0)) g = (float *)job->grad + at;
        else load_gradient(job, at, entries, g);
        if (p == buffers[1]) load_param(job, at, entries, p);
        if (job->measure) memcpy(q, p, BLOCK * sizeof(float));
        if (coupled != 0 && decoupled) { SIMD for (int j = 0; j < BLOCK; j++) p[j] *= decay; }
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

/* sum of squares of so many float32 numbers, in 64 lanes */
static double squares(const float *g, int64_t n) {
    double total = 0;
    for (int64_t at = 0; at < n; at += 4096) {
        const int64_t stop = n - at < 4096 ? n : at + 4096, whole = stop - (stop - at) % 64;
        ALIGNED float lanes[64] = {0};
        float sum = 0;
        for (int64_t from = at; from < whole; from += 64) { SIMD for (int j = 0; j < 64; j++) lanes[j] += g[from + j] * g[from + j]; }
        for (int64_t j = whole; j < stop; j++) sum += g[j] * g[j];
        _Pragma("omp simd reduction(+ : sum)") for (int j = 0; j < 64; j++) sum += lanes[j];
        total += sum;
    }
    return total;
}

/* sum of squares of entries start .. stop of the gradient; with `columns` also by row and by column, coupled weight decay in it */
static double square_sums(const Job *job, int64_t start, int64_t stop, float *rows, float *columns) {
    ALIGNED float g[BLOCK], p[BLOCK];
    const float coupled = columns && job->rule == ADAM ? (float)job->weight_decay : 0.0f;
    double total = 0;
    if (!columns && job->grad_type == FLOAT32 && fabs(job->scale) == 1.0) return squares((const float *)job->grad + start, stop - start);
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

/* Slabs are what sums are taken over; every thread takes its own from the first to the last, and back from the last to the
 * first in the update, which so finds the gradients it read last in its cache. */
static void whole_job(Job *job, int threads) {
    const int64_t n = job->numel, factored = job->v_format == FACTORED;
    const int64_t row_count = factored ? n / job->columns : 0;
    const int64_t chunks = (n + CHUNK - 1) / CHUNK;
    int64_t slabs = chunks;
    if (factored && slabs > SLABS) slabs = SLABS;
    if (factored && slabs > row_count) slabs = row_count;
    const int64_t slab = factored ? (row_count + slabs - 1) / slabs * job->columns : CHUNK;
    float *sums = factored ? calloc((size_t)(row_count + slabs * job->columns), 4) : 0;
    double *totals = calloc((size_t)slabs, sizeof(double));
    Part *parts = calloc((size_t)chunks, sizeof(Part));
    if (!parts || !totals || (factored && !sums)) { job->finite = 2; free(sums); free(totals); free(parts); return; }
    if (chunks == 1 || threads < 1) threads = 1;
    _Pragma("omp parallel for schedule(static, 1) num_threads(threads) if (threads > 1)")
    for (int t = 0; t < threads; t++) for (int64_t s = slabs * t / threads; s < slabs * (t + 1) / threads; s++) {
        int64_t from = s * slab, to = from + slab < n ? from + slab : n;
        if (from < to) totals[s] = square_sums(job, from, to, sums, factored ? sums + row_count + s * job->columns : 0);
    }
    job->grad_sq = 0;
    for (int64_t s = 0; s < slabs; s++) job->grad_sq += totals[s];
    job->finite = job->grad_sq < 0x1p127 ? 1 : 0;                        /* sums of squares by row and column are float */
    if (job->finite) {
        float mean = factored ? rows_mean(job, row_count) : 0.0f;
        _Pragma("omp parallel for schedule(static, 1) num_threads(threads) if (threads > 1)")
        for (int t = 0; t < threads; t++) for (int64_t k = chunks * (t + 1) / threads; k-- > chunks * t / threads;) {
            parts[k].rows_mean = mean;
            update_range(job, k * CHUNK, (k + 1) * CHUNK < n ? (k + 1) * CHUNK : n, parts + k);
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
    free(sums);
    free(totals);
    free(parts);
}

/* Update every tensor. A tensor whose gradient is not finite is left as it is, and its `finite` says 0. */
void update(Job *jobs, int64_t count, int threads) {
    _Pragma("omp parallel for schedule(dynamic) num_threads(threads) if (count > 4 && threads > 1)")
    for (int64_t i = 0; i < count; i++) if (jobs[i].numel <= CHUNK) whole_job(jobs + i, 1);
    for (int64_t i = 0; i < count; i++) if (jobs[i].numel > CHUNK) whole_job(jobs + i, threads);
}
