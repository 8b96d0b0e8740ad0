// Passes A and B on pieces of rows; compiled once per instruction set, with LCDD_ROWS naming the table it fills.
#include "rows.hpp"

#include "simd.hpp"

namespace {

using lcdd::QUAD;
using lcdd::StatsArgs;
using lcdd::StepArgs;

inline const char* at(const void* p, int64_t i, int64_t size) { return static_cast<const char*>(p) + i * size; }
inline char* at(void* p, int64_t i, int64_t size) { return static_cast<char*>(p) + i * size; }

// Asks for the memory that this row will need a page from here: the hardware does not prefetch across pages.
inline void prefetch(const void* p, int64_t distance = 4096) {
  __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(p) + uintptr_t(distance)));
}

template <class T>
constexpr int64_t size_of(T) { return sizeof(typename T::storage); }

// The last, incomplete vector of a row goes through sixteen-wide buffers, padded with zeros.
template <class T>
inline Vec load_first(T type, const void* p, int64_t n) {
  typename T::storage buffer[LANES] = {};
  std::memcpy(buffer, p, size_t(n) * sizeof buffer[0]);
  return load(type, buffer);
}
template <class T>
inline void store_first(T type, void* p, Vec a, int64_t n) {
  typename T::storage buffer[LANES];
  store(type, buffer, a);
  std::memcpy(p, buffer, size_t(n) * sizeof buffer[0]);
}

// ---------------------------------------------------------------------------------------------------- pass A

template <class G, class D, int ROWS>
void stats(const StatsArgs a) {  // a copy, which stores to col_sum cannot alias
  Vec row_sum[ROWS], square[ROWS], row_gate[ROWS];
  for (int r = 0; r < ROWS; ++r) {
    row_sum[r] = square[r] = splat(0.0f);
    row_gate[r] = splat(a.row_gate[r]);
  }
  const auto step = [&](int64_t j, auto grad_of, auto delta_of) {
    const Vec c = load(F32{}, a.col_gate + j);
    Vec col_sum = load(F32{}, a.col_sum + j);
    for (int r = 0; r < ROWS; ++r) {
      const Vec g = grad_of(r);
      const Vec product = delta_of(r) * g;
      const Vec cg = c * g;
      col_sum = col_sum + row_gate[r] * product;
      row_sum[r] = row_sum[r] + c * product;
      square[r] = square[r] + cg * cg;
    }
    store(F32{}, a.col_sum + j, col_sum);
  };
  constexpr int64_t g_size = sizeof(typename G::storage), d_size = sizeof(typename D::storage);
  int64_t j = 0;
  for (; j + LANES <= a.n; j += LANES) {
    step(j,
         [&](int r) {
           prefetch(at(a.grad[r], j, g_size), a.grad_ahead);
           return load(G{}, at(a.grad[r], j, g_size));
         },
         [&](int r) {
           prefetch(at(a.delta[r], j, d_size), a.delta_ahead);
           return load(D{}, at(a.delta[r], j, d_size));
         });
  }
  if (j < a.n) {
    step(j, [&](int r) { return load_first(G{}, at(a.grad[r], j, g_size), a.n - j); },
         [&](int r) { return load_first(D{}, at(a.delta[r], j, d_size), a.n - j); });
  }
  for (int r = 0; r < ROWS; ++r) {
    *a.row_sum[r] += total(row_sum[r]);
    *a.square[r] += total(square[r]);
  }
}

template <class G, class D>
void stats_rows(const StatsArgs& a) {
  switch (a.count) {
    case 1: return stats<G, D, 1>(a);
    case 2: return stats<G, D, 2>(a);
    case 3: return stats<G, D, 3>(a);
    default: return stats<G, D, QUAD>(a);
  }
}

// Calls f with the storage type that `dtype` (enum lcdd_dtype) names.
template <class F>
inline void with_type(int dtype, F f) {
  switch (dtype) {
    case LCDD_BF16: return f(BF16{});
    case LCDD_F16: return f(F16{});
    default: return f(F32{});
  }
}

void stats_any(const StatsArgs& a) {
  with_type(a.grad_dtype, [&](auto g) {
    with_type(a.delta_dtype, [&](auto d) { stats_rows<decltype(g), decltype(d)>(a); });
  });
}

// ---------------------------------------------------------------------------------------------------- pass B

// base + p * delta, each operation rounded; where p is zero, the base as it is (method, section 1).
inline Vec gated(Vec base, Vec p, Vec delta) { return where_zero(p, base, base + p * delta); }

struct Hyper {
  explicit Hyper(const lcdd_adamw& h)
      : grad_scale(splat(h.grad_scale)), decay(splat(h.decay)),
        one_minus_beta1(splat(h.one_minus_beta1)), beta2(splat(h.beta2)), one_minus_beta2(splat(h.one_minus_beta2)),
        step_size(splat(h.step_size)), inverse_bias2_sqrt(splat(h.inverse_bias2_sqrt)), eps(splat(h.eps)) {}
  Vec grad_scale, decay, one_minus_beta1, beta2, one_minus_beta2, step_size, inverse_bias2_sqrt, eps;
};

