// The list of handlers, once: each target's name in XLA and its C++ symbol. warp_cpu.cc and
// warp_cuda.cu define the same symbols, each for its own module, whose symbols are hidden.
#pragma once

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
