// Vectors of fp32, one type for each instruction set. A vector type says
//   T                 kWidth numbers
//   load, store       memory without alignment; set: one number in every lane
//   fma(a, b, c)      a b + c
//   greater(a, b)     the larger of each lane, b where either is NaN; smaller the same
//   minus_abs(a)      -|a|
//   by_sign(g, a, b)  a where the sign of g is plus, b where it is minus
//   power_of_two(t)   2^n for t = n + 1.5 2^23 with n in [-126, 127], and 0 for n = -127
//   sum, largest      of all lanes
//   sums(p)           lane i is the sum of the kWidth numbers from p + i kWidth on
#pragma once

#include <cstdint>
#include <cstring>

#include "second_moment_tiles.h"  // KEDIT_X86 and the intrinsics

namespace kedit {

// What every processor of the platform has. A compiler without vectors of its own takes the numbers one by one.
struct PlainVector {
#if defined(__GNUC__) || defined(__clang__)
    typedef float T __attribute__((vector_size(16)));
    typedef uint32_t Bits __attribute__((vector_size(16)));
#else
    using T = float;
    using Bits = uint32_t;
#endif
    static constexpr int64_t kWidth = sizeof(T) / sizeof(float);

    static T load(const float* p) {
        T a;
        std::memcpy(&a, p, sizeof a);
        return a;
    }
    static void store(float* p, T a) { std::memcpy(p, &a, sizeof a); }
    static T set(float value) { return T{} + value; }
    static T add(T a, T b) { return a + b; }
    static T mul(T a, T b) { return a * b; }
    static T div(T a, T b) { return a / b; }
    static T fma(T a, T b, T c) { return a * b + c; }
    static T greater(T a, T b) { return a > b ? a : b; }
    static T smaller(T a, T b) { return a < b ? a : b; }
    static T minus_abs(T a) { return of_bits(bits(a) | 0x80000000u); }
    static T by_sign(T g, T a, T b) { return g < T{} ? b : a; }
    static T power_of_two(T t) { return of_bits((bits(t) << 23) + 0x3f800000u); }
    static float sum(T a) {
        float lanes[kWidth], total = 0;
        store(lanes, a);
        for (const float lane : lanes) total += lane;
        return total;
    }
    static float largest(T a) {
        float lanes[kWidth];
        store(lanes, a);
        float found = lanes[0];
        for (const float lane : lanes) found = lane > found ? lane : found;
        return found;
    }
    static T sums(const float* p) {
        float lanes[kWidth];
        for (int64_t i = 0; i < kWidth; ++i) lanes[i] = sum(load(p + i * kWidth));
        return load(lanes);
    }

    static Bits bits(T a) {
        Bits b;
        std::memcpy(&b, &a, sizeof b);
        return b;
    }
    static T of_bits(Bits b) {
        T a;
        std::memcpy(&a, &b, sizeof a);
        return a;
    }
};

#ifdef KEDIT_X86

__attribute__((target("avx2"), always_inline)) inline float sum_of(__m256 a) {
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    four = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
}

__attribute__((target("avx2"), always_inline)) inline float largest_of(__m256 a) {
    __m128 four = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    four = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(four, _mm_movehdup_ps(four)));
}

#define KEDIT_OPERATION __attribute__((target("avx2,fma"), always_inline)) static inline

struct Avx2Vector {
    using T = __m256;
    static constexpr int64_t kWidth = 8;

    KEDIT_OPERATION T load(const float* p) { return _mm256_loadu_ps(p); }
    KEDIT_OPERATION void store(float* p, T a) { _mm256_storeu_ps(p, a); }
    KEDIT_OPERATION T set(float value) { return _mm256_set1_ps(value); }
    KEDIT_OPERATION T add(T a, T b) { return _mm256_add_ps(a, b); }
    KEDIT_OPERATION T mul(T a, T b) { return _mm256_mul_ps(a, b); }
    KEDIT_OPERATION T div(T a, T b) { return _mm256_div_ps(a, b); }
    KEDIT_OPERATION T fma(T a, T b, T c) { return _mm256_fmadd_ps(a, b, c); }
    KEDIT_OPERATION T greater(T a, T b) { return _mm256_max_ps(a, b); }
    KEDIT_OPERATION T smaller(T a, T b) { return _mm256_min_ps(a, b); }
    KEDIT_OPERATION T minus_abs(T a) { return _mm256_or_ps(a, set(-0.0f)); }
    KEDIT_OPERATION T by_sign(T g, T a, T b) { return _mm256_blendv_ps(a, b, g); }
    KEDIT_OPERATION T power_of_two(T t) {
        const __m256i exponent = _mm256_slli_epi32(_mm256_castps_si256(t), 23);
        return _mm256_castsi256_ps(_mm256_add_epi32(exponent, _mm256_set1_epi32(0x3f800000)));
    }
    KEDIT_OPERATION float sum(T a) { return sum_of(a); }
    KEDIT_OPERATION float largest(T a) { return largest_of(a); }
    // Two vectors become one that holds halves of both sums, three times: lanes at distance 2, 1, then 4.
    KEDIT_OPERATION T sums(const float* p) {
        T four[2];
        for (int i = 0; i < 2; ++i) {
            const float* at = p + 4 * i * kWidth;
            const T a = by_two(load(at), load(at + kWidth)), b = by_two(load(at + 2 * kWidth), load(at + 3 * kWidth));
            four[i] = by_one(a, b);
        }
        return add(_mm256_permute2f128_ps(four[0], four[1], 0x20), _mm256_permute2f128_ps(four[0], four[1], 0x31));
    }
    KEDIT_OPERATION T by_two(T a, T b) { return add(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b)); }
    KEDIT_OPERATION T by_one(T a, T b) {
        const __m256d c = _mm256_castps_pd(a), d = _mm256_castps_pd(b);
        return add(_mm256_castpd_ps(_mm256_unpacklo_pd(c, d)), _mm256_castpd_ps(_mm256_unpackhi_pd(c, d)));
    }
};

