// Stands in for CUDA's headers, so that a C++ compiler builds the kernels for the host: a launch
// runs its threads one after the other. Vector accesses check their alignment, as the hardware
// does.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <optional>
#include <utility>

#include "xla/ffi/api/ffi.h"

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(threads)

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline thread_local dim3 gridDim, blockDim, blockIdx, threadIdx;

struct alignas(16) float4 {
  float x, y, z, w;
};
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

template <class T>
T* aligned(T* place) {
  if (reinterpret_cast<uintptr_t>(place) % alignof(T) == 0) return place;
  std::fprintf(stderr, "cuda_shim: access of %zu bytes at a place aligned to less\n", sizeof(T));
  std::abort();
}

template <class T>
void atomicAdd(T* place, T value) {
  *aligned(place) += value;
}
inline void atomicAdd(float4* place, float4 value) {
  aligned(place);
  atomicAdd(&place->x, value.x);
  atomicAdd(&place->y, value.y);
  atomicAdd(&place->z, value.z);
  atomicAdd(&place->w, value.w);
}

template <class T>
void atomicMax(T* place, T value) {
  if (value > *aligned(place)) *place = value;
}
template <class T>
void atomicMin(T* place, T value) {
  if (value < *aligned(place)) *place = value;
}

struct HostStream;
using cudaStream_t = HostStream*;
enum cudaError_t { cudaSuccess };
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }
inline cudaError_t cudaMemsetAsync(void* place, int value, size_t bytes, cudaStream_t) {
  std::memset(place, value, bytes);
  return cudaSuccess;
}

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};
template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  gridDim = config->gridDim;
  blockDim = config->blockDim;
  for (blockIdx.y = 0; blockIdx.y < gridDim.y; ++blockIdx.y) {
    for (blockIdx.x = 0; blockIdx.x < gridDim.x; ++blockIdx.x) {
      for (threadIdx.x = 0; threadIdx.x < blockDim.x; ++threadIdx.x) kernel(arguments...);
    }
  }
  return cudaSuccess;
}

// There is no stream on the host.
template <>
struct xla::ffi::CtxDecoding<xla::ffi::PlatformStream<cudaStream_t>> {
  using Type = cudaStream_t;
  static std::optional<Type> Decode(const XLA_FFI_Api*, XLA_FFI_ExecutionContext*,
                                    DiagnosticEngine&) {
    return nullptr;
  }
};
