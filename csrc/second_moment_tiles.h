// Register tiles of the symmetric product, one for each instruction set. A tile type says
//   Packed     one column of one step as it lies in a packed panel
//   kRows      rows of keys in one step
//   kPanel     columns packed side by side, a multiple of both tile sides
//   kHeight    columns of the left panel (rows of c), kWidth: columns of the right panel
//   multiply   out[kHeight, kWidth] = sum over steps of left[step, :kHeight]^T right[step, :kWidth]; steps of both
//              panels lie kPanel elements apart
//   merge      adds one row of a finished tile to c
#pragma once

#include <cstdint>
#include <cstring>

#if (defined(__x86_64__) || defined(__i386__)) && (defined(__GNUC__) || defined(__clang__))
#define KEDIT_X86 1
#include <immintrin.h>
// The first compilers that know vdpbf16ps and can ask the processor for it.
#if (defined(__clang__) && __clang_major__ >= 12) || (!defined(__clang__) && __GNUC__ >= 11)
#define KEDIT_AVX512_BF16 1
#endif
#endif

namespace kedit {

// The same column of two rows of bf16 keys: bits 0 to 15 the even row, 16 to 31 the odd one.
struct Bf16Pair {
    uint32_t bits;
};

struct PlainTile {
    using Packed = float;
    static constexpr int64_t kRows = 1, kPanel = 32, kHeight = 4, kWidth = 8;

    static void multiply(const float* left, const float* right, int64_t steps, float* out) {
        float sum[kHeight][kWidth] = {};
        for (int64_t step = 0; step < steps; ++step, left += kPanel, right += kPanel)
            for (int64_t i = 0; i < kHeight; ++i)
                for (int64_t j = 0; j < kWidth; ++j) sum[i][j] += left[i] * right[j];
        std::memcpy(out, sum, sizeof sum);
    }

    template <class Accumulator>
    static void merge(Accumulator* c, const float* tile, int64_t columns) {
        for (int64_t j = 0; j < columns; ++j) c[j] += tile[j];
    }
};

#ifdef KEDIT_X86

// 6 x 16: twelve accumulators, two right vectors and a broadcast fill 15 of the 16 registers.
struct Avx2Tile {
    using Packed = float;
    static constexpr int64_t kRows = 1, kPanel = 48, kHeight = 6, kWidth = 16;

    __attribute__((target("avx2,fma"))) static void multiply(const float* left, const float* right, int64_t steps,
                                                             float* out) {
        __m256 sum[kHeight][2];
#pragma GCC unroll 6
        for (int i = 0; i < kHeight; ++i) sum[i][0] = sum[i][1] = _mm256_setzero_ps();
        for (int64_t step = 0; step < steps; ++step, left += kPanel, right += kPanel) {
            const __m256 low = _mm256_load_ps(right), high = _mm256_load_ps(right + 8);
#pragma GCC unroll 6
            for (int i = 0; i < kHeight; ++i) {
                const __m256 value = _mm256_broadcast_ss(left + i);
                sum[i][0] = _mm256_fmadd_ps(value, low, sum[i][0]);
                sum[i][1] = _mm256_fmadd_ps(value, high, sum[i][1]);
            }
        }
#pragma GCC unroll 6
        for (int i = 0; i < kHeight; ++i) {
            _mm256_store_ps(out + i * kWidth, sum[i][0]);
            _mm256_store_ps(out + i * kWidth + 8, sum[i][1]);
        }
    }

    template <class Accumulator>
    __attribute__((target("avx2,fma"))) static void merge(Accumulator* c, const float* tile, int64_t columns) {
        for (int64_t j = 0; j < columns; ++j) c[j] += tile[j];
    }
};

// 8 x 32: sixteen accumulators, so that each loaded value of either side serves several products.
struct Avx512Tile {
    using Packed = float;
    static constexpr int64_t kRows = 1, kPanel = 32, kHeight = 8, kWidth = 32;

    __attribute__((target("avx512f"))) static void multiply(const float* left, const float* right, int64_t steps,
                                                            float* out) {
        __m512 sum[kHeight][2];
#pragma GCC unroll 8
        for (int i = 0; i < kHeight; ++i) sum[i][0] = sum[i][1] = _mm512_setzero_ps();
        for (int64_t step = 0; step < steps; ++step, left += kPanel, right += kPanel) {
            const __m512 low = _mm512_load_ps(right), high = _mm512_load_ps(right + 16);
#pragma GCC unroll 8
            for (int i = 0; i < kHeight; ++i) {
                const __m512 value = _mm512_set1_ps(left[i]);
                sum[i][0] = _mm512_fmadd_ps(value, low, sum[i][0]);
                sum[i][1] = _mm512_fmadd_ps(value, high, sum[i][1]);
            }
        }
        store(sum, out);
    }

    __attribute__((target("avx512f"), always_inline)) static inline void store(const __m512 (&sum)[kHeight][2],
                                                                               float* out) {
#pragma GCC unroll 8
        for (int i = 0; i < kHeight; ++i) {
            _mm512_store_ps(out + i * kWidth, sum[i][0]);
            _mm512_store_ps(out + i * kWidth + 16, sum[i][1]);
        }
    }

    template <class Accumulator>
    __attribute__((target("avx512f"))) static void merge(Accumulator* c, const float* tile, int64_t columns) {
        for (int64_t j = 0; j < columns; ++j) c[j] += tile[j];
    }
};

#endif  // KEDIT_X86

#ifdef KEDIT_AVX512_BF16

// The same shape with two rows a step: vdpbf16ps adds the products of both halves of a lane to an fp32 sum, at the pace
// of an fp32 product. It takes subnormals for zeros.
struct Avx512Bf16Tile : Avx512Tile {
    using Packed = Bf16Pair;
    static constexpr int64_t kRows = 2;

    __attribute__((target("avx512f,avx512bf16"))) static void multiply(const Bf16Pair* left, const Bf16Pair* right,
                                                                       int64_t steps, float* out) {
        __m512 sum[kHeight][2];
#pragma GCC unroll 8
        for (int i = 0; i < kHeight; ++i) sum[i][0] = sum[i][1] = _mm512_setzero_ps();
        for (int64_t step = 0; step < steps; ++step, left += kPanel, right += kPanel) {
            const __m512bh low = (__m512bh)_mm512_load_si512(right), high = (__m512bh)_mm512_load_si512(right + 16);
#pragma GCC unroll 8
            for (int i = 0; i < kHeight; ++i) {
                const __m512bh value = (__m512bh)_mm512_set1_epi32(static_cast<int>(left[i].bits));
                sum[i][0] = _mm512_dpbf16_ps(sum[i][0], value, low);
                sum[i][1] = _mm512_dpbf16_ps(sum[i][1], value, high);
            }
        }
        store(sum, out);
    }
};

#endif  // KEDIT_AVX512_BF16

}  // namespace kedit
