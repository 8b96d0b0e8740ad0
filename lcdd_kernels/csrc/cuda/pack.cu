// Gather/pack: out = x[:, cols]. With some 20% of the columns open, nearly every 32-byte sector of a row is needed, so a
// block reads whole rows in order into shared memory and picks the columns there; its writes are in order too.
#include <cuda_runtime.h>

#include "lcdd_cuda.h"

namespace {

constexpr int THREADS = 256;
constexpr int64_t STAGED_BYTES = 96 << 10;  // longest row that goes through shared memory: two blocks share an SM
constexpr int64_t BLOCKS = 2048;

// STAGED: rows go through shared memory; else (rows too long for it) columns are gathered from global memory.
template <class T, bool STAGED>
__global__ void __launch_bounds__(THREADS) pack_columns_kernel(
    const T* x, const int32_t* cols, T* out, int64_t tokens, int width, int n_cols, int padded) {
  extern __shared__ uint4 staged[];
  constexpr int PER_WORD = sizeof(uint4) / sizeof(T);
  T* row = reinterpret_cast<T*>(staged);
  const bool vector = width % PER_WORD == 0 && (reinterpret_cast<uintptr_t>(x) & 15) == 0;
  for (int64_t t = blockIdx.x; t < tokens; t += gridDim.x) {
    const T* source = x + t * width;
    if (STAGED) {
      __syncthreads();  // the row before has been read
      if (vector) {
        for (int w = threadIdx.x; w < width / PER_WORD; w += THREADS) staged[w] = reinterpret_cast<const uint4*>(source)[w];
      } else {
        for (int j = threadIdx.x; j < width; j += THREADS) row[j] = source[j];
      }
      __syncthreads();
      source = row;
    }
    for (int c = threadIdx.x; c < padded; c += THREADS) out[t * padded + c] = c < n_cols ? source[cols[c]] : T(0);
  }
}

template <class T>
cudaError_t pack(const void* x, const int32_t* cols, void* out, int64_t tokens, int width, int n_cols, int padded,
                 cudaStream_t stream) {
  const T* from = static_cast<const T*>(x);
  T* to = static_cast<T*>(out);
  const unsigned blocks = unsigned(tokens < BLOCKS ? tokens : BLOCKS);
  const int64_t bytes = int64_t(width) * int64_t(sizeof(T));
  if (bytes > STAGED_BYTES) {
    pack_columns_kernel<T, false><<<blocks, THREADS, 0, stream>>>(from, cols, to, tokens, width, n_cols, padded);
    return cudaGetLastError();
  }
  const auto kernel = pack_columns_kernel<T, true>;
  const cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(STAGED_BYTES));
  if (status != cudaSuccess) return status;
  kernel<<<blocks, THREADS, size_t(bytes), stream>>>(from, cols, to, tokens, width, n_cols, padded);
  return cudaGetLastError();
}

}  // namespace

extern "C" int lcdd_cuda_pack_columns(const void* x, const int32_t* cols, void* out, int64_t tokens, int64_t width,
                                      int64_t n_cols, int64_t padded, int element_size, void* stream) {
  if (width > INT32_MAX || padded > INT32_MAX) return cudaErrorInvalidValue;
  if (tokens == 0 || padded == 0) return cudaSuccess;
  const cudaStream_t on = cudaStream_t(stream);
  if (element_size == 2) return pack<uint16_t>(x, cols, out, tokens, int(width), int(n_cols), int(padded), on);
  if (element_size == 4) return pack<uint32_t>(x, cols, out, tokens, int(width), int(n_cols), int(padded), on);
  return cudaErrorInvalidValue;
}
