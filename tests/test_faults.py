"""What goes wrong around the kernels: too many callers, other programs, processes, and versions.

JAXWARP_FAULT_CALLS sets the number of calls of each thread; 10,000 take minutes.
"""

import hashlib
import os
import re
import subprocess
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxwarp

CALLS = int(os.environ.get("JAXWARP_FAULT_CALLS", 100))
THREADS = 8
F = np.float32


def run_python(*arguments, **environment):
    """What a process of its own prints, on the CPU."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONWARNINGS": "default", **environment}
    command = [sys.executable, "-P", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, done.stderr


def mixed_calls():
    """Compiled functions of arrays, each with its arguments: every kernel, and several sizes."""
    rng = np.random.default_rng(0)

    def arrays(height, width, channels):
        image = rng.standard_normal((height, width, channels)).astype(F)
        flow = rng.uniform(-9, 9, (height, width, 2)).astype(F)
        return image, flow

    def loss(warp, **options):
        return lambda image, flow: (warp(image, flow, **options) ** 2).sum()

    def of_values_and_flow(function):
        return jax.value_and_grad(function, (0, 1))

    def softmax(image, flow):
        return jaxwarp.forward_warp(image, flow, reduce="softmax", importance=flow[..., 0])

    def pushed(image, flow):
        warp = lambda flow: jaxwarp.forward_warp(image, flow, forward_mode=True)  # noqa: E731
        return jax.jvp(warp, (flow,), (jnp.ones_like(flow),))

    functions = [
        jaxwarp.backward_warp,
        jaxwarp.forward_warp,
        of_values_and_flow(loss(jaxwarp.backward_warp)),
        of_values_and_flow(loss(jaxwarp.forward_warp, reduce="sum")),
        of_values_and_flow(loss(softmax)),
        pushed,
    ]
    small, large = arrays(9, 7, 3), arrays(70, 90, 8)
    return [(jax.jit(f), xs) for f in functions for xs in (small, large)]


def digest(tree):
    return hashlib.sha256(
        b"".join(np.asarray(x).tobytes() for x in jax.tree.leaves(tree))
    ).hexdigest()


def in_threads(bodies, timeout):
    """Runs each body in a thread of its own; fails if one raises, or takes too long."""
    failures = []

    def run(body):
        try:
            body()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(body,), daemon=True) for body in bodies]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout)
    assert not any(thread.is_alive() for thread in threads), "a thread hangs"
    assert not failures, failures[0]


def test_many_threads():
    calls = mixed_calls()
    expected = [digest(function(*arrays)) for function, arrays in calls]

    def body(seed):
        rng = np.random.default_rng(seed)
        for which in rng.integers(len(calls), size=CALLS):
            function, arrays = calls[which]
            assert digest(function(*arrays)) == expected[which]

    in_threads([lambda seed=seed: body(seed) for seed in range(THREADS)], 60 + CALLS)


def test_programs_in_flight():
    """Many programs are dispatched before the result of any is asked for."""
    calls = mixed_calls()
    expected = [digest(function(*arrays)) for function, arrays in calls]

    def body():
        pending = [
            (i, function(*arrays)) for _ in range(4) for i, (function, arrays) in enumerate(calls)
        ]
        for i, result in reversed(pending):
            assert digest(result) == expected[i]

    in_threads([body] * 4, 120)


def test_among_callbacks():
    """Python that XLA calls back waits for the same threads as the kernels."""
    image, flow = np.ones((70, 90, 8), F), np.full((70, 90, 2), 0.5, F)

    def program(image, flow):
        for _ in range(20):
            shape = jax.ShapeDtypeStruct(image.shape, image.dtype)
            image = jaxwarp.backward_warp(image, flow, boundary="nearest")
            image = jax.pure_callback(lambda x: np.asarray(x) + F(1), shape, image)
            image = jaxwarp.forward_warp(image, 0 * flow)
        return image

    compiled = jax.jit(program)

    def body():
        for _ in range(5):
            np.testing.assert_array_equal(compiled(image, flow), image + 20)

    in_threads([body] * 4, 240)


def test_warp_inside_a_callback():
    """A callback that itself calls a kernel, while a kernel of the outer program may wait."""
    image, flow = np.ones((70, 90, 8), F), np.zeros((70, 90, 2), F)
    inner = jax.jit(jaxwarp.backward_warp)
    inner(image, flow)

    def program(image, flow):
        shape = jax.ShapeDtypeStruct(image.shape, image.dtype)
        moved = jax.pure_callback(lambda *x: np.asarray(inner(*x)), shape, image, flow)
        return jaxwarp.backward_warp(moved, flow) + jaxwarp.forward_warp(image, flow)

    compiled = jax.jit(program)
    in_threads([lambda: np.testing.assert_array_equal(compiled(image, flow), 2 * image)], 120)


SPAWNING = """
import multiprocessing
import numpy as np
import jaxwarp

