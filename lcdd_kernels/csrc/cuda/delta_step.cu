// Passes A and B and the refresh of W_eff on a GPU, over a table of matrices in one launch each. Built without fused
// multiply-add (--fmad=false), so that W_eff has the same bits as everywhere else. No atomics: pass A leaves partial
// sums of each tile, and a second kernel adds them in order.
//
// A thread keeps its columns for all rows of a tile: their gates, and where they are in a packed gradient, are looked up
// once. Storage types are switches that all threads of a block take alike.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "lcdd_cuda.h"

namespace {

constexpr int THREADS = 256, WARPS = THREADS / 32;
constexpr int STATS_N = 8, STATS_ROWS = 64;  // columns of a thread and rows of a tile, pass A
constexpr int STEP_N = 4, STEP_ROWS = 16;    // pass B and refresh

__device__ int64_t col_gate_index(const lcdd_matrix& m, int64_t j) {
  return m.repeat == 1 ? m.col_start + j : m.col_start + j / (m.repeat * m.head_dim) * m.head_dim + j % m.head_dim;
}

__device__ int64_t size_of(int64_t dtype) { return dtype == LCDD_F32 ? 4 : 2; }
__device__ const char* at(const void* p, int64_t i, int64_t dtype) { return static_cast<const char*>(p) + i * size_of(dtype); }
__device__ char* at(void* p, int64_t i, int64_t dtype) { return static_cast<char*>(p) + i * size_of(dtype); }

__device__ float number(const void* p, int64_t i, int64_t dtype) {
  if (dtype == LCDD_BF16) return __bfloat162float(static_cast<const __nv_bfloat16*>(p)[i]);
  if (dtype == LCDD_F16) return __half2float(static_cast<const __half*>(p)[i]);
  return static_cast<const float*>(p)[i];
}
__device__ void put(void* p, int64_t i, int64_t dtype, float x) {
  if (dtype == LCDD_BF16) static_cast<__nv_bfloat16*>(p)[i] = __float2bfloat16_rn(x);
  else if (dtype == LCDD_F16) static_cast<__half*>(p)[i] = __float2half_rn(x);
  else static_cast<float*>(p)[i] = x;
}
__device__ float as_stored(float x, int64_t dtype) {
  if (dtype == LCDD_BF16) return __bfloat162float(__float2bfloat16_rn(x));
  if (dtype == LCDD_F16) return __half2float(__float2half_rn(x));
  return x;
}

// N neighbouring entries from entry i on, the first `valid` of them (the others become 0). `vector`: all are valid, and
// at a multiple of their common size in memory.
template <int N>
__device__ void load(float (&out)[N], const void* p, int64_t i, int valid, int64_t dtype, bool vector) {
  if (!vector) {
#pragma unroll
    for (int k = 0; k < N; ++k) out[k] = k < valid ? number(p, i + k, dtype) : 0.0f;
  } else if (dtype == LCDD_F32) {
#pragma unroll
    for (int k = 0; k < N; k += 4) {
      const float4 x = *reinterpret_cast<const float4*>(at(p, i + k, dtype));
      out[k] = x.x, out[k + 1] = x.y, out[k + 2] = x.z, out[k + 3] = x.w;
    }
  } else {
#pragma unroll
    for (int k = 0; k < N; k += 4) {
      const uint2 x = *reinterpret_cast<const uint2*>(at(p, i + k, dtype));
      const unsigned words[2] = {x.x, x.y};
#pragma unroll
      for (int w = 0; w < 2; ++w) {
        if (dtype == LCDD_BF16) {
          out[k + 2 * w] = __uint_as_float(words[w] << 16);
          out[k + 2 * w + 1] = __uint_as_float(words[w] & 0xffff0000u);
        } else {
          out[k + 2 * w] = __half2float(__ushort_as_half(words[w] & 0xffff));
          out[k + 2 * w + 1] = __half2float(__ushort_as_half(words[w] >> 16));
        }
      }
    }
  }
}

__device__ unsigned half_bits(float x, int64_t dtype) {
  return dtype == LCDD_BF16 ? __bfloat16_as_ushort(__float2bfloat16_rn(x)) : __half_as_ushort(__float2half_rn(x));
}

__device__ void store(const float (&x)[STEP_N], void* p, int64_t i, int valid, int64_t dtype, bool vector) {
  if (!vector) {
#pragma unroll
    for (int k = 0; k < STEP_N; ++k) {
      if (k < valid) put(p, i + k, dtype, x[k]);
    }
  } else if (dtype == LCDD_F32) {
    *reinterpret_cast<float4*>(at(p, i, dtype)) = make_float4(x[0], x[1], x[2], x[3]);
  } else {
    *reinterpret_cast<uint2*>(at(p, i, dtype)) =
        make_uint2(half_bits(x[0], dtype) | half_bits(x[1], dtype) << 16, half_bits(x[2], dtype) | half_bits(x[3], dtype) << 16);
  }
}

__device__ bool aligned(const void* p) { return (reinterpret_cast<uintptr_t>(p) & 15) == 0; }

// The matrix that a tile (or, with by = &lcdd_place::sums, a sum) belongs to: the last one that begins at or before it.
__device__ int64_t owner(const lcdd_place* places, int64_t count, int64_t index, int64_t lcdd_place::* by) {
  int64_t low = 0, high = count - 1;
  while (low < high) {
    const int64_t middle = (low + high + 1) / 2;
    if (places[middle].*by <= index) low = middle;
    else high = middle - 1;
  }
  return low;
}

// This thread's N columns of a tile.
template <int N>
struct Columns {
  int64_t first;
  int valid;
  int position[N];  // packed gradients: of each column within a packed row, -1 if closed

