// Second moment of keys on the CPU: c += keys^T keys, one triangle.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace kedit {

// Numbers of 16 bits, as torch stores them.
struct Half {
    uint16_t bits;
};
struct Bfloat {
    uint16_t bits;
};

// Instruction sets the kernel was compiled for and this processor can run, best first, out of avx512_bf16, avx512, avx2
// and plain.
std::vector<std::string> instruction_sets();

// The name itself, or the best one if it is empty. Throws std::invalid_argument for one not in instruction_sets().
std::string known_instruction_set(const std::string& name);

// True if the extension was compiled with OpenMP; without it `threads` is ignored.
bool has_openmp();

// c[i, j] += sum over rows of keys[row, i] * keys[row, j], for j <= i only. The strict upper triangle is not touched.
//   Accumulator: float or double; Key: float, Half or Bfloat
//   c:    [d, d] row-major, consecutive rows c_stride elements apart
//   keys: [n, d] row-major, consecutive rows key_stride elements apart, no alignment needed
//   instruction_set: a name from instruction_sets(); empty takes the best. avx512_bf16 multiplies bf16 keys as they are
//   (subnormal ones count as zero), any other keys as avx512 does: widened to fp32 while they are packed.
// Returns false, and leaves c as it was, if a key is NaN or infinite.
// The result is the same to the bit for every number of threads: each element of c is summed by one thread, in row
// order. Throws std::invalid_argument for an unknown instruction set, std::bad_alloc if the 256 packed rows do not fit.
template <class Accumulator, class Key>
bool second_moment(Accumulator* c, int64_t c_stride, const Key* keys, int64_t n, int64_t d, int64_t key_stride,
                   int threads, const std::string& instruction_set);

}  // namespace kedit
