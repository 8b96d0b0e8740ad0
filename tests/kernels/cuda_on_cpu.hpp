// Enough of CUDA to run the kernels of csrc/cuda on a CPU, for tests on machines without a GPU: a block's threads are
// coroutines that take turns, and a barrier or a shuffle ends a turn. Says nothing of speed or of races within a warp.
#pragma once
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <vector>

#define __global__
#define __device__
#define __shared__ static
#define __launch_bounds__(threads)
using std::max;
using std::min;

struct Index { unsigned x; };
inline Index threadIdx, blockIdx, gridDim;
struct uint2 { unsigned x, y; };
struct uint4 { unsigned x, y, z, w; };
struct float4 { float x, y, z, w; };
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline float __uint_as_float(unsigned u) { float x; std::memcpy(&x, &u, 4); return x; }

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess, cudaErrorInvalidValue };
enum { cudaFuncAttributeMaxDynamicSharedMemorySize };
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
template <class K> cudaError_t cudaFuncSetAttribute(K, int, int) { return cudaSuccess; }

struct __half { uint16_t bits; };
struct __nv_bfloat16 { uint16_t bits; };
inline float __half2float(__half h) { _Float16 x; std::memcpy(&x, &h, 2); return float(x); }
inline __half __float2half_rn(float f) { const _Float16 x = _Float16(f); __half h; std::memcpy(&h, &x, 2); return h; }
inline __half __ushort_as_half(unsigned u) { return {uint16_t(u)}; }
inline uint16_t __half_as_ushort(__half h) { return h.bits; }
inline float __bfloat162float(__nv_bfloat16 h) { return __uint_as_float(unsigned(h.bits) << 16); }
inline __nv_bfloat16 __float2bfloat16_rn(float f) {
  unsigned u;
  std::memcpy(&u, &f, 4);
  return {uint16_t(f != f ? 0x7fff : (u + 0x7fff + (u >> 16 & 1)) >> 16)};
}
inline uint16_t __bfloat16_as_ushort(__nv_bfloat16 h) { return h.bits; }

namespace emulation {

struct Thread {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(64 << 10);
  bool done = false;
};
inline std::vector<Thread> threads;
inline ucontext_t scheduler;
inline std::function<void()> body;
inline std::vector<uint4> dynamic_shared;
inline float exchange[1024];

inline void turn() { swapcontext(&threads[threadIdx.x].context, &scheduler); }
inline void start() {
  body();
  threads[threadIdx.x].done = true;
  turn();
}

struct Launch {
  unsigned blocks, count;
  size_t shared = 0;
  cudaStream_t stream = nullptr;

  template <class K, class... Arguments>
  void run(K kernel, Arguments... arguments) const {
    gridDim.x = blocks;
    body = [=] { kernel(arguments...); };
    dynamic_shared.resize(shared / sizeof(uint4) + 1);
    threads.resize(count);
    for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x) {
      for (Thread& thread : threads) {
        getcontext(&thread.context);
        thread.context.uc_stack.ss_sp = thread.stack.data();
        thread.context.uc_stack.ss_size = thread.stack.size();
        thread.context.uc_link = nullptr;
        thread.done = false;
        makecontext(&thread.context, start, 0);
      }
      for (bool running = true; running;) {
        running = false;
        for (threadIdx.x = 0; threadIdx.x < count; ++threadIdx.x) {
          Thread& thread = threads[threadIdx.x];
          if (thread.done) continue;
          swapcontext(&scheduler, &thread.context);
          running = running || !thread.done;
        }
      }
    }
  }
};

}  // namespace emulation

inline void __syncthreads() { emulation::turn(); }
inline float __shfl_xor_sync(unsigned, float x, int lane_mask) {
  emulation::exchange[threadIdx.x] = x;
  emulation::turn();
  const float other = emulation::exchange[threadIdx.x ^ unsigned(lane_mask)];
  emulation::turn();
  return other;
}
