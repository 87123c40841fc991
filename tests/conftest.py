"""What holds for all tests: float64 is on, the CPU counts as eight devices, and only tests marked
`gpu` run on a GPU.

Without a GPU those are skipped, or, with JAXWARP_REQUIRE_CUDA=1, fail.
"""

import os

import remembered

remembered.remember_programs()

import jax  # noqa: E402 - it reads its settings now
import pytest  # noqa: E402

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_num_cpu_devices", 8)  # for tests of sharding; all others use the first one
# Most of the time goes into compiling the reference. This asks LLVM for less, on the CPU and only
# in this process; the kernels are compiled already.
jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture(autouse=True)
def device(request):
    """The device of a test, which is also where its arrays go."""
    if not request.node.get_closest_marker("gpu"):
        platform = "cpu"
    elif "gpu" in _platforms():
        platform = "gpu"
    elif os.environ.get("JAXWARP_REQUIRE_CUDA") == "1":
        pytest.fail("JAXWARP_REQUIRE_CUDA=1, but JAX sees no GPU", pytrace=False)
    else:
        pytest.skip("needs a GPU")
    with jax.default_device(jax.devices(platform)[0]) as chosen:
        yield chosen


@pytest.fixture(autouse=True, scope="module")
def compiled_programs_are_dropped():
    """A test file compiles thousands of small programs; they need not stay until the end."""
    yield
    jax.clear_caches()


def _platforms():
    try:
        return {"cpu", *(device.platform for device in jax.devices("gpu"))}
    except RuntimeError:  # JAX knows no such platform here
        return {"cpu"}
