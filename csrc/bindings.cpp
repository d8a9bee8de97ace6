// The native extension kedit_fast._native: a table of contents. Tensors arrive as addresses (no torch headers, so one
// build serves every torch); Python has checked device, dtype and shape, only what could crash is checked again here.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "linear.h"         // defines: is_amd, linear
#include "second_moment.h"  // defines: instruction_sets, has_openmp, second_moment

namespace py = pybind11;

namespace {

// Raised by one whenever a signature below changes, so that Python can refuse a module built from older sources.
constexpr int kInterface = 3;

template <class Accumulator, class Key>
bool second_moment(uintptr_t c, int64_t c_stride, uintptr_t keys, int64_t n, int64_t d, int64_t key_stride, int threads,
                   const std::string& instruction_set) {
    if (n < 0 || d < 0 || c_stride < d || (n > 1 && key_stride < d) || threads < 1)
        throw std::invalid_argument("second_moment: sizes, strides and threads must be positive and rows disjoint");
    if (n > 0 && d > 0 && (c == 0 || keys == 0)) throw std::invalid_argument("second_moment: null address");
    const py::gil_scoped_release unlocked;
    return kedit::second_moment(reinterpret_cast<Accumulator*>(c), c_stride, reinterpret_cast<const Key*>(keys), n, d,
                                key_stride, threads, instruction_set);
}

// One function for each pair of types, named as torch names them.
template <class Accumulator, class Key>
void define_second_moment(py::module_& m, const char* name) {
    m.def(name, &second_moment<Accumulator, Key>,
          "c += keys^T keys, lower triangle; False, with c as it was, if a key is NaN or infinite.", py::arg("c"),
          py::arg("c_stride"), py::arg("keys"), py::arg("n"), py::arg("d"), py::arg("key_stride"), py::arg("threads"),
          py::arg("instruction_set") = "");
}

void linear(uintptr_t out, uintptr_t x, uintptr_t w, uintptr_t bias, int64_t rows, int64_t n_in, int64_t n_out,
            int64_t x_stride, int64_t w_stride, bool in_out, uintptr_t sgemm, int threads) {
    if (rows < 1 || n_in < 1 || n_out < 1 || x_stride < n_in || w_stride < (in_out ? n_out : n_in) || threads < 1)
        throw std::invalid_argument("linear: sizes, strides and threads must be positive and rows disjoint");
    if (out == 0 || x == 0 || w == 0 || sgemm == 0) throw std::invalid_argument("linear: null address");
    const py::gil_scoped_release unlocked;
    kedit::linear(reinterpret_cast<float*>(out), reinterpret_cast<const float*>(x), reinterpret_cast<const float*>(w),
                  reinterpret_cast<const float*>(bias), rows, n_in, n_out, x_stride, w_stride, in_out,
                  reinterpret_cast<kedit::Sgemm>(sgemm), threads);
}

}  // namespace

PYBIND11_MODULE(_native, m) {
    m.doc() = "Compiled operations over raw addresses; kedit_fast.kernels holds the public ones.";
    m.attr("interface") = kInterface;
    m.def("instruction_sets", &kedit::instruction_sets, "Instruction sets this processor can run, best first.");
    m.def("has_openmp", &kedit::has_openmp, "Whether the extension can use more than one thread.");

    define_second_moment<float, float>(m, "second_moment_float32_float32");
    define_second_moment<float, kedit::Half>(m, "second_moment_float32_float16");
    define_second_moment<float, kedit::Bfloat>(m, "second_moment_float32_bfloat16");
    define_second_moment<double, float>(m, "second_moment_float64_float32");
    define_second_moment<double, kedit::Half>(m, "second_moment_float64_float16");
    define_second_moment<double, kedit::Bfloat>(m, "second_moment_float64_bfloat16");

    m.def("is_amd", &kedit::is_amd, "Whether AMD made this processor.");
    m.def("linear", &linear, "out = x w^T + bias, by a sgemm with 64-bit integers that uses one thread.",
          py::arg("out"), py::arg("x"), py::arg("w"), py::arg("bias"), py::arg("rows"), py::arg("n_in"),
          py::arg("n_out"), py::arg("x_stride"), py::arg("w_stride"), py::arg("in_out"), py::arg("sgemm"),
          py::arg("threads"));
}
