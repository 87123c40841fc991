// The list of handlers, once: each target's name in XLA and its C++ symbol. warp_cpu.cc and
// warp_cuda.cu define the same symbols, each for its own module, whose symbols are hidden.
#pragma once

#include <exception>

#include "xla/ffi/api/c_api.h"

#define JAXWARP_HANDLERS(X)                       \
  X(jaxwarp_gather, Gather)                       \
  X(jaxwarp_gather_tangent, GatherTangent)        \
  X(jaxwarp_gather_vjp, GatherVjp)                \
  X(jaxwarp_gather_vjp_tangent, GatherVjpTangent) \
  X(jaxwarp_splat, Splat)                         \
  X(jaxwarp_splat_tangent, SplatTangent)          \
  X(jaxwarp_splat_vjp, SplatVjp)

#define JAXWARP_DECLARE(target, Handler) extern "C" XLA_FFI_Error* Handler(XLA_FFI_CallFrame*);
JAXWARP_HANDLERS(JAXWARP_DECLARE)
#undef JAXWARP_DECLARE

namespace jaxwarp {

// A handler as XLA calls it: what it throws, a lack of memory for its scratch, becomes an error of
// that call that names the handler. The text is at hand, since there may be no memory for it.
inline XLA_FFI_Error* guarded(XLA_FFI_Handler* handler, XLA_FFI_CallFrame* frame,
                              const char* no_memory) {
  try {
    return handler(frame);
  } catch (const std::exception&) {
    XLA_FFI_Error_Create_Args args = {XLA_FFI_Error_Create_Args_STRUCT_SIZE, nullptr, no_memory,
                                      XLA_FFI_Error_Code_RESOURCE_EXHAUSTED};
    return frame->api->XLA_FFI_Error_Create(&args);
  }
}
#define JAXWARP_NO_MEMORY(target) #target ": not enough memory for its scratch"

}  // namespace jaxwarp
