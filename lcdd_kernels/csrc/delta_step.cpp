// Passes A and B and the refresh of W_eff over a list of matrices: what is cut into tasks, and how partial sums meet.
//
// Pass A, two stages: a task takes ROW_BLOCK rows of one matrix and leaves its column sums (fp32) in a workspace of its
// own; then the caller adds the blocks in order, in double. Tasks are the same for every thread count, hence the bits.
#include <cstring>
#include <new>

#include "convert.hpp"
#include "parallel.hpp"
#include "rows.hpp"

namespace lcdd {
namespace {

constexpr int64_t ROW_BLOCK = 128;                    // rows of a pass A task; of that many fp32 terms is a column sum
constexpr int64_t WORKSPACE = int64_t(8) << 20;       // floats of column sums at a time, unless one matrix needs more
constexpr int64_t TASK_ENTRIES = int64_t(64) << 10;   // entries of a pass B task, and the least that a thread is worth

int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }
int64_t size_of(int64_t dtype) { return dtype == LCDD_F32 ? 4 : 2; }
// Entry (row, col) of a contiguous matrix with `cols` columns of `size` bytes.
const char* entry(const void* p, int64_t row, int64_t cols, int64_t col, int64_t size) {
  return static_cast<const char*>(p) + (row * cols + col) * size;
}
char* entry(void* p, int64_t row, int64_t cols, int64_t col, int64_t size) {
  return static_cast<char*>(p) + (row * cols + col) * size;
}

int64_t col_gate_index(const lcdd_matrix& m, int64_t j) {
  if (m.repeat == 1) return m.col_start + j;
  return m.col_start + j / (m.repeat * m.head_dim) * m.head_dim + j % m.head_dim;
}

const Rows* rows_for(int level) {
  const int best = lcdd_best_level();
  if (level == LCDD_BEST) level = best;
  if (level < LCDD_SCALAR || level > best) return nullptr;
#ifdef LCDD_X86
  if (level == LCDD_AVX512) return &rows_avx512;
  if (level == LCDD_AVX2) return &rows_avx2;
#endif
  return &rows_scalar;
}

// The gates of a matrix's columns side by side, padded with zeros so that whole vectors can be read.
std::vector<float> col_gates(const lcdd_matrix& m, const float* gate) {
  std::vector<float> out(size_t(round_up(m.cols, 16)), 0.0f);
  for (int64_t j = 0; j < m.cols; ++j) out[size_t(j)] = gate[col_gate_index(m, j)];
  return out;
}

// Where the gradient of a matrix's entries is. Packed gradients are spread out into strips of fp32 as they are used.
struct GradSource {
  struct Column { int64_t col, position; };

  const lcdd_matrix* m = nullptr;
  std::vector<int64_t> row_position;  // packed: of each row among the open rows, -1 if closed
  std::vector<Column> open;           // packed: the open columns, ascending, and where each is in a packed row

  // False where the gradient's shape is not that of the open rows and columns that `rank` describes.
  bool prepare(const lcdd_matrix& matrix, const int32_t* rank) {
    m = &matrix;
    if (m->layout == LCDD_DENSE) return true;
    int64_t open_rows = 0;
    row_position.resize(size_t(m->rows));
    for (int64_t i = 0; i < m->rows; ++i) row_position[size_t(i)] = rank[m->row_start + i] >= 0 ? open_rows++ : -1;
    const int64_t per_copy = m->open_cols / m->repeat;  // copy-major: a copy's columns are neighbours
    for (int64_t j = 0; j < m->cols; ++j) {
      const int64_t place = rank[col_gate_index(*m, j)];
      if (place >= 0) open.push_back({j, j / m->head_dim % m->repeat * per_copy + place});
      if (place >= per_copy) return false;
    }
    return open_rows == m->open_rows && int64_t(open.size()) == m->open_cols;
  }

  bool has_row(int64_t i) const { return m->layout != LCDD_BLOCK || row_position[size_t(i)] >= 0; }
  bool is_spread(int64_t i) const { return m->layout == LCDD_BLOCK || (m->layout == LCDD_PANELS && row_position[size_t(i)] < 0); }
  int strip_dtype(int64_t i) const { return is_spread(i) ? LCDD_F32 : int(m->grad_dtype); }

