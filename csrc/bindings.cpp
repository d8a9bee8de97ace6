// The native extension kedit_fast._native: a table of contents. Tensors arrive as addresses (no torch headers, so one
// build serves every torch); Python has checked device, dtype and shape, only what could crash is checked again here.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <initializer_list>
#include <stdexcept>
#include <string>

#include "attention.h"      // defines: Attention, attention
#include "linear.h"         // defines: is_amd, linear
#include "pointwise.h"      // defines: rms_norm, rms_norm_backward, gated, gated_backward, log_sum_exp
#include "second_moment.h"  // defines: instruction_sets, has_openmp, second_moment

namespace py = pybind11;

namespace {

// Raised by one whenever a signature below changes, so that Python can refuse a module built from older sources.
constexpr int kInterface = 6;

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

// Raises unless rows of these sizes, all given and these far apart, can be read and written.
void check_rows(const std::string& op, int64_t rows, int64_t n, std::initializer_list<int64_t> strides,
                std::initializer_list<uintptr_t> addresses, int threads) {
    const auto near = [n](int64_t stride) { return stride < n; };
    if (rows < 1 || n < 1 || threads < 1 || std::any_of(strides.begin(), strides.end(), near))
        throw std::invalid_argument(op + ": sizes, strides and threads must be positive and rows disjoint");
    if (std::find(addresses.begin(), addresses.end(), uintptr_t{0}) != addresses.end())
        throw std::invalid_argument(op + ": null address");
}

float* written(uintptr_t address) { return reinterpret_cast<float*>(address); }
const float* read(uintptr_t address) { return reinterpret_cast<const float*>(address); }

kedit::Act act_of(const std::string& name) {
    if (name == "silu") return kedit::Act::kSilu;
    if (name == "gelu_tanh") return kedit::Act::kGeluTanh;
    throw std::invalid_argument("gated: no activation '" + name + "'");
}

void rms_norm(uintptr_t out, uintptr_t x, uintptr_t weight, int64_t rows, int64_t d, int64_t x_stride, float eps,
              float offset, int threads, const std::string& instruction_set) {
    check_rows("rms_norm", rows, d, {x_stride}, {out, x, weight}, threads);
    const py::gil_scoped_release unlocked;
    kedit::rms_norm(written(out), read(x), read(weight), rows, d, x_stride, eps, offset, threads, instruction_set);
}

void rms_norm_backward(uintptr_t dx, uintptr_t dy, uintptr_t x, uintptr_t weight, int64_t rows, int64_t d,
                       int64_t x_stride, float eps, float offset, int threads, const std::string& instruction_set) {
    check_rows("rms_norm_backward", rows, d, {x_stride}, {dx, dy, x, weight}, threads);
    const py::gil_scoped_release unlocked;
    kedit::rms_norm_backward(written(dx), read(dy), read(x), read(weight), rows, d, x_stride, eps, offset, threads,
                             instruction_set);
}

void log_sum_exp(uintptr_t out, uintptr_t x, int64_t rows, int64_t n, int64_t x_stride, int threads,
                 const std::string& instruction_set) {
    check_rows("log_sum_exp", rows, n, {x_stride}, {out, x}, threads);
    const py::gil_scoped_release unlocked;
    kedit::log_sum_exp(written(out), read(x), rows, n, x_stride, threads, instruction_set);
}

void gated(uintptr_t out, uintptr_t gate, uintptr_t up, int64_t rows, int64_t n, int64_t gate_stride,
           int64_t up_stride, const std::string& act, int threads, const std::string& instruction_set) {
    check_rows("gated", rows, n, {gate_stride, up_stride}, {out, gate, up}, threads);
    const kedit::Act which = act_of(act);
    const py::gil_scoped_release unlocked;
    kedit::gated(written(out), read(gate), read(up), rows, n, gate_stride, up_stride, which, threads, instruction_set);
}

void gated_backward(uintptr_t d_gate, uintptr_t d_up, uintptr_t d, uintptr_t gate, uintptr_t up, int64_t rows,
                    int64_t n, int64_t gate_stride, int64_t up_stride, const std::string& act, int threads,
                    const std::string& instruction_set) {
    check_rows("gated_backward", rows, n, {gate_stride, up_stride}, {d_gate, d_up, d, gate, up}, threads);
    const kedit::Act which = act_of(act);
    const py::gil_scoped_release unlocked;
    kedit::gated_backward(written(d_gate), written(d_up), read(d), read(gate), read(up), rows, n, gate_stride,
                          up_stride, which, threads, instruction_set);
}

// addresses: out, query, key, value, key_rows, run, pos, sinks (0: none); sizes and strides: as Attention has them
void attention(const std::array<uintptr_t, 8>& addresses, const std::array<int64_t, 7>& sizes,
               const std::array<int64_t, 7>& strides, float scale, float softcap, int64_t window, int threads,
               const std::string& instruction_set) {
    const auto [out, query, key, value, key_rows, run, pos, sinks] = addresses;
    const auto [rows, heads, kv_heads, dim, slots, runs, positions] = sizes;
    const auto [query_row, query_head, key_slot, key_head, value_slot, value_head, run_stride] = strides;
    if (*std::min_element(sizes.begin(), sizes.end()) < 1 || *std::min_element(strides.begin(), strides.end()) < 0 ||
        heads % kv_heads || softcap < 0 || window < 1 || threads < 1)
        throw std::invalid_argument("attention: sizes, window and threads must be positive, heads a multiple");
    if (std::find(addresses.begin(), addresses.end() - 1, uintptr_t{0}) != addresses.end() - 1)
        throw std::invalid_argument("attention: null address");
    const auto table = [](uintptr_t address) { return reinterpret_cast<const int64_t*>(address); };
    const py::gil_scoped_release unlocked;
    kedit::attention({written(out),   read(query),  read(key),  read(value), table(key_rows), table(run),
                      table(pos),     read(sinks),  rows,       heads,       kv_heads,        dim,
                      slots,          runs,         positions,  query_row,   query_head,      key_slot,
                      key_head,       value_slot,   value_head, run_stride,  scale,           softcap,
                      window},
                     threads, instruction_set);
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

    m.def("rms_norm", &rms_norm, "out = (offset + weight) x / sqrt(mean(x^2) + eps), a mean a row.", py::arg("out"),
          py::arg("x"), py::arg("weight"), py::arg("rows"), py::arg("d"), py::arg("x_stride"), py::arg("eps"),
          py::arg("offset"), py::arg("threads"), py::arg("instruction_set") = "");
    m.def("rms_norm_backward", &rms_norm_backward, "dx of rms_norm, from dy.", py::arg("dx"), py::arg("dy"),
          py::arg("x"), py::arg("weight"), py::arg("rows"), py::arg("d"), py::arg("x_stride"), py::arg("eps"),
          py::arg("offset"), py::arg("threads"), py::arg("instruction_set") = "");
    m.def("log_sum_exp", &log_sum_exp, "out = log sum e^x, of each row.", py::arg("out"), py::arg("x"), py::arg("rows"),
          py::arg("n"), py::arg("x_stride"), py::arg("threads"), py::arg("instruction_set") = "");
    m.def("gated", &gated, "out = act(gate) up, act silu or gelu_tanh.", py::arg("out"), py::arg("gate"),
          py::arg("up"), py::arg("rows"), py::arg("n"), py::arg("gate_stride"), py::arg("up_stride"), py::arg("act"),
          py::arg("threads"), py::arg("instruction_set") = "");
    m.def("gated_backward", &gated_backward, "d_gate and d_up of gated, from d.", py::arg("d_gate"), py::arg("d_up"),
          py::arg("d"), py::arg("gate"), py::arg("up"), py::arg("rows"), py::arg("n"), py::arg("gate_stride"),
          py::arg("up_stride"), py::arg("act"), py::arg("threads"), py::arg("instruction_set") = "");

    m.def("attention", &attention, "out = softmax(softcap(query key^T scale)) value, keys through a row table.",
          py::arg("addresses"), py::arg("sizes"), py::arg("strides"), py::arg("scale"), py::arg("softcap"),
          py::arg("window"), py::arg("threads"), py::arg("instruction_set") = "");
}
