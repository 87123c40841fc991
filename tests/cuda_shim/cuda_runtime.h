// Stands in for CUDA's headers, so that a C++ compiler builds the kernels for the host: a launch
// runs its threads one after the other, those of a warp backwards, so that a shuffle finds what
// later lanes have given. Vector accesses check their alignment, as the hardware does.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <optional>
#include <utility>
#include <vector>

#include "xla/ffi/api/ffi.h"

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(threads, blocks)

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline thread_local dim3 gridDim, blockDim, blockIdx, threadIdx;

struct alignas(8) float2 {
  float x, y;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
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
inline void atomicAdd(float2* place, float2 value) {
  aligned(place);
  atomicAdd(&place->x, value.x);
  atomicAdd(&place->y, value.y);
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
inline void atomicOr(unsigned long long* place, unsigned long long value) {
  *aligned(place) |= value;
}

// What each lane of the running warp has given to its shuffles, in order.
constexpr unsigned kWarp = 32;
inline thread_local std::vector<double> shuffled[kWarp];

// The first lane of each `width` gets what it would on a GPU, and so do all that its sum needs.
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned step, int width) {
  const unsigned lane = threadIdx.x % kWarp, source = lane + step;
  if (!(mask >> lane & 1)) std::abort();
  const size_t call = shuffled[lane].size();
  shuffled[lane].push_back(static_cast<double>(value));
  if (lane % width + step >= static_cast<unsigned>(width)) return value;
  if (!(mask >> source & 1) || shuffled[source].size() <= call) {
    std::fprintf(stderr, "cuda_shim: lane %u waits for lane %u, which does not come\n", lane,
                 source);
    std::abort();
  }
  return static_cast<T>(shuffled[source][call]);
}

struct HostStream;
using cudaStream_t = HostStream*;
enum cudaError_t { cudaSuccess, cudaErrorMemoryAllocation = 2 };
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : "out of memory";
}
inline cudaError_t cudaStreamCreate(cudaStream_t* stream) {
  *stream = nullptr;
  return cudaSuccess;
}
inline cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
inline cudaError_t cudaStreamDestroy(cudaStream_t) { return cudaSuccess; }

inline cudaError_t cudaMalloc(void** place, size_t bytes) {
  constexpr size_t kAlignment = 256;
  *place = std::aligned_alloc(kAlignment, (bytes + kAlignment - 1) / kAlignment * kAlignment);
  return *place == nullptr ? cudaErrorMemoryAllocation : cudaSuccess;
}
inline cudaError_t cudaFree(void* place) {
  std::free(place);
  return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* place, int value, size_t bytes, cudaStream_t) {
  std::memset(place, value, bytes);
  return cudaSuccess;
}
enum cudaMemcpyKind { cudaMemcpyDeviceToHost = 2, cudaMemcpyDeviceToDevice };
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind,
                                   cudaStream_t) {
  std::memcpy(to, from, bytes);
  return cudaSuccess;
}

// An event holds the time on the host's clock at which it was recorded.
struct HostEvent {
  std::chrono::steady_clock::time_point time;
};
using cudaEvent_t = HostEvent*;
inline cudaError_t cudaEventCreate(cudaEvent_t* event) {
  *event = new HostEvent;
  return cudaSuccess;
}
inline cudaError_t cudaEventDestroy(cudaEvent_t event) {
  delete event;
  return cudaSuccess;
}
inline cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t) {
  event->time = std::chrono::steady_clock::now();
  return cudaSuccess;
}
inline cudaError_t cudaEventSynchronize(cudaEvent_t) { return cudaSuccess; }
inline cudaError_t cudaEventElapsedTime(float* ms, cudaEvent_t start, cudaEvent_t stop) {
  *ms = std::chrono::duration<float, std::milli>(stop->time - start->time).count();
  return cudaSuccess;
}

struct cudaDeviceProp {
  char name[256];
  int major, minor;
};
inline cudaError_t cudaGetDeviceProperties(cudaDeviceProp* device, int) {
  *device = {"host (cuda_shim)", JAXWARP_CUDA_SHIM / 100, JAXWARP_CUDA_SHIM / 10 % 10};
  return cudaSuccess;
}
inline cudaError_t cudaDriverGetVersion(int* version) {
  *version = 0;
  return cudaSuccess;
}
inline cudaError_t cudaRuntimeGetVersion(int* version) { return cudaDriverGetVersion(version); }

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
  // So that tests see what depends on the order: an environment variable turns it around.
  const bool backwards = std::getenv("JAXWARP_CUDA_SHIM_BACKWARDS") != nullptr;
  const auto nth = [backwards](unsigned i, unsigned count) {
    return backwards ? count - 1 - i : i;
  };
  const unsigned warps = blockDim.x / kWarp;
  for (unsigned y = 0; y < gridDim.y; ++y) {
    blockIdx.y = nth(y, gridDim.y);
    for (unsigned x = 0; x < gridDim.x; ++x) {
      blockIdx.x = nth(x, gridDim.x);
      for (unsigned warp = 0; warp < warps; ++warp) {
        for (auto& values : shuffled) values.clear();
        for (unsigned lane = kWarp; lane-- > 0;) {
          threadIdx.x = nth(warp, warps) * kWarp + lane;
          kernel(arguments...);
        }
      }
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
