#include "linear.h"

#include <algorithm>
#include <cstring>

namespace kedit {

bool is_amd() {
#if (defined(__GNUC__) || defined(__clang__)) && (defined(__x86_64__) || defined(__i386__))
    __builtin_cpu_init();
    return __builtin_cpu_is("amd");
#else
    return false;
#endif
}

void linear(float* out, const float* x, const float* w, const float* bias, int64_t rows, int64_t n_in, int64_t n_out,
            int64_t x_stride, int64_t w_stride, bool in_out, Sgemm sgemm, int threads) {
    // Row-major rows are column-major columns: out^T [n_out, rows] = op(w) x^T.
    const char* const op = in_out ? "N" : "T";
    const int64_t slice = (rows + threads - 1) / threads;
    const float one = 1, beta = bias ? 1 : 0;
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int64_t begin = 0; begin < rows; begin += slice) {
        const int64_t n = std::min(slice, rows - begin);
        float* const mine = out + begin * n_out;
        if (bias)
            for (int64_t row = 0; row < n; ++row) std::memcpy(mine + row * n_out, bias, sizeof(float) * n_out);
        sgemm(op, "N", &n_out, &n, &n_in, &one, w, &w_stride, x + begin * x_stride, &x_stride, &beta, mine, &n_out, 1,
              1);
    }
}

}  // namespace kedit