// n lanes (16, or fewer at the end of a row) from column j. The types of weight and gradient are switches, not template
// parameters: 27 versions of this are enough, and a switch costs nothing beside the memory traffic.
template <class D, class M, class V, bool FULL>
inline void adamw_lanes(const StepArgs& a, const Hyper& h, Vec row_old, Vec row_new, int64_t j, int64_t n) {
  constexpr int64_t d_size = sizeof(typename D::storage);
  constexpr int64_t m_size = sizeof(typename M::storage), v_size = sizeof(typename V::storage);
  const auto get = [&](auto type, const void* p) { return FULL ? load(type, p) : load_first(type, p, n); };
  const auto put = [&](auto type, void* p, Vec v) { FULL ? store(type, p, v) : store_first(type, p, v, n); };

  Vec g = splat(0.0f);
  prefetch(at(a.exp_avg, j, m_size));
  prefetch(at(a.exp_avg_sq, j, v_size));
  prefetch(at(a.delta, j, d_size));
  if (a.grad != nullptr) {
    const Vec scale = row_old * load(F32{}, a.col_old + j) * h.grad_scale;
    with_type(a.grad_dtype, [&](auto type) {
      prefetch(at(a.grad, j, size_of(type)));
      g = scale * get(type, at(a.grad, j, size_of(type)));
    });
  }
  const Vec m_before = get(M{}, at(a.exp_avg, j, m_size));
  const Vec m = m_before + (g - m_before) * h.one_minus_beta1;
  const Vec v = get(V{}, at(a.exp_avg_sq, j, v_size)) * h.beta2 + h.one_minus_beta2 * g * g;
  const Vec denominator = square_root(v) * h.inverse_bias2_sqrt + h.eps;
  const Vec delta = get(D{}, at(a.delta, j, d_size)) * h.decay - h.step_size * (m / denominator);
  put(M{}, at(a.exp_avg, j, m_size), m);
  put(V{}, at(a.exp_avg_sq, j, v_size), v);
  put(D{}, at(a.delta, j, d_size), delta);

  const Vec p = row_new * load(F32{}, a.col_new + j);
  with_type(a.weight_dtype, [&](auto type) {
    prefetch(at(a.base, j, size_of(type)));
    put(type, at(a.weight, j, size_of(type)), gated(get(type, at(a.base, j, size_of(type))), p, as_stored(D{}, delta)));
  });
}

template <class D, class M, class V>
void adamw(const StepArgs& a, const lcdd_adamw& hyper) {
  const Hyper h(hyper);
  const Vec row_old = splat(a.row_old), row_new = splat(a.row_new);
  int64_t j = 0;
  for (; j + LANES <= a.n; j += LANES) adamw_lanes<D, M, V, true>(a, h, row_old, row_new, j, LANES);
  if (j < a.n) adamw_lanes<D, M, V, false>(a, h, row_old, row_new, j, a.n - j);
}

void adamw_any(const StepArgs& a, const lcdd_adamw& hyper) {
  with_type(a.delta_dtype, [&](auto d) {
    with_type(a.exp_avg_dtype, [&](auto m) {
      with_type(a.exp_avg_sq_dtype, [&](auto v) { adamw<decltype(d), decltype(m), decltype(v)>(a, hyper); });
    });
  });
}

template <class W, class D>
void weight_eff(const StepArgs& a) {
  constexpr int64_t w_size = sizeof(typename W::storage), d_size = sizeof(typename D::storage);
  const Vec row = splat(a.row_new);
  int64_t j = 0;
  for (; j + LANES <= a.n; j += LANES) {
    const Vec p = row * load(F32{}, a.col_new + j);
    prefetch(at(a.base, j, w_size));
    prefetch(at(a.delta, j, d_size));
    store(W{}, at(a.weight, j, w_size),
          gated(load(W{}, at(a.base, j, w_size)), p, load(D{}, at(a.delta, j, d_size))));
  }
  if (j < a.n) {
    const Vec p = row * load(F32{}, a.col_new + j);
    const Vec base = load_first(W{}, at(a.base, j, w_size), a.n - j);
    const Vec delta = load_first(D{}, at(a.delta, j, d_size), a.n - j);
    store_first(W{}, at(a.weight, j, w_size), gated(base, p, delta), a.n - j);
  }
}

void weight_eff_any(const StepArgs& a) {
  with_type(a.weight_dtype, [&](auto w) {
    with_type(a.delta_dtype, [&](auto d) { weight_eff<decltype(w), decltype(d)>(a); });
  });
}

}  // namespace

namespace lcdd {
extern const Rows LCDD_ROWS = {stats_any, adamw_any, weight_eff_any};
}
