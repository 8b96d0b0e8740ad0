// Gates of a whole model (formulas: lcdd_kernels/reference/gates.py). Gates are few beside weights: libm in double.
#include <cmath>
#include <new>

#include "lcdd_native.h"
#include "parallel.hpp"

namespace {

constexpr double BETA = 2.0 / 3.0, GAMMA = -0.1, ZETA = 1.1;
constexpr int64_t BLOCK = 4096;  // gates of a task, and of a partial sum

double sigmoid(double x) { return 1.0 / (1.0 + std::exp(-x)); }
double slope_of_sigmoid(double x) {  // sigmoid(x) sigmoid(-x), without cancellation for large x
  const double e = std::exp(-std::fabs(x));
  return e / ((1.0 + e) * (1.0 + e));
}
double l0_shift() { return BETA * std::log(-GAMMA / ZETA); }

// u in (0, 1) of gate n: Philox4x32-10, key (seed), counter (n, step), 23 bits of the first word.
double noise(uint64_t n, uint64_t seed, uint64_t step) {
  uint32_t c0 = uint32_t(n), c1 = uint32_t(n >> 32), c2 = uint32_t(step), c3 = uint32_t(step >> 32);
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t(0xD2511F53) * c0, b = uint64_t(0xCD9E8D57) * c2;
    c0 = uint32_t(b >> 32) ^ c1 ^ k0;
    c1 = uint32_t(b);
    c2 = uint32_t(a >> 32) ^ c3 ^ k1;
    c3 = uint32_t(a);
    k0 += 0x9E3779B9;
    k1 += 0xBB67AE85;
  }
  return (double(c0 >> 9) + 0.5) * 0x1p-23;
}

struct Concrete { double s, inner; };  // s, and the derivative of the sigmoid's argument by theta

struct Draw {
  uint64_t seed, step, offset;
  bool training;
  Concrete operator()(float theta, int64_t n) const {
    if (!training) return {sigmoid(theta), 1.0};
    const double u = noise(offset + uint64_t(n), seed, step);
    return {sigmoid((std::log(u / (1.0 - u)) + theta) / BETA), 1.0 / BETA};
  }
};

float stretched(double s) { return float(s * (ZETA - GAMMA) + GAMMA); }

template <class Each>
void for_blocks(int64_t n, int threads, const Each& each) {
  lcdd::parallel_for((n + BLOCK - 1) / BLOCK, int(std::min<int64_t>(threads, n / (2 * BLOCK) + 1)), [&](int64_t b) {
    each(b, b * BLOCK, std::min(n, (b + 1) * BLOCK));
  });
}

}  // namespace

extern "C" {

int lcdd_gate_values(const float* logits, int64_t n, int kind, uint64_t seed, uint64_t step, int training,
                     uint64_t offset, float* gate, float* expected_l0, int threads) try {
  const Draw draw{seed, step, offset, training != 0};
  const double shift = kind == LCDD_HARD_CONCRETE ? l0_shift() : 0.0;
  std::vector<double> sums(size_t((n + BLOCK - 1) / BLOCK), 0.0);
  for_blocks(n, threads, [&](int64_t block, int64_t begin, int64_t end) {
    double sum = 0;
    for (int64_t i = begin; i < end; ++i) {
      const float theta = logits[i];
      if (kind == LCDD_HARD_CONCRETE) {
        const float z = stretched(draw(theta, i).s);
        gate[i] = z < 0.0f ? 0.0f : z > 1.0f ? 1.0f : z;  // NaN stays
      } else {
        gate[i] = theta > 0.0f ? 1.0f : 0.0f;
      }
      sum += sigmoid(theta - shift);
    }
    sums[size_t(block)] = sum;
  });
  double total = 0;
  for (const double sum : sums) total += sum;
  *expected_l0 = float(total);
  return LCDD_OK;
} catch (const std::bad_alloc&) {
  return LCDD_OUT_OF_MEMORY;
}

int lcdd_gate_logits_grad(const float* logits, const float* d_gate, int64_t n, int kind, uint64_t seed, uint64_t step,
                          int training, uint64_t offset, float l0_weight, float* d_logits, int threads) try {
  const Draw draw{seed, step, offset, training != 0};
  const double shift = kind == LCDD_HARD_CONCRETE ? l0_shift() : 0.0;
  for_blocks(n, threads, [&](int64_t, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const double l0_slope = slope_of_sigmoid(logits[i] - shift);
      double slope = l0_slope;  // heaviside_ste: straight through, as if the gate were sigmoid(theta)
      if (kind == LCDD_HARD_CONCRETE) {
        const Concrete c = draw(logits[i], i);
        const float z = stretched(c.s);  // as rounded in lcdd_gate_values: a clamped gate has no gradient
        slope = z > 0.0f && z < 1.0f ? c.s * (1.0 - c.s) * c.inner * (ZETA - GAMMA) : 0.0;
      }
      d_logits[i] = float(double(d_gate[i]) * slope + double(l0_weight) * l0_slope);
    }
  });
  return LCDD_OK;
} catch (const std::bad_alloc&) {
  return LCDD_OUT_OF_MEMORY;
}

int lcdd_open_indices(const float* gate, const int64_t* offsets, int64_t groups, int32_t* indices, int32_t* counts,
                      int32_t* rank) {
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t begin = offsets[g], end = offsets[g + 1];
    int32_t found = 0;
    for (int64_t n = begin; n < end; ++n) {
      rank[n] = gate[n] != 0.0f ? found : -1;
      if (gate[n] != 0.0f) indices[begin + found++] = int32_t(n - begin);
    }
    counts[g] = found;
    for (int64_t n = begin + found; n < end; ++n) indices[n] = -1;
  }
  return LCDD_OK;
}

}  // extern "C"
