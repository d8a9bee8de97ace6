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
#include <type_traits>
#include <utility>

#include "second_moment_tiles.h"

namespace kedit {
namespace {

constexpr int64_t kBlock = 256;  // rows of keys summed in fp32 before they are added to c
constexpr int64_t kGroup = 4;    // panels a side of a task: its 2 x 4 packed panels fit a second-level cache of 512 KiB

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

float from_bits(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

float widened(float key) { return key; }
float widened(Bfloat key) { return from_bits(static_cast<uint32_t>(key.bits) << 16); }

// Exponent and mantissa of fp16 in the place of those of fp32 are the number times 2^-112, subnormals included.
float widened(Half key) {
    const float magnitude = from_bits(static_cast<uint32_t>(key.bits & 0x7fff) << 13) * 0x1p112f;
    return key.bits & 0x8000 ? -magnitude : magnitude;
}

// NaN and infinity, and they only, have all bits of the exponent set.
bool finite(float key) {
    uint32_t bits;
    std::memcpy(&bits, &key, sizeof bits);
    return (bits & 0x7f800000u) != 0x7f800000u;
}
bool finite(Half key) { return (key.bits & 0x7c00) != 0x7c00; }
bool finite(Bfloat key) { return (key.bits & 0x7f80) != 0x7f80; }

template <class Key>
struct Keys {
    const Key* data;
    int64_t n, d, stride;
};

template <class Key>
bool all_finite(const Keys<Key>& keys, int threads) {
    int bad = 0;
#pragma omp parallel for num_threads(threads) reduction(| : bad) schedule(static)
    for (int64_t row = 0; row < keys.n; ++row) {
        const Key* const values = keys.data + row * keys.stride;
        int row_bad = 0;
        for (int64_t j = 0; j < keys.d; ++j) row_bad |= !finite(values[j]);
        bad |= row_bad;
    }
    (void)threads;
    return bad == 0;
}

// Step s, column j of a packed panel stands at packed[s * kPanel + j]. Beyond the last column stand zeros: their
// products are never used, but garbage there may be subnormal and slow.
template <class Tile, class Key>
void pack_panel(const Keys<Key>& keys, int64_t first, int64_t rows, int64_t column, typename Tile::Packed* packed) {
    const int64_t given = std::min(Tile::kPanel, keys.d - column);
    for (int64_t row = 0; row < rows; row += Tile::kRows, packed += Tile::kPanel) {
        const Key* const values = keys.data + (first + row) * keys.stride + column;
        if constexpr (Tile::kRows == 1) {
            for (int64_t j = 0; j < given; ++j) packed[j] = widened(values[j]);
        } else if (row + 1 < rows) {
            const Key* const next = values + keys.stride;
            for (int64_t j = 0; j < given; ++j)
                packed[j].bits = values[j].bits | static_cast<uint32_t>(next[j].bits) << 16;
        } else {
            for (int64_t j = 0; j < given; ++j) packed[j].bits = values[j].bits;
        }
        std::fill(packed + given, packed + Tile::kPanel, typename Tile::Packed{});
    }
}

// Asks for the part of c that a tile will be added to, so that it arrives while the tile is multiplied: 1.73x
// torch.addmm without, 1.92x with (fp64 c, AVX-512, 4096 x 1536 and 4096 x 4096, one thread of a Zen 4).
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
void add_panel_pair(Accumulator* c, int64_t c_stride, int64_t d, const typename Tile::Packed* left, int64_t row_begin,
                    const typename Tile::Packed* right, int64_t column_begin, int64_t steps) {
    alignas(64) float tile[Tile::kHeight * Tile::kWidth];
    const int64_t row_end = std::min(row_begin + Tile::kPanel, d);
    const int64_t column_end = std::min(column_begin + Tile::kPanel, d);
    for (int64_t i = row_begin; i < row_end; i += Tile::kHeight) {
        const int64_t i_end = std::min(i + Tile::kHeight, row_end);
        for (int64_t j = column_begin; j < std::min(column_end, i_end); j += Tile::kWidth) {
            prefetch_rows(c + i * c_stride + j, c_stride, i_end - i, std::min(Tile::kWidth, column_end - j));
            Tile::multiply(left + (i - row_begin), right + (j - column_begin), steps, tile);
            for (int64_t r = i; r < i_end; ++r) {
                const int64_t columns = std::min({Tile::kWidth, column_end - j, r + 1 - j});
                Tile::merge(c + r * c_stride + j, tile + (r - i) * Tile::kWidth, columns);
            }
        }
    }
}

struct AlignedDelete {
    void operator()(void* p) const { ::operator delete(p, std::align_val_t(64)); }
};

template <class Tile, class Accumulator, class Key>
void accumulate(Accumulator* c, int64_t c_stride, const Keys<Key>& keys, int threads) {
    using Packed = typename Tile::Packed;
    const int64_t panels = ceil_div(keys.d, Tile::kPanel), groups = ceil_div(panels, kGroup);
    const int64_t panel_size = ceil_div(std::min(kBlock, keys.n), Tile::kRows) * Tile::kPanel;
    const std::unique_ptr<Packed, AlignedDelete> memory(
        static_cast<Packed*>(::operator new(sizeof(Packed) * panels * panel_size, std::align_val_t(64))));
    Packed* const packed = memory.get();

    std::vector<std::pair<int64_t, int64_t>> tasks;  // pairs of groups of panels on or below the diagonal
    for (int64_t left = 0; left < groups; ++left)
        for (int64_t right = 0; right <= left; ++right) tasks.emplace_back(left, right);
    const int64_t n_tasks = static_cast<int64_t>(tasks.size());

#pragma omp parallel num_threads(threads)
    for (int64_t first = 0; first < keys.n; first += kBlock) {
        const int64_t rows = std::min(kBlock, keys.n - first), steps = ceil_div(rows, Tile::kRows);
#pragma omp for schedule(static)
        for (int64_t p = 0; p < panels; ++p)
            pack_panel<Tile>(keys, first, rows, p * Tile::kPanel, packed + p * panel_size);
#pragma omp for schedule(dynamic)
        for (int64_t t = 0; t < n_tasks; ++t) {
            const auto [left_group, right_group] = tasks[t];
            const int64_t left_end = std::min((left_group + 1) * kGroup, panels);
            const int64_t right_end = std::min((right_group + 1) * kGroup, panels);
            for (int64_t left = left_group * kGroup; left < left_end; ++left)
                for (int64_t right = right_group * kGroup; right < std::min(right_end, left + 1); ++right)
                    add_panel_pair<Tile>(c, c_stride, keys.d, packed + left * panel_size, left * Tile::kPanel,
                                         packed + right * panel_size, right * Tile::kPanel, steps);
        }
    }
    (void)threads;
}

}  // namespace

std::vector<std::string> instruction_sets() {
    std::vector<std::string> names;
#ifdef KEDIT_X86
    __builtin_cpu_init();
#ifdef KEDIT_AVX512_BF16
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bf16")) names.emplace_back("avx512_bf16");
#endif
    if (__builtin_cpu_supports("avx512f")) names.emplace_back("avx512");
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) names.emplace_back("avx2");
#endif
    names.emplace_back("plain");
    return names;
}

std::string known_instruction_set(const std::string& name) {
    const std::vector<std::string> known = instruction_sets();
    if (name.empty()) return known.front();
    if (std::find(known.begin(), known.end(), name) == known.end())
        throw std::invalid_argument("this processor or build has no instruction set '" + name + "'");
    return name;
}

bool has_openmp() {
#ifdef _OPENMP
    return true;
#else
    return false;
#endif
}

template <class Accumulator, class Key>
bool second_moment(Accumulator* c, int64_t c_stride, const Key* keys, int64_t n, int64_t d, int64_t key_stride,
                   int threads, const std::string& instruction_set) {
    const std::string name = known_instruction_set(instruction_set);
    const Keys<Key> rows{keys, n, d, key_stride};
    if (n == 0 || d == 0) return true;
    if (!all_finite(rows, threads)) return false;
#ifdef KEDIT_AVX512_BF16
    if constexpr (std::is_same_v<Key, Bfloat>) {
        if (name == "avx512_bf16") {
            accumulate<Avx512Bf16Tile>(c, c_stride, rows, threads);
            return true;
        }
    }
#endif
#ifdef KEDIT_X86
    if (name == "avx512" || name == "avx512_bf16")
        accumulate<Avx512Tile>(c, c_stride, rows, threads);
    else if (name == "avx2")
        accumulate<Avx2Tile>(c, c_stride, rows, threads);
    else
#endif
        accumulate<PlainTile>(c, c_stride, rows, threads);
    return true;
}

#define KEDIT_INSTANTIATE(Accumulator, Key)                                                                  \
    template bool second_moment(Accumulator*, int64_t, const Key*, int64_t, int64_t, int64_t, int,            \
                                const std::string&)
KEDIT_INSTANTIATE(float, float);
KEDIT_INSTANTIATE(float, Half);
KEDIT_INSTANTIATE(float, Bfloat);
KEDIT_INSTANTIATE(double, float);
KEDIT_INSTANTIATE(double, Half);
KEDIT_INSTANTIATE(double, Bfloat);
#undef KEDIT_INSTANTIATE

}  // namespace kedit
