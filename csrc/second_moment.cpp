// Blocked symmetric product. 256 rows of keys are packed into panels of columns; every pair of panels on or below the
// diagonal is multiplied in register tiles, fp32, and each finished tile is added to c.
//
// 256 rows: the fp32 chain inside one block is what limits the accuracy when c is fp64. At 4096 rows of standard normal
// keys the largest error halves from 512 to 256 rows, and the time does not change.

#include "second_moment.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <new>
#include <stdexcept>
#include <utility>

#if (defined(__x86_64__) || defined(__i386__)) && (defined(__GNUC__) || defined(__clang__))
#define KEDIT_X86 1
#include <immintrin.h>
#endif

namespace kedit {
namespace {

constexpr int64_t kRows = 256;  // rows of keys summed in fp32 before they are added to c
constexpr int64_t kGroup = 4;   // panels a side of one task: 2 x 4 packed panels stay in a second-level cache of 512 KiB

// A tile type owns one shape of register tile and the instructions it is made of:
//   panel     columns packed side by side, a multiple of both tile sides
//   height    columns of the left panel (rows of c), width: columns of the right panel
//   multiply  out[height, width] = sum over rows of left[row, :height]^T right[row, :width], both panel floats a row
//   merge     adds one row of a finished tile to c

struct PlainTile {
    static constexpr int64_t panel = 32, height = 4, width = 8;

    static void multiply(const float* left, const float* right, int64_t rows, float* out) {
        float sum[height][width] = {};
        for (int64_t row = 0; row < rows; ++row, left += panel, right += panel)
            for (int64_t i = 0; i < height; ++i)
                for (int64_t j = 0; j < width; ++j) sum[i][j] += left[i] * right[j];
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
    static constexpr int64_t panel = 48, height = 6, width = 16;

    __attribute__((target("avx2,fma"))) static void multiply(const float* left, const float* right, int64_t rows,
                                                             float* out) {
        __m256 sum[height][2];
#pragma GCC unroll 6
        for (int i = 0; i < height; ++i) sum[i][0] = sum[i][1] = _mm256_setzero_ps();
        for (int64_t row = 0; row < rows; ++row, left += panel, right += panel) {
            const __m256 low = _mm256_load_ps(right), high = _mm256_load_ps(right + 8);
#pragma GCC unroll 6
            for (int i = 0; i < height; ++i) {
                const __m256 value = _mm256_broadcast_ss(left + i);
                sum[i][0] = _mm256_fmadd_ps(value, low, sum[i][0]);
                sum[i][1] = _mm256_fmadd_ps(value, high, sum[i][1]);
            }
        }
#pragma GCC unroll 6
        for (int i = 0; i < height; ++i) {
            _mm256_store_ps(out + i * width, sum[i][0]);
            _mm256_store_ps(out + i * width + 8, sum[i][1]);
        }
    }

    template <class Accumulator>
    __attribute__((target("avx2,fma"))) static void merge(Accumulator* c, const float* tile, int64_t columns) {
        for (int64_t j = 0; j < columns; ++j) c[j] += tile[j];
    }
};

// 8 x 32: sixteen accumulators, so that each loaded value of either side serves several products.
struct Avx512Tile {
    static constexpr int64_t panel = 32, height = 8, width = 32;

    __attribute__((target("avx512f"))) static void multiply(const float* left, const float* right, int64_t rows,
                                                            float* out) {
        __m512 sum[height][2];
#pragma GCC unroll 8
        for (int i = 0; i < height; ++i) sum[i][0] = sum[i][1] = _mm512_setzero_ps();
        for (int64_t row = 0; row < rows; ++row, left += panel, right += panel) {
            const __m512 low = _mm512_load_ps(right), high = _mm512_load_ps(right + 16);
#pragma GCC unroll 8
            for (int i = 0; i < height; ++i) {
                const __m512 value = _mm512_set1_ps(left[i]);
                sum[i][0] = _mm512_fmadd_ps(value, low, sum[i][0]);
                sum[i][1] = _mm512_fmadd_ps(value, high, sum[i][1]);
            }
        }
#pragma GCC unroll 8
        for (int i = 0; i < height; ++i) {
            _mm512_store_ps(out + i * width, sum[i][0]);
            _mm512_store_ps(out + i * width + 16, sum[i][1]);
        }
    }

