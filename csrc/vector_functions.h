// What the rows headers share; each includes this file first, in its namespace and with what it expects itself.

using T = V::T;
constexpr int64_t kWidth = V::kWidth;

KEDIT_TARGET inline T load_some(const float* p, int64_t n) {
    float part[kWidth] = {};
    std::memcpy(part, p, sizeof(float) * n);
    return V::load(part);
}

KEDIT_TARGET inline void store_some(float* p, T a, int64_t n) {
    float part[kWidth];
    V::store(part, a);
    std::memcpy(p, part, sizeof(float) * n);
}

// e^x for x <= 0: 2^n times a polynomial (Cephes, expf) of what is left of x. 0 below -87.7, NaN of NaN; off by at most
// 1.3 units in the last place in [-87, 0] (every third float there).
KEDIT_TARGET inline T exp_below_zero(T x) {
    x = V::greater(V::set(-88), x);
    const T magic = V::set(0x1.8p23f);  // adding it rounds to an integer, which the lowest bits then hold
    const T t = V::fma(x, V::set(1.44269504f), magic), n = V::add(t, V::set(-0x1.8p23f));
    const T r = V::fma(n, V::set(2.12194440e-4f), V::fma(n, V::set(-0.693359375f), x));
    T p = V::set(1.9875691500e-4f);
    for (const float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
        p = V::fma(p, r, V::set(c));
    p = V::fma(p, V::mul(r, r), V::add(r, V::set(1)));
    return V::mul(p, V::power_of_two(t));
}