def total(_=None):
    image = np.arange(24, dtype=np.float32).reshape(4, 6, 1)
    return float(jaxwarp.backward_warp(image, np.ones((4, 6, 2), np.float32)).sum())

if __name__ == "__main__":
    expected = total()
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        assert pool.map(total, range(4)) == [expected] * 4
    print("done", expected)
"""


def test_spawned_processes(tmp_path):
    """Workers of a pool, as data loaders start them, compute the parent's values."""
    script = tmp_path / "spawning.py"
    script.write_text(SPAWNING)
    out, _ = run_python(script)
    assert out.strip() == f"done {np.arange(24).reshape(4, 6)[1:, 1:].sum():.1f}"


FORKING = """
import os
import numpy as np
import jaxwarp

image, flow = np.ones((64, 64, 8), np.float32), np.zeros((64, 64, 2), np.float32)
before = np.asarray(jaxwarp.forward_warp(image, flow))
child = os.fork()
if child == 0:
    os._exit(7)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
assert (before == jaxwarp.forward_warp(image, flow)).all()
print("done")
"""


def test_forked_process():
    """JAX warns of a fork; the parent goes on."""
    out, warnings = run_python("-c", FORKING)
    assert out.strip() == "done"
    assert re.search(r"RuntimeWarning: os.fork\(\) was called.*JAX", warnings), warnings


OLDER_RUNTIME = """
import sys
import jax, jax.numpy as jnp

jax.ffi.include_dir = lambda: sys.argv[1]
try:
    import jaxwarp
except ImportError as error:
    print(error)
print(jnp.arange(3.0).sum())
"""


def test_older_runtime(tmp_path):
    """A jaxlib older than the headers: the import says so, and JAX still computes."""
    header = tmp_path / "xla" / "ffi" / "api" / "c_api.h"
    header.parent.mkdir(parents=True)
    header.write_text("#define XLA_FFI_API_MAJOR 0\n#define XLA_FFI_API_MINOR 1\n")
    out, _ = run_python("-c", OLDER_RUNTIME, tmp_path)
    message, total = out.splitlines()
    assert re.match(
        r"jaxwarp: expected a jaxlib with XLA FFI API 0\.[3-9].* or later, got", message
    )
    assert "with 0.1; upgrade jax" in message
    assert total == "3.0"


OPTIONS = {
    "method": "linear",
    "boundary": "constant",
    "fill_value": np.float64(0),
    "derivative": np.zeros(2, np.int64),
    "displacement": False,
    "deterministic": False,
    "channels_first": False,
    "cubic_a": np.float64(-0.5),
    "reduce": "sum",
    "min_coverage": np.float64(0),
}


