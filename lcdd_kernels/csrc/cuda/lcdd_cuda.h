// C ABI of the CUDA library: passes A and B, the refresh of W_eff, and gather/pack. Everything is queued on `stream`
// (a cudaStream_t); pointers are to device memory unless said otherwise. Returns 0, or a cudaError_t.
//
// The table is lcdd_matrix[count], as in lcdd_native.h. One launch covers all matrices: each is cut into tiles, and
// places[k] says where matrix k's tiles and sums begin; places[count] holds the totals.
#pragma once
#include "lcdd_native.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct lcdd_place {
  int64_t tile;      // tiles of the matrices before this one
  int64_t row_sums;  // pass A: floats of row partial sums before it,
  int64_t col_sums;  // of column partial sums,
  int64_t sums;      // and of finished sums: its rows, then its columns
} lcdd_place;

// Host: tile heights and widths {pass A rows, pass A columns, pass B rows, pass B columns}. Row tiles come before
// column tiles: tile = row_tile * ceil(cols / width) + column_tile.
void lcdd_cuda_tiles(int64_t sizes[4]);

int lcdd_cuda_weight_eff(const lcdd_matrix* table, const lcdd_place* places, int64_t count, int64_t tiles,
                         const float* gate, void* stream);
// sums: for every matrix its row sums, then its column sums. squares[tiles]: their sum is the squared norm. Row partials
// take rows * column tiles floats a matrix, column partials cols * row tiles.
int lcdd_cuda_grad_stats(const lcdd_matrix* table, const lcdd_place* places, int64_t count, int64_t tiles,
                         const float* gate, const int32_t* rank, float* row_partials, float* col_partials,
                         float* squares, float* sums, int64_t total_sums, void* stream);
// hyper: host memory.
int lcdd_cuda_delta_adamw(const lcdd_matrix* table, const lcdd_place* places, int64_t count, int64_t tiles,
                          const float* gate_old, const float* gate_new, const int32_t* rank, const lcdd_adamw* hyper,
                          void* stream);
// out[tokens, padded] = x[:, cols], zero from n_cols on; elements of 2 or 4 bytes, x [tokens, width].
int lcdd_cuda_pack_columns(const void* x, const int32_t* cols, void* out, int64_t tokens, int64_t width, int64_t n_cols,
                           int64_t padded, int element_size, void* stream);

#ifdef __cplusplus
}
#endif
