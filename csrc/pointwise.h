// What transformers do between their products, on the CPU in fp32: RMS norms, gated activations, log-sum-exps.
//
// Inputs are row-major, consecutive rows x_stride (gate_stride, up_stride) elements apart; results are contiguous, and
// so are the gradients that come in. instruction_set: a name from instruction_sets(); empty takes the best. Every result
// is the same to the bit for every number of threads. Throws std::invalid_argument for an unknown instruction set.
#pragma once

#include <cstdint>
#include <string>

namespace kedit {

enum class Act { kSilu, kGeluTanh };

// out[rows, d] = (offset + weight) x / sqrt(mean(x^2) + eps), means over rows; weight: [d].
void rms_norm(float* out, const float* x, const float* weight, int64_t rows, int64_t d, int64_t x_stride, float eps,
              float offset, int threads, const std::string& instruction_set);

// dx[rows, d], the gradient of x, from dy, that of out.
void rms_norm_backward(float* dx, const float* dy, const float* x, const float* weight, int64_t rows, int64_t d,
                       int64_t x_stride, float eps, float offset, int threads, const std::string& instruction_set);

// out[rows, n] = act(gate) up. NaN where torch has it: for gate = -inf too.
void gated(float* out, const float* gate, const float* up, int64_t rows, int64_t n, int64_t gate_stride,
           int64_t up_stride, Act act, int threads, const std::string& instruction_set);

// d_gate and d_up [rows, n], the gradients of gate and up, from d, that of out.
void gated_backward(float* d_gate, float* d_up, const float* d, const float* gate, const float* up, int64_t rows,
                    int64_t n, int64_t gate_stride, int64_t up_stride, Act act, int threads,
                    const std::string& instruction_set);

// out[rows] = log sum e^x over rows x[rows, n].
void log_sum_exp(float* out, const float* x, int64_t rows, int64_t n, int64_t x_stride, int threads,
                 const std::string& instruction_set);

}  // namespace kedit
