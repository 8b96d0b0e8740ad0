// C ABI of the native library: the gates and the fused optimizer step of LCDD on a CPU.
//
// No torch headers: pointers, sizes and plain numbers. The caller validates (lcdd_kernels/native.py does); what these
// functions check themselves is what only they look at. They write nothing before they have checked it.
// All matrices are [rows, cols] and contiguous; no alignment beyond the element's is assumed.
// Arithmetic is fp32, storage fp32, bf16 or fp16. Results depend neither on the thread count nor on the level.
#pragma once
#include <stdint.h>

#define LCDD_ABI_VERSION 1

#ifdef __cplusplus
extern "C" {
#endif
#pragma GCC visibility push(default)

enum lcdd_status { LCDD_OK = 0, LCDD_OUT_OF_MEMORY = 1, LCDD_PACKED_MISMATCH = 2, LCDD_NO_LEVEL = 3 };
enum lcdd_level { LCDD_BEST = -1, LCDD_SCALAR = 0, LCDD_AVX2 = 1, LCDD_AVX512 = 2 };
enum lcdd_dtype { LCDD_F32 = 0, LCDD_BF16 = 1, LCDD_F16 = 2 };
enum lcdd_layout { LCDD_DENSE = 0, LCDD_BLOCK = 1, LCDD_PANELS = 2 };
enum lcdd_gate_kind { LCDD_HEAVISIDE_STE = 0, LCDD_HARD_CONCRETE = 1 };

// One gated matrix. Every field has eight bytes, so that a row of a pointer table on a GPU has the same layout.
// Row i is gated by gate[row_start + i], column j by gate[col_start + j / (repeat * head_dim) * head_dim + j % head_dim].
// Pointers that a function does not name may be null.
typedef struct lcdd_matrix {
  void* weight;           // W_eff
  const void* base;       // same dtype as weight
  void* delta;
  void* exp_avg;
  void* exp_avg_sq;
  const void* grad;       // dense [rows, cols]; block [open_rows, open_cols]; panels: the open rows [open_rows, cols]
  const void* grad_cols;  // panels: the open columns [rows, open_cols]; else null
  int64_t rows, cols;
  int64_t row_start, col_start, head_dim, repeat;
  int64_t open_rows, open_cols;
  int64_t weight_dtype, delta_dtype, exp_avg_dtype, exp_avg_sq_dtype, grad_dtype, layout;
} lcdd_matrix;

// AdamW with the bias corrections already folded in, so that the kernel multiplies by plain numbers.
typedef struct lcdd_adamw {
  float grad_scale;        // multiplies every gradient (clipping)
  float decay;             // 1 - lr * weight_decay
  float one_minus_beta1;
  float beta2, one_minus_beta2;
  float step_size;         // lr / (1 - beta1^t)
  float inverse_bias2_sqrt;  // 1 / sqrt(1 - beta2^t)
  float eps;
} lcdd_adamw;

int lcdd_abi_version(void);
int lcdd_best_level(void);  // the best level that this library was built with and this CPU can run

// gate[n], and the sum of the expected L0 (one float). Gate i draws the noise of gate offset + i of the whole model.
int lcdd_gate_values(const float* logits, int64_t n, int kind, uint64_t seed, uint64_t step, int training,
                     uint64_t offset, float* gate, float* expected_l0, int threads);
// d_logits[n] = d_gate * dgate/dlogit (the noise is drawn again) + l0_weight * dE[L0]/dlogit.
int lcdd_gate_logits_grad(const float* logits, const float* d_gate, int64_t n, int kind, uint64_t seed, uint64_t step,
                          int training, uint64_t offset, float l0_weight, float* d_logits, int threads);
// Positions of the non-zero gates of each group [offsets[g], offsets[g+1]); see functional.open_indices.
int lcdd_open_indices(const float* gate, const int64_t* offsets, int64_t groups, int32_t* indices, int32_t* counts,
                      int32_t* rank);

// weight := base + (row gate * column gate) * delta; a closed entry is a copy of the base's bits.
int lcdd_weight_eff(const lcdd_matrix* matrices, int64_t count, const float* gate, int level, int threads);
// Pass A: d_gate[n_gates] over all matrices, and the squared norm of (r c^T) * grad (one float).
int lcdd_grad_stats(const lcdd_matrix* matrices, int64_t count, const float* gate, const int32_t* rank,
                    int64_t n_gates, float* d_gate, float* sq_norm, int level, int threads);
// Pass B: AdamW on delta with the gradient of gate_old, then weight from gate_new and the stored delta.
int lcdd_delta_adamw(const lcdd_matrix* matrices, int64_t count, const float* gate_old, const float* gate_new,
                     const int32_t* rank, const lcdd_adamw* hyper, int level, int threads);

#pragma GCC visibility pop
#ifdef __cplusplus
}
#endif
