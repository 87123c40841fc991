// A gather of zeros whose kernel has the fault that the environment variable JAXWARP_FAULT names:
// whatever runs compiled device code must find it.
#include <algorithm>
#include <cstdlib>
#include <iterator>
#include <string>

#include "handlers.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

enum class Fault { kNone, kMisaligned, kOutside, kMask, kMissing, kZero, kUnwritten, kRace, kLane };
static const char* const kFaults[] = {"",     "misaligned", "outside", "mask",      "missing lane",
                                      "zero", "unwritten",  "race",    "wrong lane"};

// One warp. It writes pairs of bytes, since races are looked for in these; there are no faults
// where it cannot, or where there are fewer than two pairs.
__global__ void faulty_gather(uint8_t* out, int64_t bytes, Fault fault) {
  const int lane = threadIdx.x;
  const bool aligned = reinterpret_cast<uintptr_t>(out) % sizeof(uint16_t) == 0;
  uint16_t* const pairs = reinterpret_cast<uint16_t*>(out);
  const int64_t size = aligned ? bytes / 2 : 0;
  for (int64_t i = lane; i < size; i += 32) pairs[i] = 0;
  for (int64_t i = 2 * size; i < bytes && lane == 0; ++i) out[i] = 0;
  if (fault == Fault::kNone || size < 2) return;
  if (fault == Fault::kMisaligned && lane == 0) *reinterpret_cast<uint16_t*>(out + 1) = 0;
  if (fault == Fault::kOutside && lane == 0) pairs[size] = 0;
  if (fault == Fault::kMask) __shfl_down_sync(0xffff, lane, 1);
  if (fault == Fault::kMissing && lane != 7) __shfl_down_sync(~0u, lane, 1);
  if (fault == Fault::kLane) {
    const int next = __shfl_down_sync(~0u, lane, 1);
    if (lane == 1) pairs[1] = next == lane ? 0 : 0x4000;  // of 2.0f
  }
  if (fault == Fault::kZero && lane == 0) {
    pairs[0] = static_cast<uint16_t>(size / int64_t{threadIdx.y});
  }
  if (fault == Fault::kUnwritten && lane == 0) {
    int value;
    asm("{ .reg .b32 %%nothing; mov.b32 %0, %%nothing; }" : "=r"(value));
    pairs[0] = static_cast<uint16_t>(value);
  }
  if (fault == Fault::kRace) pairs[0] = 0;
}

// Refuses what faulty.cc does.
static ffi::Error FaultyGather(cudaStream_t stream, ffi::RemainingArgs args,
                               ffi::RemainingRets rets, ffi::Dictionary) {
  if (args.size() < 1 || rets.size() < 1) {
    return ffi::Error::InvalidArgument("jaxwarp_gather: an operand is missing");
  }
  const auto output = **rets.get<ffi::AnyBuffer>(0);
  if (output.size_bytes() == 0) return ffi::Error::Success();
  const std::string name = std::getenv("JAXWARP_FAULT");
  const auto* const fault = std::find(std::begin(kFaults), std::end(kFaults), name);
  if (fault == std::end(kFaults)) {
    return ffi::Error::InvalidArgument("jaxwarp_gather: no such fault: " + name);
  }
  faulty_gather<<<1, 32, 0, stream>>>(static_cast<uint8_t*>(output.untyped_data()),
                                      static_cast<int64_t>(output.size_bytes()),
                                      static_cast<Fault>(fault - kFaults));
  const cudaError_t status = cudaGetLastError();
  if (status == cudaSuccess) return ffi::Error::Success();
  return ffi::Error::Internal(std::string("jaxwarp_gather: ") + cudaGetErrorString(status));
}
XLA_FFI_DEFINE_HANDLER_SYMBOL(Gather, FaultyGather,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::PlatformStream<cudaStream_t>>()
                                  .RemainingArgs()
                                  .RemainingRets()
                                  .Attrs());
