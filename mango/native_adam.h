/* Adam's step on a block: exact, on buffers of any formats, and in registers for the formats most used. Part of native.c. */
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

/* the lowest byte of each */
static inline __m128i low_bytes(__m512i x) {
#ifdef __AVX512VBMI__
    const __m128i each = _mm_setr_epi8(0, 4, 8, 12, 16, 20, 24, 28, 32, 36, 40, 44, 48, 52, 56, 60);
    return _mm512_castsi512_si128(_mm512_permutexvar_epi8(_mm512_castsi128_si512(each), x));      /* one operation, not two */
#else
    return _mm512_cvtepi32_epi8(x);
#endif
}

/* root_codes to nearest, signed. Below a quarter of the first level the root is no number, and what it converts to ends in a
 * zero byte. The scale is the largest |x| to 2^-8, which is not enough to pass 127.5. */
static inline __m128i nearest_root(__m512 x, __m512 unit) {
    __m512 a = _mm512_fmsub_ps(_mm512_abs_ps(x), unit, _mm512_set1_ps(0.25f)), root = _mm512_mul_ps(a, _mm512_rsqrt14_ps(a));
    const __m512i sign = _mm512_set1_epi32(INT32_MIN);
    __m512i whole = _mm512_ternarylogic_epi32(sign, _mm512_castps_si512(x), _mm512_castps_si512(root), 0xca);     /* sign ? x : root */
    return low_bytes(_mm512_cvtps_epi32(_mm512_castsi512_ps(whole)));
}

/* root_codes by chance, unsigned, from bits below 2^16. What is not zero gets a code of at least one, also where the root is no
 * number. `unit` leaves the largest x a 2^-20 below its code, so that none passes 255. */
static inline __m128i chance_root(__m512 x, __m512 unit, __m512i bits) {
    __m512 share = _mm512_fmadd_ps(_mm512_cvtepi32_ps(bits), _mm512_set1_ps(0x1p-16f), _mm512_set1_ps(0x1p-17f));
    __m512 a = _mm512_fmadd_ps(x, unit, _mm512_fmsub_ps(share, share, share));
    __m512 r = _mm512_rsqrt14_ps(a), s = _mm512_mul_ps(a, r);
    s = _mm512_fmsub_ps(_mm512_mul_ps(s, _mm512_fnmadd_ps(s, r, _mm512_set1_ps(3.0f))), _mm512_set1_ps(0.5f), share);
    __mmask16 some = _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_GT_OQ);
    s = _mm512_maskz_max_ps(some, s, _mm512_set1_ps(0x1p-20f));                                                   /* no number: the other one */
    return low_bytes(_mm512_cvt_roundps_epi32(s, _MM_FROUND_TO_POS_INF | _MM_FROUND_NO_EXC));
}

/* NF4's levels lie further apart than 2/31 of their range: a cell of that width holds one at most. By cell, the level at or
 * below its start and the value of the next one; by level, the way to the next one, which has no end at the last. */
static int32_t NF4_LOW[32];
static float NF4_NEXT[32], NF4_WIDTH[16];
__attribute__((constructor)) static void nf4_cells(void) {
    for (int k = 0; k < 16; k++) NF4_WIDTH[k] = k < 15 ? NF4_LEVELS[k + 1] - NF4_LEVELS[k] : 0x1p100f;
    for (int cell = 0; cell < 32; cell++) {
        int k = 0;
        while (k < 15 && NF4_LEVELS[k + 1] <= ((float)cell - 15.75f) / 15.5f) k++;
        NF4_LOW[cell] = k;
        NF4_NEXT[cell] = k < 15 ? NF4_LEVELS[k + 1] : 0x1p100f;
    }
}

