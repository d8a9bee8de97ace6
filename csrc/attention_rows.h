// What each thread does with a block of rows, for the instruction set of each_instruction_set.h.

#include "vector_functions.h"

// Vectors of a head's sum that registers hold of four queries, beside a value's.
constexpr int kChunk = kWidth == 16 ? 4 : 2;

// tanh(x): by e^-2|x|, and near 0, where that would cancel, by a polynomial (Cephes, tanhf).
KEDIT_TARGET inline T tanh_of(T x) {
    const T below = V::minus_abs(x), e = exp_below_zero(V::add(below, below)), one = V::set(1);
    const T far = V::div(V::fma(e, V::set(-1), one), V::add(one, e)), square = V::mul(x, x);
    T p = V::set(-5.70498872745e-3f);
    for (const float c : {2.06390887954e-2f, -5.37397155531e-2f, 1.33314422036e-1f, -3.33332819422e-1f})
        p = V::fma(p, square, V::set(c));
    const T near = V::fma(V::mul(p, square), x, x), signed_far = V::by_sign(x, far, V::mul(far, V::set(-1)));
    return V::by_sign(V::add(below, V::set(0.625f)), near, signed_far);
}

// scores[i] of n queries: all of them against all keys of the block, two keys at a time.
template <int n>
KEDIT_TARGET inline void score(const Attention& call, const Block& block, const float* keys) {
    const int64_t whole = call.dim / kWidth * kWidth, left = call.dim - whole;
    const T scale = V::set(call.scale);
    for (int64_t t = 0; t < block.keys; t += kWidth) {
        const int64_t some = std::min(kWidth, block.keys - t);
        for (int64_t u = 0; u < some; u += 2) {
            const int64_t* slot = block.slot + t + u;
            const float* const k[2] = {keys + slot[0] * call.key_slot, keys + slot[1] * call.key_slot};
            T sum[n][2];
            for (int i = 0; i < n; ++i) sum[i][0] = sum[i][1] = V::set(0);  // = {} would be a loop of stores
            for (int64_t j = 0; j < whole; j += kWidth) {
                const T a = V::load(k[0] + j), b = V::load(k[1] + j);
                for (int i = 0; i < n; ++i) {
                    const T q = V::load(block.query[i].q + j);
                    sum[i][0] = V::fma(a, q, sum[i][0]);
                    sum[i][1] = V::fma(b, q, sum[i][1]);
                }
            }
            for (int i = 0; left && i < n; ++i) {
                const T q = load_some(block.query[i].q + whole, left);
                for (int c = 0; c < 2; ++c) sum[i][c] = V::fma(load_some(k[c] + whole, left), q, sum[i][c]);
            }
            for (int i = 0; i < n; ++i)
                for (int c = 0; c < 2; ++c) V::store(block.parts + (i * kWidth + u + c) * kWidth, sum[i][c]);
        }
        for (int i = 0; i < n; ++i)
            V::store(block.scores + i * block.apart + t, V::mul(scale, V::sums(block.parts + i * kWidth * kWidth)));
    }
}

// Scores of n queries become weights; what a query does not see weighs nothing, whatever its score is.
template <int n>
KEDIT_TARGET inline void weigh(const Attention& call, const Block& block) {
    const float none = -std::numeric_limits<float>::infinity();
    const int64_t end = (block.keys + kWidth - 1) / kWidth * kWidth;
    T largest[n], sum[n];
    for (int i = 0; i < n; ++i) {
        const Query& query = block.query[i];
        float* scores = block.scores + i * block.apart;
        for (int64_t t = 0; call.softcap > 0 && t < end; t += kWidth) {
            const T part = V::mul(V::set(1 / call.softcap), V::load(scores + t));
            V::store(scores + t, V::mul(V::set(call.softcap), tanh_of(part)));
        }
        for (int64_t t = 0; t < query.begin; ++t) scores[t] = none;
        for (int64_t t = query.end; t < end; ++t) scores[t] = none;
        largest[i] = V::set(query.sink);
    }
    for (int64_t t = 0; t < end; t += kWidth)
        for (int i = 0; i < n; ++i) largest[i] = V::greater(V::load(block.scores + i * block.apart + t), largest[i]);
    for (int i = 0; i < n; ++i) {
        sum[i] = V::set(0);
        largest[i] = V::set(-V::largest(largest[i]));
    }
    for (int64_t t = 0; t < end; t += kWidth)
        for (int i = 0; i < n; ++i) {
            float* scores = block.scores + i * block.apart + t;
            const T e = exp_below_zero(V::add(V::load(scores), largest[i]));
            sum[i] = V::add(sum[i], e);
            V::store(scores, e);
        }
    for (int i = 0; i < n; ++i) {
        float total = V::sum(sum[i]);
        if (call.sinks) {
            float lanes[kWidth];
            V::store(lanes, largest[i]);
            total += std::exp(block.query[i].sink + lanes[0]);
        }
        sum[i] = V::set(1 / total);
    }
    for (int64_t t = 0; t < end; t += kWidth)
        for (int i = 0; i < n; ++i) {
            float* scores = block.scores + i * block.apart + t;
            V::store(scores, V::mul(sum[i], V::load(scores)));
        }
}

