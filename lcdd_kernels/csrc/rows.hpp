// What the three instruction-set versions of rows.cpp offer to delta_step.cpp: work on pieces of rows, at most
// STRIP columns long, which keeps gates and column sums in the L1 cache.
#pragma once
#include <cstdint>

#include "lcdd_native.h"

namespace lcdd {

constexpr int64_t STRIP = 2048;  // columns; a multiple of 16
constexpr int QUAD = 4;          // rows that share one pass over the column sums

// Pass A on `count` (1 to QUAD) row pieces of n columns.
struct StatsArgs {
  const void* grad[QUAD];
  const void* delta[QUAD];
  float row_gate[QUAD];
  double* row_sum[QUAD];  // += sum_j c_j delta_ij grad_ij
  double* square[QUAD];   // += sum_j (c_j grad_ij)^2
  const float* col_gate;  // padded with zeros to a multiple of 16
  float* col_sum;         // += r_i delta_ij grad_ij; padded likewise
  int64_t n;
  int64_t grad_ahead, delta_ahead;  // bytes from these rows to those that will come next, to be prefetched
  int count;
  int grad_dtype, delta_dtype;
};

// Pass B (delta, exp_avg, exp_avg_sq, grad, hyper set) or a refresh of W_eff on one row piece of n columns.
struct StepArgs {
  void* weight;
  const void* base;
  void* delta;
  void* exp_avg;
  void* exp_avg_sq;
  const void* grad;  // null: a gradient of zero
  const float* col_old;
  const float* col_new;
  float row_old, row_new;
  int64_t n;
  int weight_dtype, delta_dtype, exp_avg_dtype, exp_avg_sq_dtype, grad_dtype;
};

struct Rows {
  void (*stats)(const StatsArgs&);
  void (*adamw)(const StepArgs&, const lcdd_adamw&);
  void (*weight_eff)(const StepArgs&);
};

extern const Rows rows_scalar, rows_avx2, rows_avx512;

}  // namespace lcdd