/* level_codes of NF4 by chance, from bits below 2^16, sixteen codes in eight bytes */
static inline __m128i chance_nf4(__m512 x, __m512 unit, __m512i bits) {
    const __m512i one = _mm512_set1_epi32(1);
    __m512 y = _mm512_mul_ps(x, unit);
    __m512i cell = _mm512_cvttps_epi32(_mm512_fmadd_ps(y, _mm512_set1_ps(15.5f), _mm512_set1_ps(15.75f)));
    __m512i low = _mm512_permutex2var_epi32(_mm512_loadu_si512(NF4_LOW), cell, _mm512_loadu_si512(NF4_LOW + 16));
    __m512 next = _mm512_permutex2var_ps(_mm512_loadu_ps(NF4_NEXT), cell, _mm512_loadu_ps(NF4_NEXT + 16));
    low = _mm512_mask_add_epi32(low, _mm512_cmp_ps_mask(y, next, _CMP_GE_OQ), low, one);
    __m512 share = _mm512_fmadd_ps(_mm512_cvtepi32_ps(bits), _mm512_set1_ps(0x1p-16f), _mm512_set1_ps(0x1p-17f));
    __m512 past = _mm512_sub_ps(y, _mm512_permutexvar_ps(low, _mm512_loadu_ps(NF4_LEVELS)));
    __m512 need = _mm512_mul_ps(share, _mm512_permutexvar_ps(low, _mm512_loadu_ps(NF4_WIDTH)));
    low = _mm512_mask_add_epi32(low, _mm512_cmp_ps_mask(past, need, _CMP_GT_OQ), low, one);
    return _mm512_cvtepi64_epi8(_mm512_or_si512(low, _mm512_srli_epi64(low, 28)));                /* the odd one's to bits 4 to 7 */
}

static inline __m512 values_nf4(const uint8_t *codes) {
    __m128i pairs = _mm_cvtepu8_epi16(_mm_loadl_epi64((const __m128i *)codes));
    __m512i index = _mm512_cvtepu8_epi32(_mm_or_si128(pairs, _mm_slli_epi16(pairs, 4)));          /* of the index the low four bits count */
    return _mm512_permutexvar_ps(index, _mm512_loadu_ps(NF4_LEVELS));
}

/* A whole block under Adam, its moments kept in registers: what the general way does in passes over buffers, with
 * constants multiplied together beforehand: moments are worked on in units of fresh1 and fresh2. The first is in 8 bits, to
 * nearest, or in NF4, by chance; the second in 8 bits, by chance, or given. */