    template <class Accumulator>
    __attribute__((target("avx512f"))) static void merge(Accumulator* c, const float* tile, int64_t columns) {
        for (int64_t j = 0; j < columns; ++j) c[j] += tile[j];
    }
};

#endif  // KEDIT_X86

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Keys {
    const float* data;
    int64_t n, d, stride;
};

bool all_finite(const Keys& keys, int threads) {
    constexpr uint32_t exponent = 0x7f800000u;  // all ones for NaN and infinity only
    int bad = 0;
#pragma omp parallel for num_threads(threads) reduction(| : bad) schedule(static)
    for (int64_t row = 0; row < keys.n; ++row) {
        const float* values = keys.data + row * keys.stride;
        int row_bad = 0;
        for (int64_t j = 0; j < keys.d; ++j) {
            uint32_t bits;
            std::memcpy(&bits, values + j, sizeof bits);
            row_bad |= (bits & exponent) == exponent;
        }
        bad |= row_bad;
    }
    (void)threads;
    return bad == 0;
}

// packed[row, 0:panel] = keys[first + row, column : column + panel]. Beyond the last column stand zeros: their products
// are never used, but garbage there may be subnormal and slow.
void pack_panel(const Keys& keys, int64_t first, int64_t rows, int64_t column, int64_t panel, float* packed) {
    const size_t given = sizeof(float) * std::min(panel, keys.d - column), whole = sizeof(float) * panel;
    for (int64_t row = 0; row < rows; ++row, packed += panel) {
        std::memcpy(packed, keys.data + (first + row) * keys.stride + column, given);
        std::memset(reinterpret_cast<char*>(packed) + given, 0, whole - given);
    }
}

// Asks for the part of c that a tile will be added to, so that it arrives while the tile is multiplied: 1.73x torch.addmm
// without, 1.92x with (fp64 c, AVX-512, 4096 x 1536 and 4096 x 4096, one thread of a Zen 4).
template <class Accumulator>
void prefetch_rows(const Accumulator* c, int64_t c_stride, int64_t rows, int64_t columns) {
#if defined(__GNUC__) || defined(__clang__)
    constexpr int64_t line = 64 / sizeof(Accumulator);
    for (int64_t r = 0; r < rows; ++r)
        for (int64_t j = 0; j < columns; j += line) __builtin_prefetch(c + r * c_stride + j, 1);
#endif
}

// Adds the products of two packed panels to c, where they lie on or below the diagonal.
template <class Tile, class Accumulator>
void add_panel_pair(Accumulator* c, int64_t c_stride, int64_t d, const float* left, int64_t row_begin,
                    const float* right, int64_t column_begin, int64_t rows) {
    alignas(64) float tile[Tile::height * Tile::width];
    const int64_t row_end = std::min(row_begin + Tile::panel, d), column_end = std::min(column_begin + Tile::panel, d);
    for (int64_t i = row_begin; i < row_end; i += Tile::height) {
        const int64_t i_end = std::min(i + Tile::height, row_end);
        for (int64_t j = column_begin; j < std::min(column_end, i_end); j += Tile::width) {
            prefetch_rows(c + i * c_stride + j, c_stride, i_end - i, std::min(Tile::width, column_end - j));
            Tile::multiply(left + (i - row_begin), right + (j - column_begin), rows, tile);
            for (int64_t r = i; r < i_end; ++r) {
                const int64_t columns = std::min({Tile::width, column_end - j, r + 1 - j});
                Tile::merge(c + r * c_stride + j, tile + (r - i) * Tile::width, columns);
            }
        }
    }
}

struct AlignedDelete {
    void operator()(float* p) const { ::operator delete(p, std::align_val_t(64)); }
};

template <class Tile, class Accumulator>
void accumulate(Accumulator* c, int64_t c_stride, const Keys& keys, int threads) {
    const int64_t panels = ceil_div(keys.d, Tile::panel), groups = ceil_div(panels, kGroup);
    const int64_t packed_rows = std::min(kRows, keys.n), panel_size = packed_rows * Tile::panel;
    const std::unique_ptr<float, AlignedDelete> memory(
        static_cast<float*>(::operator new(sizeof(float) * panels * panel_size, std::align_val_t(64))));
    float* const packed = memory.get();

    std::vector<std::pair<int64_t, int64_t>> tasks;  // pairs of groups of panels on or below the diagonal
    for (int64_t left = 0; left < groups; ++left)
        for (int64_t right = 0; right <= left; ++right) tasks.emplace_back(left, right);
    const int64_t n_tasks = static_cast<int64_t>(tasks.size());

#pragma omp parallel num_threads(threads)
    for (int64_t first = 0; first < keys.n; first += kRows) {
        const int64_t rows = std::min(kRows, keys.n - first);
#pragma omp for schedule(static)
        for (int64_t p = 0; p < panels; ++p)
            pack_panel(keys, first, rows, p * Tile::panel, Tile::panel, packed + p * panel_size);
#pragma omp for schedule(dynamic)
        for (int64_t t = 0; t < n_tasks; ++t) {
            const auto [left_group, right_group] = tasks[t];
            const int64_t left_end = std::min((left_group + 1) * kGroup, panels);
            const int64_t right_end = std::min((right_group + 1) * kGroup, panels);
            for (int64_t left = left_group * kGroup; left < left_end; ++left)
                for (int64_t right = right_group * kGroup; right < std::min(right_end, left + 1); ++right)
                    add_panel_pair<Tile>(c, c_stride, keys.d, packed + left * panel_size, left * Tile::panel,
                                         packed + right * panel_size, right * Tile::panel, rows);
        }
    }
    (void)threads;
}

}  // namespace

std::vector<std::string> instruction_sets() {
    std::vector<std::string> names;
#ifdef KEDIT_X86
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f")) names.emplace_back("avx512");
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) names.emplace_back("avx2");
#endif
    names.emplace_back("plain");
    return names;
}

bool has_openmp() {
#ifdef _OPENMP
    return true;
#else
    return false;
#endif
}

template <class Accumulator>
bool second_moment(Accumulator* c, int64_t c_stride, const float* keys, int64_t n, int64_t d, int64_t key_stride,
                   int threads, const std::string& instruction_set) {
    const std::vector<std::string> known = instruction_sets();
    const std::string name = instruction_set.empty() ? known.front() : instruction_set;
    if (std::find(known.begin(), known.end(), name) == known.end())
        throw std::invalid_argument("this processor or build has no instruction set '" + name + "'");
    const Keys rows{keys, n, d, key_stride};
    if (n == 0 || d == 0) return true;
    if (!all_finite(rows, threads)) return false;
#ifdef KEDIT_X86
    if (name == "avx512")
        accumulate<Avx512Tile>(c, c_stride, rows, threads);
    else if (name == "avx2")
        accumulate<Avx2Tile>(c, c_stride, rows, threads);
    else
#endif
        accumulate<PlainTile>(c, c_stride, rows, threads);
    return true;
}

template bool second_moment(float*, int64_t, const float*, int64_t, int64_t, int64_t, int, const std::string&);
template bool second_moment(double*, int64_t, const float*, int64_t, int64_t, int64_t, int, const std::string&);

}  // namespace kedit
