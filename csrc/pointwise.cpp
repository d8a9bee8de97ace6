// Each op reads its inputs from memory once and writes its results once; what a row is read for twice lies in a cache.

#include "pointwise.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <initializer_list>
#include <limits>

#include "second_moment.h"
#include "team.h"
#include "vectors.h"

namespace kedit {
namespace {

// One row of every op, for one instruction set; those with an activation by Act.
struct Kernels {
    void (*rms_norm)(float* out, const float* x, const float* weight, int64_t d, float eps, float offset);
    void (*rms_norm_backward)(float* dx, const float* dy, const float* x, const float* weight, int64_t d, float eps,
                              float offset);
    void (*gated[2])(float* out, const float* gate, const float* up, int64_t n);
    void (*gated_backward[2])(float* d_gate, float* d_up, const float* d, const float* gate, const float* up,
                              int64_t n);
    float (*log_sum_exp)(const float* x, int64_t n);
};

#define KEDIT_ROWS "pointwise_rows.h"
#include "each_instruction_set.h"

// Pieces of rows: rows that lie together are one long row.
struct Pieces {
    static constexpr int64_t kLength = 4096;
    int64_t n, a_stride, b_stride, in_row, count;

    Pieces(int64_t rows, int64_t n, int64_t a_stride, int64_t b_stride)
        : n(a_stride == n && b_stride == n ? rows * n : n), a_stride(a_stride), b_stride(b_stride) {
        in_row = (this->n + kLength - 1) / kLength;
        count = this->n == n ? rows * in_row : in_row;
    }
    int64_t row(int64_t piece) const { return piece / in_row; }
    int64_t begin(int64_t piece) const { return piece % in_row * kLength; }
    int64_t length(int64_t piece) const { return std::min(kLength, n - begin(piece)); }
};

}  // namespace

void rms_norm(float* out, const float* x, const float* weight, int64_t rows, int64_t d, int64_t x_stride, float eps,
              float offset, int threads, const std::string& instruction_set) {
    const auto run = table_of(instruction_set).rms_norm;
#pragma omp parallel for num_threads(team_for(rows * d, threads)) schedule(static)
    for (int64_t row = 0; row < rows; ++row) run(out + row * d, x + row * x_stride, weight, d, eps, offset);
    (void)threads;
}

void rms_norm_backward(float* dx, const float* dy, const float* x, const float* weight, int64_t rows, int64_t d,
                       int64_t x_stride, float eps, float offset, int threads, const std::string& instruction_set) {
    const auto run = table_of(instruction_set).rms_norm_backward;
#pragma omp parallel for num_threads(team_for(rows * d, threads)) schedule(static)
    for (int64_t row = 0; row < rows; ++row)
        run(dx + row * d, dy + row * d, x + row * x_stride, weight, d, eps, offset);
    (void)threads;
}

void log_sum_exp(float* out, const float* x, int64_t rows, int64_t n, int64_t x_stride, int threads,
                 const std::string& instruction_set) {
    const auto run = table_of(instruction_set).log_sum_exp;
#pragma omp parallel for num_threads(team_for(rows * n, threads)) schedule(static)
    for (int64_t row = 0; row < rows; ++row) out[row] = run(x + row * x_stride, n);
    (void)threads;
}

void gated(float* out, const float* gate, const float* up, int64_t rows, int64_t n, int64_t gate_stride,
           int64_t up_stride, Act act, int threads, const std::string& instruction_set) {
    const auto run = table_of(instruction_set).gated[static_cast<int>(act)];
    const Pieces pieces(rows, n, gate_stride, up_stride);
#pragma omp parallel for num_threads(team_for(rows * n, threads)) schedule(static)
    for (int64_t piece = 0; piece < pieces.count; ++piece) {
        const int64_t row = pieces.row(piece), j = pieces.begin(piece);
        run(out + row * n + j, gate + row * gate_stride + j, up + row * up_stride + j, pieces.length(piece));
    }
    (void)threads;
}

void gated_backward(float* d_gate, float* d_up, const float* d, const float* gate, const float* up, int64_t rows,
                    int64_t n, int64_t gate_stride, int64_t up_stride, Act act, int threads,
                    const std::string& instruction_set) {
    const auto run = table_of(instruction_set).gated_backward[static_cast<int>(act)];
    const Pieces pieces(rows, n, gate_stride, up_stride);
#pragma omp parallel for num_threads(team_for(rows * n, threads)) schedule(static)
    for (int64_t piece = 0; piece < pieces.count; ++piece) {
        const int64_t row = pieces.row(piece), j = pieces.begin(piece), at = row * n + j;
        run(d_gate + at, d_up + at, d + at, gate + row * gate_stride + j, up + row * up_stride + j,
            pieces.length(piece));
    }
    (void)threads;
}

}  // namespace kedit