static inline __attribute__((always_inline)) void adam_registers(int m_format, const Adam *a, const Job *job, int64_t at, float decay, const float *g, float *p, float *given) {
    const int span = m_format == NF4 ? 64 : 128;
    const float share = given ? 1.0f : a->fresh2;
    float *v_scale = (float *)job->v_scale + at / 256, m_least = 0x1p100f, v_high = 1.0f, m_unit[4];
    uint16_t *m_scale = (uint16_t *)job->m_scale + at / span;
    uint8_t *m_codes = (uint8_t *)job->m_codes + (m_format == NF4 ? at / 2 : at), *v_codes = (uint8_t *)job->v_codes + at;
    const __m512 three = _mm512_set1_ps(3.0f), two = _mm512_set1_ps(2.0f), zero = _mm512_setzero_ps();
    const float stride = a->stride * a->fresh1;
    const __m512 keep = _mm512_set1_ps(decay), most = _mm512_set1_ps(LIMIT * a->lr);
    const __m512 over = _mm512_set1_ps(0.5f * sqrtf(share) * a->unbias2 / stride), eps = _mm512_set1_ps(a->eps / stride);
    const __m512 v_keep = _mm512_set1_ps(given ? 0.0f : *v_scale / 65025.0f * (a->beta2 / share));
    ALIGNED float m[BLOCK], own[BLOCK], *v = given ? given : own;
    __m512 v_most = zero;
    for (int part = 0; part < BLOCK / span; part++) {
        const __m512 m_keep = _mm512_set1_ps(bf16_float(m_scale[part]) * ((1.0f - a->fresh1) / a->fresh1) / (m_format == NF4 ? 1.0f : 16129.0f));
        __m512 m_most = zero;
        for (int j = span * part; j < span * part + span; j += 16) {
            __m512 grad = _mm512_loadu_ps(g + j), avg, square;
            if (m_format == NF4) {
                avg = values_nf4(m_codes + j / 2);
            } else {
                avg = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(m_codes + j))));
                avg = _mm512_mul_ps(avg, _mm512_abs_ps(avg));
            }
            avg = _mm512_fmadd_ps(avg, m_keep, grad);
            if (given) {
                square = _mm512_load_ps(v + j);
            } else {
                square = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(v_codes + j))));
                square = _mm512_fmadd_ps(grad, grad, _mm512_mul_ps(_mm512_mul_ps(square, square), v_keep));
                _mm512_store_ps(v + j, square);
                v_most = _mm512_max_ps(v_most, square);
            }
            _mm512_store_ps(m + j, avg);
            m_most = _mm512_range_ps(m_most, avg, 0xb);                                       /* the larger in size, without its sign */
            __mmask16 some = _mm512_cmp_ps_mask(square, zero, _CMP_GT_OQ);
            __m512 r = _mm512_rsqrt14_ps(square), root = _mm512_mul_ps(square, r);
            root = _mm512_mul_ps(root, _mm512_fnmadd_ps(root, r, three));                         /* twice the root */
            __m512 under = _mm512_fmadd_ps(root, over, eps), inverse = _mm512_rcp14_ps(under);
            __m512 move = _mm512_mul_ps(_mm512_mul_ps(avg, inverse), _mm512_fnmadd_ps(under, inverse, two));
            move = _mm512_maskz_range_ps(some, move, most, 0x2);                                  /* the smaller in size, the sign of move */
            _mm512_storeu_ps(p + j, _mm512_fmadd_ps(_mm512_loadu_ps(p + j), keep, move));
        }
        const float high = _mm512_reduce_max_ps(m_most) * a->fresh1;
        m_least = less(m_least, high);
        m_scale[part] = float_bf16(high);
        m_unit[part] = (m_format == NF4 ? 1.0f : 16129.0f) * a->fresh1 / bf16_float(m_scale[part]);
    }
    if (!given) {
        v_high = _mm512_reduce_max_ps(v_most);
        *v_scale = v_high * share;
    }
    if (less(m_least, less(v_high, given ? v_high : *v_scale)) < 0x1p-99f) {                      /* zeros, or so small that 1 / scale overflows */
        SIMD for (int j = 0; j < BLOCK; j++) m[j] *= a->fresh1;
        encode(m_format, job->m_codes, job->m_scale, 0, at, BLOCK, m, mix(job->key + 1), m_format == NF4);
        if (given) return;
        SIMD for (int j = 0; j < BLOCK; j++) v[j] *= share;
        encode(UNSIGNED8, job->v_codes, job->v_scale, 0, at, BLOCK, v, mix(job->key + 2), 1);
        return;
    }
    const __m512 v_unit = _mm512_set1_ps(65025.0f * (1.0f - 0x1p-20f) / v_high);
    const __m512i low = _mm512_set1_epi32(0xffff), lanes = _mm512_set1_epi32((int)(16 * GOLDEN));
    __m512i count = _mm512_mullo_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15), _mm512_set1_epi32((int)GOLDEN));
    count = _mm512_add_epi32(count, _mm512_set1_epi32((int)block_key(mix(job->key + (m_format == NF4 ? 1 : 2)), at)));
    for (int j = 0; j < 128; j += 16) {
        const __m512 one_unit = _mm512_set1_ps(m_unit[j / span]), other_unit = _mm512_set1_ps(m_unit[(j + 128) / span]);
        const __m512i bits = mix16(count);
        count = _mm512_add_epi32(count, lanes);
        if (m_format == NF4) {
            _mm_storel_epi64((__m128i *)(m_codes + j / 2), chance_nf4(_mm512_load_ps(m + j), one_unit, _mm512_and_si512(bits, low)));
            _mm_storel_epi64((__m128i *)(m_codes + j / 2 + 64), chance_nf4(_mm512_load_ps(m + j + 128), other_unit, _mm512_srli_epi32(bits, 16)));
        } else {
            _mm_storeu_si128((__m128i *)(m_codes + j), nearest_root(_mm512_load_ps(m + j), one_unit));
            _mm_storeu_si128((__m128i *)(m_codes + j + 128), nearest_root(_mm512_load_ps(m + j + 128), other_unit));
        }
        if (given) continue;
        _mm_storeu_si128((__m128i *)(v_codes + j), chance_root(_mm512_load_ps(v + j), v_unit, _mm512_and_si512(bits, low)));
        _mm_storeu_si128((__m128i *)(v_codes + j + 128), chance_root(_mm512_load_ps(v + j + 128), v_unit, _mm512_srli_epi32(bits, 16)));
    }
}
#endif
