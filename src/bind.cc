// The Python module: hands the handlers to jaxwarp/_ffi.py, which registers them with JAX.
// Compiled into each module; JAXWARP_MODULE is its name (_cpu, _cuda, or _cuda_host for tests).
#include <nanobind/nanobind.h>

#include "handlers.h"

namespace nb = nanobind;

NB_MODULE(JAXWARP_MODULE, m) {
  m.def("registrations", [] {
    nb::dict handlers;
#define JAXWARP_ADD(target, Handler)                                                      \
  handlers[#target] = nb::capsule(reinterpret_cast<void*>(+[](XLA_FFI_CallFrame* frame) { \
    return jaxwarp::guarded(Handler, frame, JAXWARP_NO_MEMORY(target));                   \
  }));
    JAXWARP_HANDLERS(JAXWARP_ADD)
#undef JAXWARP_ADD
    return handlers;
  });
  // Of the headers this module was built with; a runtime below it refuses every handler.
  m.attr("ffi_api_version") = nb::make_tuple(XLA_FFI_API_MAJOR, XLA_FFI_API_MINOR);
}
