/* Stored formats on a CPU: how a block of 256 entries is decoded and encoded. Part of native.c. */
#include <math.h>
#include <stdint.h>
#include <string.h>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

#define BLOCK 256
#define GOLDEN 0x9E3779B9u
#define SIMD _Pragma("omp simd")
#define ALIGNED __attribute__((aligned(64)))

enum { FLOAT32, BFLOAT16, SIGNED8, NF4, TERNARY2, UNSIGNED8, LOG4, FACTORED, LOG6, NONE };

static const int64_t WIDTH[] = {32, 16, 8, 4, 2, 8, 4, 0, 6, 0};          /* bits of an entry, by format */

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