  __device__ Columns(const lcdd_matrix& m, int64_t col_tile, const int32_t* rank) {
    first = (col_tile * THREADS + threadIdx.x) * N;
    valid = int(max(int64_t(0), min(int64_t(N), m.cols - first)));
    const int per_copy = int(m.open_cols / m.repeat);
#pragma unroll
    for (int k = 0; k < N; ++k) {
      position[k] = -1;
      if (m.layout != LCDD_DENSE && k < valid) {
        const int64_t j = first + k;
        const int place = rank[col_gate_index(m, j)];
        if (place >= 0) position[k] = int(j / m.head_dim % m.repeat) * per_copy + place;
      }
    }
  }

  __device__ void gates(float (&out)[N], const lcdd_matrix& m, const float* gate) const {
#pragma unroll
    for (int k = 0; k < N; ++k) out[k] = k < valid ? gate[col_gate_index(m, first + k)] : 0.0f;
  }

  // Row i of the gradient; entries that a packed gradient does not have are 0.
  __device__ void gradient(float (&out)[N], const lcdd_matrix& m, int64_t i, const int32_t* rank, bool vector) const {
    if (m.layout == LCDD_DENSE) return load(out, m.grad, i * m.cols + first, valid, m.grad_dtype, vector);
    const int64_t row = rank[m.row_start + i];
    if (m.layout == LCDD_PANELS && row >= 0) return load(out, m.grad, row * m.cols + first, valid, m.grad_dtype, vector);
    const void* packed = m.layout == LCDD_BLOCK ? m.grad : m.grad_cols;
    const int64_t packed_row = m.layout == LCDD_BLOCK ? row : i;
#pragma unroll
    for (int k = 0; k < N; ++k) {
      out[k] = packed_row >= 0 && position[k] >= 0
                   ? number(packed, packed_row * m.open_cols + position[k], m.grad_dtype) : 0.0f;
    }
  }
};

__device__ float warp_sum(float x) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
  return x;
}

