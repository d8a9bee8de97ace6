// Products of rows with a weight matrix on the CPU, by the sgemm of a BLAS library that the process has loaded anyway.
#pragma once

#include <cstddef>
#include <cstdint>

namespace kedit {

// Fortran's sgemm with 64-bit integers, as OpenBLAS exports it.
using Sgemm = void (*)(const char* transa, const char* transb, const int64_t* m, const int64_t* n, const int64_t* k,
                       const float* alpha, const float* a, const int64_t* lda, const float* b, const int64_t* ldb,
                       const float* beta, float* c, const int64_t* ldc, std::size_t, std::size_t);

// Whether AMD made this processor.
bool is_amd();

// out[rows, n_out] = x w^T + bias, all row-major; out is contiguous.
//   x: [rows, n_in], consecutive rows x_stride elements apart
//   w: [n_out, n_in], or [n_in, n_out] if in_out; consecutive rows w_stride elements apart
//   bias: [n_out] or null
// Each thread multiplies its own slice of the rows with a sgemm that must use one thread: torch's pool does the work, a
// second pool would fight it for the cores.
void linear(float* out, const float* x, const float* w, const float* bias, int64_t rows, int64_t n_in, int64_t n_out,
            int64_t x_stride, int64_t w_stride, bool in_out, Sgemm sgemm, int threads);

}  // namespace kedit
