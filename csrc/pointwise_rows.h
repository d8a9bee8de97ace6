// What each thread does with its rows, for the instruction set of each_instruction_set.h.

#include "vector_functions.h"

constexpr int kSums = kWidth < 8 ? 32 / kWidth : 4;  // chains of additions, each of kWidth lanes

KEDIT_TARGET inline float total(T (&sum)[kSums]) {
    for (int half = kSums / 2; half > 0; half /= 2)
        for (int i = 0; i < half; ++i) sum[i] = V::add(sum[i], sum[i + half]);
    return V::sum(sum[0]);
}

// out = (offset + weight) x / sqrt(mean(x^2) + eps) of one row.
KEDIT_TARGET void rms_norm_row(float* out, const float* x, const float* weight, int64_t d, float eps, float offset) {
    T sum[kSums] = {};
    int64_t j = 0;
    for (; j + kSums * kWidth <= d; j += kSums * kWidth)
        for (int i = 0; i < kSums; ++i) {
            const T a = V::load(x + j + i * kWidth);
            sum[i] = V::fma(a, a, sum[i]);
        }
    for (; j < d; j += kWidth) {
        const T a = d - j < kWidth ? load_some(x + j, d - j) : V::load(x + j);
        sum[0] = V::fma(a, a, sum[0]);
    }
    const T scale = V::set(1 / std::sqrt(total(sum) / static_cast<float>(d) + eps)), shift = V::set(offset);
    for (j = 0; j + kWidth <= d; j += kWidth)
        V::store(out + j, V::mul(V::add(shift, V::load(weight + j)), V::mul(V::load(x + j), scale)));
    if (j < d)
        store_some(out + j, V::mul(V::add(shift, load_some(weight + j, d - j)), V::mul(load_some(x + j, d - j), scale)),
                   d - j);
}

// dx = r (g - x r^2 sum(g x) / d) of one row, with g = (offset + weight) dy and r = 1 / sqrt(mean(x^2) + eps).
KEDIT_TARGET void rms_norm_backward_row(float* dx, const float* dy, const float* x, const float* weight, int64_t d,
                                        float eps, float offset) {
    T squares[kSums] = {}, products[kSums] = {};
    const T shift = V::set(offset);
    int64_t j = 0;
    for (; j + kSums * kWidth <= d; j += kSums * kWidth)
        for (int i = 0; i < kSums; ++i) {
            const int64_t at = j + i * kWidth;
            const T a = V::load(x + at);
            squares[i] = V::fma(a, a, squares[i]);
            products[i] = V::fma(V::mul(V::add(shift, V::load(weight + at)), V::load(dy + at)), a, products[i]);
        }
    for (; j < d; j += kWidth) {
        const int64_t n = std::min(kWidth, d - j);
        const T a = load_some(x + j, n);
        squares[0] = V::fma(a, a, squares[0]);
        products[0] = V::fma(V::mul(V::add(shift, load_some(weight + j, n)), load_some(dy + j, n)), a, products[0]);
    }
    const float width = static_cast<float>(d), r = 1 / std::sqrt(total(squares) / width + eps);
    const T scale = V::set(r), share = V::set(-r * (r * (total(products) / width)));
    for (j = 0; j + kWidth <= d; j += kWidth) {
        const T g = V::mul(V::add(shift, V::load(weight + j)), V::load(dy + j));
        V::store(dx + j, V::mul(scale, V::fma(share, V::load(x + j), g)));
    }
    if (j < d) {
        const T g = V::mul(V::add(shift, load_some(weight + j, d - j)), load_some(dy + j, d - j));
        store_some(dx + j, V::mul(scale, V::fma(share, load_some(x + j, d - j), g)), d - j);
    }
}

// sigmoid(u) = above / (1 + e) and 1 - sigmoid(u) = below / (1 + e), neither a difference; no power overflows.
struct Sigmoid {
    T above, below, sum;
};

KEDIT_TARGET inline Sigmoid sigmoid(T u) {
    const T one = V::set(1), e = exp_below_zero(V::minus_abs(u));
    return {V::by_sign(u, one, e), V::by_sign(u, e, one), V::add(one, e)};
}

// The activation is g sigmoid(u(g)), with u' = du/dg; gelu_tanh by 0.5 (1 + tanh(y)) = sigmoid(2 y). Its sigmoid is 0
// or 1 in fp32 long before |g| = 16, where u and u' stop growing, so that 0 times u' stays 0.
constexpr float kLinear = 1.5957691216f, kCubic = 0.0713548162726f;  // 2 sqrt(2 / pi), and that times 0.044715