__global__ void __launch_bounds__(THREADS) grad_stats_kernel(
    const lcdd_matrix* table, const lcdd_place* places, int64_t count, const float* gate, const int32_t* rank,
    float* row_partials, float* col_partials, float* squares) {
  __shared__ float row_sum[STATS_ROWS][WARPS];
  __shared__ float warp_square[WARPS];
  const int64_t k = owner(places, count, blockIdx.x, &lcdd_place::tile);
  const lcdd_matrix& m = table[k];
  const lcdd_place& place = places[k];
  const int64_t col_tiles = (m.cols + THREADS * STATS_N - 1) / (THREADS * STATS_N);
  const int64_t row_tile = (blockIdx.x - place.tile) / col_tiles, col_tile = (blockIdx.x - place.tile) % col_tiles;
  const int64_t row_begin = row_tile * STATS_ROWS;
  const int rows = int(min(int64_t(STATS_ROWS), m.rows - row_begin));
  const Columns<STATS_N> columns(m, col_tile, rank);
  const bool vector = columns.valid == STATS_N && m.cols % STATS_N == 0 && aligned(m.delta) && aligned(m.grad);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;

  float c[STATS_N], col_sum[STATS_N] = {}, square = 0.0f;
  columns.gates(c, m, gate);
  for (int i = 0; i < rows; ++i) {
    float g[STATS_N], delta[STATS_N], sum = 0.0f;
    columns.gradient(g, m, row_begin + i, rank, vector);
    load(delta, m.delta, (row_begin + i) * m.cols + columns.first, columns.valid, m.delta_dtype, vector);
    const float r = gate[m.row_start + row_begin + i];
#pragma unroll
    for (int n = 0; n < STATS_N; ++n) {
      const float product = delta[n] * g[n], masked = (r * c[n]) * g[n];
      col_sum[n] += r * product;
      sum += c[n] * product;
      square += masked * masked;
    }
    sum = warp_sum(sum);
    if (lane == 0) row_sum[i][warp] = sum;
  }
  square = warp_sum(square);
  if (lane == 0) warp_square[warp] = square;
#pragma unroll
  for (int n = 0; n < STATS_N; ++n) {
    if (n < columns.valid) col_partials[place.col_sums + row_tile * m.cols + columns.first + n] = col_sum[n];
  }
  __syncthreads();
  if (threadIdx.x < rows) {
    float sum = 0.0f;
    for (int w = 0; w < WARPS; ++w) sum += row_sum[threadIdx.x][w];
    row_partials[place.row_sums + col_tile * m.rows + row_begin + threadIdx.x] = sum;
  }
  if (threadIdx.x == 0) {
    float sum = 0.0f;
    for (int w = 0; w < WARPS; ++w) sum += warp_square[w];
    squares[blockIdx.x] = sum;
  }
}

// One thread per row and column of every matrix: its partial sums, in the order of the tiles.
__global__ void __launch_bounds__(THREADS) add_partials_kernel(
    const lcdd_matrix* table, const lcdd_place* places, int64_t count, const float* row_partials,
    const float* col_partials, float* sums, int64_t total) {
  const int64_t entry = int64_t(blockIdx.x) * THREADS + threadIdx.x;
  if (entry >= total) return;
  const int64_t k = owner(places, count, entry, &lcdd_place::sums);
  const lcdd_matrix& m = table[k];
  const int64_t local = entry - places[k].sums;
  const bool is_row = local < m.rows;
  const int64_t length = is_row ? m.rows : m.cols, width = THREADS * STATS_N;
  const int64_t tiles = is_row ? (m.cols + width - 1) / width : (m.rows + STATS_ROWS - 1) / STATS_ROWS;
  const float* partial = is_row ? row_partials + places[k].row_sums + local : col_partials + places[k].col_sums + local - m.rows;
  float sum = 0.0f;
  for (int64_t t = 0; t < tiles; ++t) sum += partial[t * length];
  sums[entry] = sum;
}

