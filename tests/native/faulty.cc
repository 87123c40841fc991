// A gather of zeros with the fault that the environment variable JAXWARP_FAULT names: whatever
// looks for faults must find it.
#include <cstdlib>
#include <new>
#include <string>

#include "handlers.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

static ffi::Error FaultyGather(ffi::ThreadPool pool, ffi::RemainingArgs args,
                               ffi::RemainingRets rets, ffi::Dictionary) {
  if (args.size() < 1 || rets.size() < 1) {
    return ffi::Error::InvalidArgument("jaxwarp_gather: an operand is missing");
  }
  const auto input = *args.get<ffi::AnyBuffer>(0);
  const auto output = **rets.get<ffi::AnyBuffer>(0);
  const int64_t size = static_cast<int64_t>(output.size_bytes());
  if (size == 0) return ffi::Error::Success();

  const std::string fault = std::getenv("JAXWARP_FAULT");
  auto* const out = static_cast<uint8_t*>(output.untyped_data());
  const int64_t end = size + (fault == "too long") - (fault == "too short");
  for (int64_t i = 0; i < end; ++i) out[i] = 0;
  if (fault == "overflow") {
    const volatile int64_t product = size * INT64_MAX;
    out[0] = static_cast<uint8_t>(product);
  }
  if (fault == "last bit") out[0] = 1;
  if (fault == "threads") out[0] = static_cast<uint8_t>(pool.num_threads());
  if (fault == "input" && input.size_bytes() > 0) {
    static_cast<uint8_t*>(input.untyped_data())[0] ^= 1;
  }
  if (fault == "no name") return ffi::Error::InvalidArgument("something is wrong");
  if (fault == "throws") throw std::bad_alloc();
  if (fault == "race" && pool.num_threads() > 1) {
    pool.Schedule([out] { out[0] = 0; });
    out[0] = 0;
  }
  return ffi::Error::Success();
}
XLA_FFI_DEFINE_HANDLER_SYMBOL(
    Gather, FaultyGather,
    ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().RemainingArgs().RemainingRets().Attrs());