#undef KEDIT_OPERATION
#define KEDIT_OPERATION __attribute__((target("avx512f"), always_inline)) static inline

// max, min and shift with a mask of all lanes: the same instructions, and GCC 12 warns of no undefined lanes.
struct Avx512Vector {
    using T = __m512;
    static constexpr int64_t kWidth = 16;
    static constexpr __mmask16 kAll = 0xffff;

    KEDIT_OPERATION T load(const float* p) { return _mm512_loadu_ps(p); }
    KEDIT_OPERATION void store(float* p, T a) { _mm512_storeu_ps(p, a); }
    KEDIT_OPERATION T set(float value) { return _mm512_set1_ps(value); }
    KEDIT_OPERATION T add(T a, T b) { return _mm512_add_ps(a, b); }
    KEDIT_OPERATION T mul(T a, T b) { return _mm512_mul_ps(a, b); }
    KEDIT_OPERATION T div(T a, T b) { return _mm512_div_ps(a, b); }
    KEDIT_OPERATION T fma(T a, T b, T c) { return _mm512_fmadd_ps(a, b, c); }
    KEDIT_OPERATION T greater(T a, T b) { return _mm512_maskz_max_ps(kAll, a, b); }
    KEDIT_OPERATION T smaller(T a, T b) { return _mm512_maskz_min_ps(kAll, a, b); }
    KEDIT_OPERATION T minus_abs(T a) {
        return _mm512_castsi512_ps(_mm512_or_si512(_mm512_castps_si512(a), _mm512_set1_epi32(INT32_MIN)));
    }
    KEDIT_OPERATION T by_sign(T g, T a, T b) {
        return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(g, _mm512_setzero_ps(), _CMP_LT_OQ), a, b);
    }
    KEDIT_OPERATION T power_of_two(T t) {
        const __m512i exponent = _mm512_maskz_slli_epi32(kAll, _mm512_castps_si512(t), 23);
        return _mm512_castsi512_ps(_mm512_add_epi32(exponent, _mm512_set1_epi32(0x3f800000)));
    }
    KEDIT_OPERATION float sum(T a) {
        float lanes[kWidth];
        store(lanes, a);
        return sum_of(_mm256_add_ps(_mm256_loadu_ps(lanes), _mm256_loadu_ps(lanes + 8)));
    }
    KEDIT_OPERATION float largest(T a) {
        float lanes[kWidth];
        store(lanes, a);
        return largest_of(_mm256_max_ps(_mm256_loadu_ps(lanes), _mm256_loadu_ps(lanes + 8)));
    }
    // As Avx2Vector's, then the quarters of four vectors.
    KEDIT_OPERATION T sums(const float* p) {
        T four[4];
        for (int i = 0; i < 4; ++i) {
            const float* at = p + 4 * i * kWidth;
            const T a = by_two(load(at), load(at + kWidth)), b = by_two(load(at + 2 * kWidth), load(at + 3 * kWidth));
            four[i] = by_one(a, b);
        }
        return by_quarters(by_quarters(four[0], four[1]), by_quarters(four[2], four[3]));
    }
    KEDIT_OPERATION T by_two(T a, T b) {
        return add(_mm512_maskz_unpacklo_ps(kAll, a, b), _mm512_maskz_unpackhi_ps(kAll, a, b));
    }
    KEDIT_OPERATION T by_one(T a, T b) {
        const __m512d c = _mm512_castps_pd(a), d = _mm512_castps_pd(b);
        const __mmask8 all = 0xff;
        return add(_mm512_castpd_ps(_mm512_maskz_unpacklo_pd(all, c, d)),
                   _mm512_castpd_ps(_mm512_maskz_unpackhi_pd(all, c, d)));
    }
    KEDIT_OPERATION T by_quarters(T a, T b) {
        return add(_mm512_maskz_shuffle_f32x4(kAll, a, b, 0x88), _mm512_maskz_shuffle_f32x4(kAll, a, b, 0xdd));
    }
};

#undef KEDIT_OPERATION

#endif  // KEDIT_X86

}  // namespace kedit