template <bool ADAMW>
__global__ void __launch_bounds__(THREADS) step_kernel(
    const lcdd_matrix* table, const lcdd_place* places, int64_t count, const float* gate_old, const float* gate_new,
    const int32_t* rank, lcdd_adamw h) {
  const int64_t k = owner(places, count, blockIdx.x, &lcdd_place::tile);
  const lcdd_matrix& m = table[k];
  const int64_t col_tiles = (m.cols + THREADS * STEP_N - 1) / (THREADS * STEP_N);
  const int64_t tile = blockIdx.x - places[k].tile;
  const int64_t row_begin = tile / col_tiles * STEP_ROWS, row_end = min(m.rows, row_begin + STEP_ROWS);
  const Columns<STEP_N> columns(m, tile % col_tiles, rank);
  if (columns.valid == 0) return;
  bool vector = columns.valid == STEP_N && m.cols % STEP_N == 0 && aligned(m.weight) && aligned(m.base) && aligned(m.delta);
  if (ADAMW) vector = vector && aligned(m.exp_avg) && aligned(m.exp_avg_sq) && aligned(m.grad);

  float c_old[STEP_N], c_new[STEP_N];
  columns.gates(c_new, m, gate_new);
  if (ADAMW) columns.gates(c_old, m, gate_old);
  for (int64_t i = row_begin; i < row_end; ++i) {
    const int64_t entry = i * m.cols + columns.first;
    float delta[STEP_N], base[STEP_N], weight[STEP_N];
    load(delta, m.delta, entry, columns.valid, m.delta_dtype, vector);
    load(base, m.base, entry, columns.valid, m.weight_dtype, vector);
    if (ADAMW) {
      float g[STEP_N] = {}, exp_avg[STEP_N], exp_avg_sq[STEP_N];
      const float r_old = gate_old[m.row_start + i];
      if (r_old != 0.0f) columns.gradient(g, m, i, rank, vector);
      load(exp_avg, m.exp_avg, entry, columns.valid, m.exp_avg_dtype, vector);
      load(exp_avg_sq, m.exp_avg_sq, entry, columns.valid, m.exp_avg_sq_dtype, vector);
#pragma unroll
      for (int n = 0; n < STEP_N; ++n) {
        const float grad = (r_old * c_old[n] * h.grad_scale) * g[n];
        exp_avg[n] = exp_avg[n] + (grad - exp_avg[n]) * h.one_minus_beta1;
        exp_avg_sq[n] = exp_avg_sq[n] * h.beta2 + h.one_minus_beta2 * grad * grad;
        delta[n] = delta[n] * h.decay - h.step_size * (exp_avg[n] / (sqrtf(exp_avg_sq[n]) * h.inverse_bias2_sqrt + h.eps));
      }
      store(exp_avg, m.exp_avg, entry, columns.valid, m.exp_avg_dtype, vector);
      store(exp_avg_sq, m.exp_avg_sq, entry, columns.valid, m.exp_avg_sq_dtype, vector);
      store(delta, m.delta, entry, columns.valid, m.delta_dtype, vector);
    }
    const float r_new = gate_new[m.row_start + i];
#pragma unroll
    for (int n = 0; n < STEP_N; ++n) {
      const float p = r_new * c_new[n];
      weight[n] = p == 0.0f ? base[n] : base[n] + p * as_stored(delta[n], m.delta_dtype);
    }
    store(weight, m.weight, entry, columns.valid, m.weight_dtype, vector);
  }
}

}  // namespace

extern "C" {

void lcdd_cuda_tiles(int64_t sizes[4]) {
  sizes[0] = STATS_ROWS, sizes[1] = THREADS * STATS_N, sizes[2] = STEP_ROWS, sizes[3] = THREADS * STEP_N;
}

int lcdd_cuda_weight_eff(const lcdd_matrix* table, const lcdd_place* places, int64_t count, int64_t tiles,
                         const float* gate, void* stream) {
  if (tiles == 0) return cudaSuccess;
  step_kernel<false><<<unsigned(tiles), THREADS, 0, cudaStream_t(stream)>>>(table, places, count, gate, gate, nullptr, {});
  return cudaGetLastError();
}

int lcdd_cuda_grad_stats(const lcdd_matrix* table, const lcdd_place* places, int64_t count, int64_t tiles,
                         const float* gate, const int32_t* rank, float* row_partials, float* col_partials,
                         float* squares, float* sums, int64_t total_sums, void* stream) {
  if (tiles == 0) return cudaSuccess;
  const cudaStream_t on = cudaStream_t(stream);
  grad_stats_kernel<<<unsigned(tiles), THREADS, 0, on>>>(table, places, count, gate, rank, row_partials, col_partials, squares);
  const unsigned blocks = unsigned((total_sums + THREADS - 1) / THREADS);
  add_partials_kernel<<<blocks, THREADS, 0, on>>>(table, places, count, row_partials, col_partials, sums, total_sums);
  return cudaGetLastError();
}

int lcdd_cuda_delta_adamw(const lcdd_matrix* table, const lcdd_place* places, int64_t count, int64_t tiles,
                          const float* gate_old, const float* gate_new, const int32_t* rank, const lcdd_adamw* hyper,
                          void* stream) {
  if (tiles == 0) return cudaSuccess;
  step_kernel<true><<<unsigned(tiles), THREADS, 0, cudaStream_t(stream)>>>(
      table, places, count, gate_old, gate_new, rank, *hyper);
  return cudaGetLastError();
}

}  // extern "C"
