"""The CUDA kernels on a GPU, against the reference on the CPU. `make test-gpu` runs this file."""

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxwarp
from jaxwarp import reference

pytestmark = pytest.mark.gpu

# Atomic additions come in any order: float64 sums of a few numbers near 1, and what dividing them
# by the least D_j, (1/64)^3, makes of their rounding.
EXACT, AVERAGED = 1e-12, 1e-10
SINGLE = 1e-5
TOLERANCE = {"float32": SINGLE, "bfloat16": 2.0**-8, "float16": 2.0**-11 + 1e-6}


def value_and_cotangents(function):
    def run(*arrays):
        out, vjp = jax.vjp(function, *arrays)
        ct = jax.tree.map(
            lambda o: jnp.cos(jnp.arange(o.size)).reshape(o.shape).astype(o.dtype), out
        )
        return out, vjp(ct)

    return run


def on_cpu(function, *arrays):
    with jax.default_device(jax.devices("cpu")[0]):
        return jax.jit(function)(*arrays)


def on_gpu(function, *arrays):
    results = jax.jit(function)(*arrays)
    assert {d.platform for r in jax.tree.leaves(results) for d in r.devices()} == {"gpu"}
    return results


@pytest.mark.parametrize("case", cases.ALL, ids=str)
def test_values_and_cotangents(case):
    arrays = case.inputs()
    expected = on_cpu(value_and_cotangents(case.function(reference)), *arrays)
    actual = on_gpu(value_and_cotangents(case.function(jaxwarp)), *arrays)
    tolerance = AVERAGED if case.options.get("reduce", "sum") != "sum" else EXACT
    cases.assert_close(actual, expected, tolerance)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("channels", [1, 2, 3, 4, 6, 8, 12, 17, 64, 1000])
def test_any_number_of_channels(channels, dtype):
    rng = np.random.default_rng(channels)
    image = rng.standard_normal((5, 6, channels)).astype(jnp.dtype(dtype))
    flow = (rng.integers(-192, 192, (5, 6, 2)) / 64).astype(np.float32)

    def warps(module):
        def run(image, flow):
            average = module.forward_warp(image, flow)
            return module.backward_warp(image, flow, boundary="reflect"), average

        return run

    actual = on_gpu(warps(jaxwarp), image, flow)
    expected = on_cpu(warps(reference), image.astype(np.float32), flow)
    cases.assert_close(actual, expected, TOLERANCE[dtype])
    _, (_, ct_flow) = on_gpu(value_and_cotangents(warps(jaxwarp)), image, flow)
    _, (_, expected) = on_cpu(
        value_and_cotangents(warps(reference)), image.astype(np.float64), flow
    )
    # The cotangents are rounded to the dtype of the image, and summed over channels and corners.
    cases.assert_close(ct_flow, expected, 4 * TOLERANCE[dtype])


@pytest.mark.parametrize("reach", [0.5, 64], ids=["smooth", "random"])
def test_large_arrays_and_a_shared_image(reach):
    rng, shape = np.random.default_rng(0), (1080, 1920)
    image = rng.standard_normal((*shape, 3)).astype(np.float32)
    flow = np.round(rng.uniform(-reach, reach, (2, *shape, 2)) * 64).astype(np.float32) / 64
    w = rng.uniform(0.5, 1, shape).astype(np.float32)

    def warps(module):
        def run(image, flow, w):
            return module.backward_warp(image, flow), module.forward_warp(image, flow, importance=w)

        return run

    actual = on_gpu(value_and_cotangents(warps(jaxwarp)), image, flow, w)
    # The CPU kernels are held against the reference in the other files; that one is slow here.
    expected = on_cpu(value_and_cotangents(warps(jaxwarp)), image, flow, w)
    cases.assert_close(actual, expected, SINGLE)


@pytest.mark.parametrize("case", cases.FEW, ids=str)
def test_under_vmap_scan_and_second_order(case):
    arrays = case.inputs("inside")

    def run(module):
        function = case.function(module)

        def loss(*arrays):
            return sum(jnp.sum(jnp.sin(o)) for o in jax.tree.leaves(function(*arrays)))

        gradient = jax.grad(loss, 1)

        def step(points, _):
            return points + 0.01 * jnp.tanh(gradient(arrays[0], points, *arrays[2:])), None

        def everything(points):
            shifted = points + jnp.arange(3.0).reshape(3, *(1,) * points.ndim) / 128
            return (
                jax.vmap(lambda p: gradient(arrays[0], p, *arrays[2:]))(shifted),
                # A loop, so that XLA records the calls in a CUDA graph.
                jax.lax.scan(step, points + 1 / 256, None, length=5)[0],
                jax.jvp(
                    lambda p: gradient(arrays[0], p, *arrays[2:]),
                    (points + 1 / 128,),
                    (jnp.cos(points),),
                ),
            )

        return everything

    expected = on_cpu(run(reference), arrays[1])
    cases.assert_close(on_gpu(run(jaxwarp), arrays[1]), expected, 1e-9)


def test_values_alone_are_the_same_in_every_run():
    # A gather has no sum whose order could vary.
    rng = np.random.default_rng(0)
    image = rng.standard_normal((300, 400, 3)).astype(np.float32)
    flow = rng.uniform(-40, 40, (300, 400, 2)).astype(np.float32)
    warp = jax.jit(jaxwarp.backward_warp)
    first = np.asarray(warp(image, flow))
    for _ in range(3):
        np.testing.assert_array_equal(warp(image, flow), first)


@pytest.mark.parametrize("reduce", ["sum", "average", "softmax"])
def test_deterministic(reduce):
    """One set of bits in 20 runs, and without it at least two, or nothing is shown."""
    rng = np.random.default_rng(0)
    image = rng.standard_normal((200, 300, 3)).astype(np.float32)
    flow = rng.uniform(-40, 40, (200, 300, 2)).astype(np.float32)
    w = None if reduce == "sum" else rng.uniform(0.5, 1, (200, 300)).astype(np.float32)

    def results(deterministic):
        def run(image, flow):
            warped = jaxwarp.backward_warp(image, flow, deterministic=deterministic)
            moved = jaxwarp.forward_warp(
                image, flow, reduce=reduce, importance=w, deterministic=deterministic
            )
            return warped, moved

        compiled = jax.jit(value_and_cotangents(run))
        runs = [compiled(image, flow) for _ in range(20)]
        return {b"".join(np.asarray(x).tobytes() for x in jax.tree.leaves(r)) for r in runs}, runs

    fixed, runs = results(True)
    assert len(fixed) == 1
    free, others = results(False)
    assert len(free) > 1
    cases.assert_close(runs[0], others[0], SINGLE)