  // Columns [j, j + n) of row i, which has_row, in strip_dtype(i); in `buffer` where they had to be spread out.
  const void* strip(int64_t i, int64_t j, int64_t n, float* buffer) const {
    const int64_t size = size_of(m->grad_dtype);
    const int64_t position = m->layout == LCDD_DENSE ? i : row_position[size_t(i)];
    if (!is_spread(i)) return entry(m->grad, position, m->cols, j, size);
    const char* packed = m->layout == LCDD_BLOCK ? entry(m->grad, position, m->open_cols, 0, size)
                                                 : entry(m->grad_cols, i, m->open_cols, 0, size);
    const auto before = [](const Column& a, int64_t col) { return a.col < col; };
    auto from = std::lower_bound(open.begin(), open.end(), j, before);
    const auto to = std::lower_bound(from, open.end(), j + n, before);
    std::memset(buffer, 0, size_t(n) * sizeof(float));
    for (; from != to; ++from) buffer[from->col - j] = number(packed + from->position * size);
    return buffer;
  }

  float number(const char* p) const {
    if (m->grad_dtype == LCDD_F32) {
      float x;
      std::memcpy(&x, p, 4);
      return x;
    }
    uint16_t h;
    std::memcpy(&h, p, 2);
    return m->grad_dtype == LCDD_BF16 ? float_of_bf16(h) : float_of_f16(h);
  }
};

struct Task { int64_t matrix, row; };

// Rows of one matrix that make a task of about TASK_ENTRIES.
int64_t rows_per_task(const lcdd_matrix& m) { return std::max<int64_t>(1, TASK_ENTRIES / std::max<int64_t>(1, m.cols)); }

// No more threads than the work is worth.
int worth(const lcdd_matrix* matrices, int64_t count, int threads) {
  int64_t entries = 0;
  for (int64_t k = 0; k < count; ++k) entries += matrices[k].rows * matrices[k].cols;
  return int(std::max<int64_t>(1, std::min<int64_t>(threads, entries / TASK_ENTRIES)));
}

// One row block of pass A: col_sum[cols rounded up to 16], row_sum[rows of the block], square.
void stats_block(const Rows& rows, const GradSource& source, const float* gate, const std::vector<float>& col_gate,
                 int64_t begin, float* col_sum, double* row_sum, double* square) {
  const lcdd_matrix& m = *source.m;
  const int64_t end = std::min(m.rows, begin + ROW_BLOCK), delta_size = size_of(m.delta_dtype);
  alignas(64) float buffer[QUAD][STRIP];
  double squares[ROW_BLOCK] = {};
  std::memset(col_sum, 0, size_t(round_up(m.cols, 16)) * sizeof(float));
  std::fill(row_sum, row_sum + (end - begin), 0.0);
  for (int64_t j = 0; j < m.cols; j += STRIP) {
    StatsArgs a{};
    a.col_gate = col_gate.data() + j;
    a.col_sum = col_sum + j;
    a.n = std::min(STRIP, m.cols - j);
    a.delta_dtype = int(m.delta_dtype);
    a.delta_ahead = QUAD * m.cols * delta_size;
    a.grad_ahead = m.layout == LCDD_DENSE ? QUAD * m.cols * size_of(m.grad_dtype) : 0;
    const auto flush = [&] {
      if (a.count > 0) rows.stats(a);
      a.count = 0;
    };
    for (int64_t i = begin; i < end; ++i) {
      if (!source.has_row(i)) continue;
      const int dtype = source.strip_dtype(i);
      if (a.count == QUAD || dtype != a.grad_dtype) flush();
      a.grad_dtype = dtype;
      a.grad[a.count] = source.strip(i, j, a.n, buffer[a.count]);
      a.delta[a.count] = entry(m.delta, i, m.cols, j, delta_size);
      a.row_gate[a.count] = gate[m.row_start + i];
      a.row_sum[a.count] = row_sum + (i - begin);
      a.square[a.count] = squares + (i - begin);
      ++a.count;
    }
    flush();
  }
  *square = 0;
  for (int64_t i = begin; i < end; ++i) {
    const double r = gate[m.row_start + i];
    *square += r * r * squares[i - begin];
  }
}

int grad_stats(const Rows& rows, const lcdd_matrix* matrices, int64_t count, const float* gate, const int32_t* rank,
               int64_t n_gates, float* d_gate, float* sq_norm, int threads) {
  std::vector<double> sums(size_t(n_gates), 0.0);
  double norm = 0;
  for (int64_t first = 0, last = 0; first < count; first = last) {
    // As many matrices at a time as the workspace holds.
    std::vector<GradSource> sources;
    std::vector<std::vector<float>> gates;
    std::vector<Task> tasks;
    std::vector<int64_t> offset{0};
    int64_t total_rows = 0;
    std::vector<int64_t> first_row;
    for (; last < count; ++last) {
      const lcdd_matrix& m = matrices[last];
      const int64_t blocks = round_up(m.rows, ROW_BLOCK) / ROW_BLOCK, width = round_up(m.cols, 16);
      if (last > first && offset.back() + blocks * width > WORKSPACE) break;
      sources.emplace_back();
      if (!sources.back().prepare(m, rank)) return LCDD_PACKED_MISMATCH;
      gates.push_back(col_gates(m, gate));
      first_row.push_back(total_rows);
      total_rows += m.rows;
      for (int64_t b = 0; b < blocks; ++b) {
        tasks.push_back({last - first, b * ROW_BLOCK});
        offset.push_back(offset.back() + width);
      }
    }
    std::vector<float> col_sums(static_cast<size_t>(offset.back()));
    std::vector<double> row_sums(static_cast<size_t>(total_rows)), squares(tasks.size());
    parallel_for(int64_t(tasks.size()), worth(matrices + first, last - first, threads), [&](int64_t t) {
      const Task& task = tasks[size_t(t)];
      const size_t k = size_t(task.matrix);
      stats_block(rows, sources[k], gate, gates[k], task.row, col_sums.data() + offset[size_t(t)],
                  row_sums.data() + first_row[k] + task.row, &squares[size_t(t)]);
    });
    for (size_t t = 0; t < tasks.size();) {
      const size_t k = size_t(tasks[t].matrix);
      const lcdd_matrix& m = *sources[k].m;
      for (int64_t i = 0; i < m.rows; ++i) sums[size_t(m.row_start + i)] += row_sums[size_t(first_row[k] + i)];
      std::vector<double> columns(size_t(m.cols), 0.0);
      for (; t < tasks.size() && size_t(tasks[t].matrix) == k; ++t) {
        const float* block = col_sums.data() + offset[t];
        for (int64_t j = 0; j < m.cols; ++j) columns[size_t(j)] += double(block[j]);
        norm += squares[t];
      }
      for (int64_t j = 0; j < m.cols; ++j) sums[size_t(col_gate_index(m, j))] += columns[size_t(j)];
    }
  }
  for (int64_t n = 0; n < n_gates; ++n) d_gate[n] = float(sums[size_t(n)]);
  *sq_norm = float(norm);
  return LCDD_OK;
}

// The matrices' rows, cut into tasks; each(matrix, row) for every row.
template <class Each>
void for_each_row(const lcdd_matrix* matrices, int64_t count, int threads, const Each& each) {
  std::vector<Task> tasks;
  for (int64_t k = 0; k < count; ++k) {
    for (int64_t i = 0; i < matrices[k].rows; i += rows_per_task(matrices[k])) tasks.push_back({k, i});
  }
  parallel_for(int64_t(tasks.size()), worth(matrices, count, threads), [&](int64_t t) {
    const Task& task = tasks[size_t(t)];
    const lcdd_matrix& m = matrices[task.matrix];
    const int64_t end = std::min(m.rows, task.row + rows_per_task(m));
    for (int64_t i = task.row; i < end; ++i) each(size_t(task.matrix), i);
  });
}

StepArgs weight_args(const lcdd_matrix& m, const float* gate, const std::vector<float>& col_gate, int64_t i, int64_t j) {
  StepArgs a{};
  a.weight = entry(m.weight, i, m.cols, j, size_of(m.weight_dtype));
  a.base = entry(m.base, i, m.cols, j, size_of(m.weight_dtype));
  a.delta = entry(m.delta, i, m.cols, j, size_of(m.delta_dtype));
  a.row_new = gate[m.row_start + i];
  a.col_new = col_gate.data() + j;
  a.n = std::min(STRIP, m.cols - j);
  a.weight_dtype = int(m.weight_dtype);
  a.delta_dtype = int(m.delta_dtype);
  return a;
}

void weight_eff(const Rows& rows, const lcdd_matrix* matrices, int64_t count, const float* gate, int threads) {
  std::vector<std::vector<float>> gates;
  for (int64_t k = 0; k < count; ++k) gates.push_back(col_gates(matrices[k], gate));
  for_each_row(matrices, count, threads, [&](size_t k, int64_t i) {
    const lcdd_matrix& m = matrices[k];
    if (gate[m.row_start + i] == 0.0f) {
      const int64_t size = size_of(m.weight_dtype);
      std::memcpy(entry(m.weight, i, m.cols, 0, size), entry(m.base, i, m.cols, 0, size),
                  size_t(m.cols * size));
      return;
    }
    for (int64_t j = 0; j < m.cols; j += STRIP) rows.weight_eff(weight_args(m, gate, gates[k], i, j));
  });
}

int delta_adamw(const Rows& rows, const lcdd_matrix* matrices, int64_t count, const float* gate_old,
                const float* gate_new, const int32_t* rank, const lcdd_adamw& hyper, int threads) {
  std::vector<GradSource> sources(static_cast<size_t>(count));
  std::vector<std::vector<float>> col_old, col_new;
  for (int64_t k = 0; k < count; ++k) {
    if (!sources[size_t(k)].prepare(matrices[k], rank)) return LCDD_PACKED_MISMATCH;
    col_old.push_back(col_gates(matrices[k], gate_old));
    col_new.push_back(col_gates(matrices[k], gate_new));
  }
  for_each_row(matrices, count, threads, [&](size_t k, int64_t i) {
    const lcdd_matrix& m = matrices[k];
    const float row_old = gate_old[m.row_start + i];
    alignas(64) float buffer[STRIP];
    for (int64_t j = 0; j < m.cols; j += STRIP) {
      StepArgs a = weight_args(m, gate_new, col_new[k], i, j);
      a.exp_avg = entry(m.exp_avg, i, m.cols, j, size_of(m.exp_avg_dtype));
      a.exp_avg_sq = entry(m.exp_avg_sq, i, m.cols, j, size_of(m.exp_avg_sq_dtype));
      a.exp_avg_dtype = int(m.exp_avg_dtype);
      a.exp_avg_sq_dtype = int(m.exp_avg_sq_dtype);
      a.row_old = row_old;
      a.col_old = col_old[k].data() + j;
      // A closed row's gradient is zero: not read, but its momenta still move delta.
      if (row_old != 0.0f && sources[k].has_row(i)) {
        a.grad = sources[k].strip(i, j, a.n, buffer);
        a.grad_dtype = sources[k].strip_dtype(i);
      }
      rows.adamw(a, hyper);
    }
  });
  return LCDD_OK;
}

// bad_alloc must not leave through a C function.
template <class F>
int guarded(int level, const F& f) {
  const Rows* rows = rows_for(level);
  if (rows == nullptr) return LCDD_NO_LEVEL;
  try {
    return f(*rows);
  } catch (const std::bad_alloc&) {
    return LCDD_OUT_OF_MEMORY;
  }
}

}  // namespace
}  // namespace lcdd