// out += weights values[from, to) of n queries, chunk vectors from number j on.
template <int n, int chunk>
KEDIT_TARGET inline void mix_some(const Attention& call, const Block& block, const Query* query, const float* values,
                                  int64_t from, int64_t to, int64_t j) {
    const float* weights = block.scores + (query - block.query) * block.apart;
    T sum[n][chunk];
    for (int i = 0; i < n; ++i)
        for (int c = 0; c < chunk; ++c) sum[i][c] = V::load(query[i].out + j + c * kWidth);
    for (int64_t t = from; t < to; ++t) {
        const float* v = values + block.slot[t] * call.value_slot + j;
        T a[chunk];
        for (int c = 0; c < chunk; ++c) a[c] = V::load(v + c * kWidth);
        for (int i = 0; i < n; ++i) {
            const T w = V::set(weights[i * block.apart + t]);
            for (int c = 0; c < chunk; ++c) sum[i][c] = V::fma(w, a[c], sum[i][c]);
        }
    }
    for (int i = 0; i < n; ++i)
        for (int c = 0; c < chunk; ++c) V::store(query[i].out + j + c * kWidth, sum[i][c]);
}

template <int n>
KEDIT_TARGET inline void mix(const Attention& call, const Block& block, const Query* query, const float* values,
                             int64_t from, int64_t to) {
    if (from >= to) return;
    int64_t j = 0;
    for (; j + kChunk * kWidth <= call.dim; j += kChunk * kWidth)
        mix_some<n, kChunk>(call, block, query, values, from, to, j);
    for (; j + kWidth <= call.dim; j += kWidth) mix_some<n, 1>(call, block, query, values, from, to, j);
    const int64_t left = call.dim - j;
    for (int i = 0; left && i < n; ++i) {
        const float* weights = block.scores + (query + i - block.query) * block.apart;
        T sum = load_some(query[i].out + j, left);
        for (int64_t t = from; t < to; ++t)
            sum = V::fma(V::set(weights[t]), load_some(values + block.slot[t] * call.value_slot + j, left), sum);
        store_some(query[i].out + j, sum, left);
    }
}

// The queries of a block, each over the keys that it sees, in their order.
template <int n>
KEDIT_TARGET void attend(const Attention& call, const Block& block, int64_t kv_head) {
    score<n>(call, block, call.key + kv_head * call.key_head);
    weigh<n>(call, block);
    const float* values = call.value + kv_head * call.value_head;
    int64_t from = 0, to = block.keys;  // what all of them see
    for (int i = 0; i < n; ++i) {
        const Query& query = block.query[i];
        std::fill(query.out, query.out + call.dim, 0.0f);
        from = std::max(from, query.begin);
        to = std::min(to, query.end);
    }
    for (int i = 0; i < n; ++i)
        mix<1>(call, block, block.query + i, values, block.query[i].begin, std::min(from, block.query[i].end));
    mix<n>(call, block, block.query, values, from, to);
    for (int i = 0; i < n; ++i)
        mix<1>(call, block, block.query + i, values, std::max({from, to, block.query[i].begin}), block.query[i].end);
}

constexpr Attend kTable[] = {attend<1>, attend<2>, attend<3>, attend<4>};