template <Act act>
KEDIT_TARGET inline T inner(T g) {
    if constexpr (act == Act::kSilu) return g;
    const T h = V::smaller(V::set(16), V::greater(V::set(-16), g));
    return V::mul(h, V::fma(V::set(kCubic), V::mul(h, h), V::set(kLinear)));
}

template <Act act>
KEDIT_TARGET inline T activated(T g) {
    const Sigmoid s = sigmoid(inner<act>(g));
    return V::div(V::mul(g, s.above), s.sum);
}

template <Act act>
KEDIT_TARGET void gated_row(float* out, const float* gate, const float* up, int64_t n) {
    int64_t j = 0;
    for (; j + kWidth <= n; j += kWidth) V::store(out + j, V::mul(activated<act>(V::load(gate + j)), V::load(up + j)));
    if (j < n)
        store_some(out + j, V::mul(activated<act>(load_some(gate + j, n - j)), load_some(up + j, n - j)), n - j);
}

// d_up = d act(g), d_gate = d up (s + g u' s (1 - s)) with s = sigmoid(u(g)); g comes last, or it would overflow.
template <Act act>
KEDIT_TARGET inline void gated_gradients(T d, T g, T up, T& d_gate, T& d_up) {
    const Sigmoid sigmoids = sigmoid(inner<act>(g));
    const T r = V::div(V::set(1), sigmoids.sum), s = V::mul(sigmoids.above, r);
    T slope = V::mul(s, V::mul(sigmoids.below, r));
    if constexpr (act == Act::kGeluTanh) {
        const T h = V::smaller(V::set(16), V::greater(V::set(-16), g));
        slope = V::mul(slope, V::fma(V::set(3 * kCubic), V::mul(h, h), V::set(kLinear)));
    }
    d_up = V::mul(d, V::mul(g, s));
    d_gate = V::mul(V::mul(d, up), V::fma(g, slope, s));
}

template <Act act>
KEDIT_TARGET void gated_backward_row(float* d_gate, float* d_up, const float* d, const float* gate, const float* up,
                                     int64_t n) {
    T of_gate, of_up;
    int64_t j = 0;
    for (; j + kWidth <= n; j += kWidth) {
        gated_gradients<act>(V::load(d + j), V::load(gate + j), V::load(up + j), of_gate, of_up);
        V::store(d_gate + j, of_gate);
        V::store(d_up + j, of_up);
    }
    if (j < n) {
        const int64_t left = n - j;
        gated_gradients<act>(load_some(d + j, left), load_some(gate + j, left), load_some(up + j, left), of_gate,
                             of_up);
        store_some(d_gate + j, of_gate, left);
        store_some(d_up + j, of_up, left);
    }
}

// log sum e^x of one row: its largest number, and what the others come to over it. NaN of a row that holds one.
KEDIT_TARGET float log_sum_exp_row(const float* x, int64_t n) {
    const float none = -std::numeric_limits<float>::infinity();
    T largest[kSums], sum[kSums] = {};
    for (T& each : largest) each = V::set(none);
    int64_t j = 0;
    for (; j + kSums * kWidth <= n; j += kSums * kWidth)
        for (int i = 0; i < kSums; ++i) largest[i] = V::greater(V::load(x + j + i * kWidth), largest[i]);
    float top = none;
    for (const T each : largest) top = std::max(top, V::largest(each));
    for (; j < n; ++j) top = std::max(top, x[j]);
    if (top == -none) return std::any_of(x, x + n, [](float a) { return std::isnan(a); }) ? std::nanf("") : top;
    const float ground = top == none ? 0 : top;  // else infinity less itself
    const T shift = V::set(-ground);
    for (j = 0; j + kSums * kWidth <= n; j += kSums * kWidth)
        for (int i = 0; i < kSums; ++i)
            sum[i] = V::add(sum[i], exp_below_zero(V::add(V::load(x + j + i * kWidth), shift)));
    float rest = total(sum);
    for (; j < n; ++j) rest += std::exp(x[j] - ground);
    return ground + std::log(rest);
}

constexpr Kernels kTable{
    rms_norm_row,
    rms_norm_backward_row,
    {gated_row<Act::kSilu>, gated_row<Act::kGeluTanh>},
    {gated_backward_row<Act::kSilu>, gated_backward_row<Act::kGeluTanh>},
    log_sum_exp_row,
};