@pytest.mark.parametrize("name", ["inputs", "outputs", *OPTIONS])
def test_wrong_attributes(name):
    """An attribute that is missing or of another type is named, and the next call works."""
    image, points = np.ones((4, 5, 3), F), np.ones((7, 2), F)
    attributes = {"inputs": "image points", "outputs": "values", **OPTIONS}
    gather = jax.ffi.ffi_call("jaxwarp_gather", jax.ShapeDtypeStruct((7, 3), F))
    missing = {n: x for n, x in attributes.items() if n != name}
    for wrong in (missing, attributes | {name: np.float32(1)}):
        with pytest.raises(jax.errors.JaxRuntimeError, match=f"jaxwarp_gather: attribute {name} "):
            jax.block_until_ready(gather(image, points, **wrong))
        np.testing.assert_array_equal(gather(image, points, **attributes), 1)


def test_no_memory_for_scratch():
    """An error of that call; the process lives, and the next call works."""
    many = 2**40  # batch elements without points, of which the kernel keeps a list
    shapes = {"points": (many, 0, 2), "values": (many, 0, 3)}
    attributes = {"inputs": "points values", "outputs": "image", **OPTIONS}

    @jax.jit
    def splat():
        arrays = [jnp.zeros(shape, F) for shape in shapes.values()]
        call = jax.ffi.ffi_call("jaxwarp_splat", jax.ShapeDtypeStruct((1, 5, 6, 3), F))
        return call(*arrays, **attributes)

    for _ in range(2):
        with pytest.raises(jax.errors.JaxRuntimeError, match="jaxwarp_splat: not enough memory"):
            jax.block_until_ready(splat())
        assert jaxwarp.splat(np.ones((1, 3), F), np.zeros((1, 2), F), (5, 6)).sum() == 3


REPEATED = """
import hashlib, sys, threading
import jax, jax.numpy as jnp, numpy as np
import jaxwarp

rng = np.random.default_rng(0)
values = rng.standard_normal((150, 200, 4)).astype(np.float32)
flow = rng.uniform(-20, 20, (150, 200, 2)).astype(np.float32)

def splat(values, flow):
    warp = lambda values, flow: jaxwarp.forward_warp(values, flow, boundary="nearest")
    out, pull = jax.vjp(warp, values, flow)
    return out, pull(out)

stop = threading.Event()
def load():
    while not stop.is_set():
        np.linalg.svd(rng.standard_normal((60, 60)))

loads = [threading.Thread(target=load) for _ in range(int(sys.argv[1]))]
for thread in loads: thread.start()
splat = jax.jit(splat)
hashes = set()
for _ in range(int(sys.argv[2])):
    bits = b"".join(np.asarray(x).tobytes() for x in jax.tree.leaves(splat(values, flow)))
    hashes.add(hashlib.sha256(bits).hexdigest())
stop.set()
print(*hashes)
"""


def test_one_hash():
    """A splat and its gradients 100 times, with other threads, load and cores: the same bits."""
    hashes = set()
    for threads, loads in ((1, 0), (2, 3), (3, 1), (8, 2)):
        # NPROC is what XLA takes for the number of threads of its pool.
        out, _ = run_python("-c", REPEATED, loads, 25, NPROC=str(threads))
        hashes |= set(out.split())
    assert len(hashes) == 1


NON_FINITE = """
import hashlib
import jax, numpy as np
import jaxwarp

rng = np.random.default_rng(0)
shape, count = (302, 33), 40_000
values, d_values = rng.standard_normal((2, count, 8)).astype(np.float32)
values[::7] = np.inf
points = rng.uniform(1, np.array(shape[::-1]) - 3, (count, 2)).astype(np.float32)

def moved(*primals_and_tangents):
    splat = lambda values, points: jaxwarp.splat(values, points, shape, forward_mode=True)
    return jax.jvp(splat, primals_and_tangents[:2], primals_and_tangents[2:])[1]

out = jax.jit(moved)(values, points, d_values, 0 * points)
print(hashlib.sha256(np.isnan(out)).hexdigest())
"""


def test_one_hash_of_non_finite_values():
    """Where inf goes does not depend on the bands of rows that the threads take."""
    hashes = {run_python("-c", NON_FINITE, NPROC=str(threads))[0] for threads in (1, 2, 8)}
    assert len(hashes) == 1