extern "C" {

int lcdd_abi_version(void) { return LCDD_ABI_VERSION; }

int lcdd_best_level(void) {
#ifdef LCDD_X86
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl")) {
    return LCDD_AVX512;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c")) return LCDD_AVX2;
#endif
  return LCDD_SCALAR;
}

int lcdd_weight_eff(const lcdd_matrix* matrices, int64_t count, const float* gate, int level, int threads) {
  return lcdd::guarded(level, [&](const lcdd::Rows& rows) {
    lcdd::weight_eff(rows, matrices, count, gate, threads);
    return LCDD_OK;
  });
}

int lcdd_grad_stats(const lcdd_matrix* matrices, int64_t count, const float* gate, const int32_t* rank,
                    int64_t n_gates, float* d_gate, float* sq_norm, int level, int threads) {
  return lcdd::guarded(level, [&](const lcdd::Rows& rows) {
    return lcdd::grad_stats(rows, matrices, count, gate, rank, n_gates, d_gate, sq_norm, threads);
  });
}

int lcdd_delta_adamw(const lcdd_matrix* matrices, int64_t count, const float* gate_old, const float* gate_new,
                     const int32_t* rank, const lcdd_adamw* hyper, int level, int threads) {
  return lcdd::guarded(level, [&](const lcdd::Rows& rows) {
    return lcdd::delta_adamw(rows, matrices, count, gate_old, gate_new, rank, *hyper, threads);
  });
}

}  // extern "C"
