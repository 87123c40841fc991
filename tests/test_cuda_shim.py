"""The CUDA kernels, compiled for the host over tests/cuda_shim, against the CPU kernels.

Index arithmetic, vector paths and tails run as on a GPU; the order of threads does not.
"""

import importlib
import os
from functools import partial

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxwarp
from jaxwarp import _ffi

PREFIX = "cuda_host_"

try:
    _cuda_host = importlib.import_module("jaxwarp._cuda_host")
except ModuleNotFoundError:
    if os.environ.get("CI"):
        raise
    pytest.skip("built without -DJAXWARP_TESTS=ON", allow_module_level=True)

for _name, _handler in _cuda_host.registrations().items():
    jax.ffi.register_ffi_target(PREFIX + _name, _handler, platform="cpu")

# Sums are taken in the same order here as on the CPU; compilers contract products differently.
TOLERANCE = {"float64": 1e-13, "float32": 2e-6, "bfloat16": 2**-7, "float16": 2**-9}


def on_host(monkeypatch, function, *arrays, deterministic=False, backwards=False):
    """What `function` gives with the CUDA kernels on the host; `backwards`: blocks and warps."""
    called, call = [], _ffi.call

    def host_call(target, *args, **kwargs):
        called.append(target)
        return call(PREFIX + target, *args, **kwargs | {"deterministic": deterministic})

    with monkeypatch.context() as patch:
        patch.setattr(_ffi, "call", host_call)
        if backwards:
            patch.setenv("JAXWARP_CUDA_SHIM_BACKWARDS", "1")
        actual = jax.block_until_ready(jax.jit(lambda *a: function(*a))(*arrays))
    assert called
    return actual


def on_both(monkeypatch, function, *arrays, **kwargs):
    """The same, and what `function` gives with the CPU kernels."""
    expected = jax.jit(lambda *a: function(*a))(*arrays)
    return on_host(monkeypatch, function, *arrays, **kwargs), expected


def value_and_tangent(function):
    def compute(*arrays):
        tangents = (jnp.cos(jnp.arange(a.size)).reshape(a.shape).astype(a.dtype) for a in arrays)
        return jax.jvp(function, arrays, tuple(tangents))

    return compute


def with_channels(case, channels, **kwargs):
    arrays = list(case.inputs(**kwargs))
    arrays[0] = np.repeat(arrays[0], -(-channels // cases.CHANNELS), axis=-1)[..., :channels]
    return arrays


@pytest.mark.parametrize("case", cases.UNDIFFERENTIATED, ids=str)
def test_every_case(monkeypatch, case):
    for function in (
        cases.value_and_cotangents(case.function(jaxwarp)),
        value_and_tangent(case.function(jaxwarp, forward_mode=True)),
    ):
        actual, expected = on_both(monkeypatch, function, *case.inputs())
        cases.assert_close(actual, expected, TOLERANCE["float64"])


@pytest.mark.parametrize("channels", [1, 3, 6, 8, 36])
@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("case", cases.FEW, ids=str)
def test_packs_and_tails(monkeypatch, case, dtype, channels):
    point_dtype = "float64" if dtype == "float64" else "float32"
    arrays = with_channels(case, channels, dtype=dtype, point_dtype=point_dtype)
    for function in (
        cases.value_and_cotangents(case.function(jaxwarp)),
        value_and_tangent(case.function(jaxwarp, forward_mode=True)),
    ):
        actual, expected = on_both(monkeypatch, function, *arrays)
        cases.assert_close(actual, expected, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
@pytest.mark.parametrize("case", [c for c in cases.FEW if c.arguments[0] == "image"], ids=str)
def test_second_order(monkeypatch, case, dtype):
    point_dtype = "float64" if dtype == "float64" else "float32"
    arrays = with_channels(case, 8, dtype=dtype, point_dtype=point_dtype)
    function = value_and_tangent(cases.value_and_cotangents(case.function(jaxwarp)))
    actual, expected = on_both(monkeypatch, function, *arrays)
    cases.assert_close(actual, expected, TOLERANCE[dtype])


@pytest.mark.parametrize(
    ("dtype", "channels"),
    [*(("float32", c) for c in (1, 2, 3, 4, 7)), *((d, 3) for d in cases.DTYPES if d != "float32")],
)
@pytest.mark.parametrize("wild", [np.nan, np.inf, 3e7, 1e-30])
@pytest.mark.parametrize("shape", [(24, 70), (5, 6, 23)], ids=["2d", "3d"])
def test_whole_displacements(monkeypatch, shape, wild, dtype, channels):
    """On the CPU, points on grid lines, as in a flow of zeros, are plain ones, unless a number that
    they meet is not finite or is large, or divides and is small: of it, a weight of zero must leave
    nothing. On a GPU each weight is tested."""
    shape = (2, *shape)
    rng = np.random.default_rng(0)
    wide = "float64" if dtype == "float64" else "float32"
    flow = rng.integers(-3, 4, (*shape, len(shape) - 1)).astype(wide)
    flow[:, :3] = 0
    flow[rng.random(shape) < 0.3, 0] += 0.5  # on lines in one direction only

    def spoilt(*sizes, dtype=dtype):
        array = rng.standard_normal(sizes)
        with np.errstate(over="ignore"):  # 3e7 in float16
            return np.where(rng.random(sizes) < 0.01, wild, array).astype(dtype)

    image, ct, d_image, d_ct = (spoilt(*shape, channels) for _ in range(4))
    importance = np.abs(spoilt(*shape, dtype=wide))

    def results(image, flow, importance, ct):
        found = []
        d_flow = jnp.full_like(flow, 0.5)

        def gradients(function, *arrays):
            return jax.vjp(partial(function, forward_mode=True), *arrays[:-1])[1](arrays[-1])

        for function in (jaxwarp.backward_warp, jaxwarp.forward_warp):
            out, vjp = jax.vjp(function, image, flow)
            moved = (image, flow, ct), (d_image, d_flow, d_ct)
            found += [out, vjp(ct), jax.jvp(partial(gradients, function), *moved)[1][1]]
            warp = partial(function, forward_mode=True)
            found += jax.jvp(warp, (image, flow), (d_image, d_flow))
        weighted = partial(jaxwarp.forward_warp, return_coverage=True)
        out, vjp = jax.vjp(lambda *a: weighted(*a[:2], importance=a[2]), image, flow, importance)
        return [*found, out, vjp((ct, ct[..., 0].astype(wide)))]

    actual, expected = on_both(monkeypatch, results, image, flow, importance, ct)
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        a, e = np.float64(a), np.float64(e)
        size = np.abs(e[np.isfinite(e)]).max() + 1
        tolerance = 2 * TOLERANCE[dtype]
        np.testing.assert_allclose(a, e, rtol=tolerance, atol=tolerance * size)


@pytest.mark.parametrize("in_axes", [(None, 0), (0, None), (0, 0)], ids=str)
@pytest.mark.parametrize("case", [c for c in cases.FEW if not c.weighted], ids=str)
def test_shared_operands(monkeypatch, case, in_axes):
    """Batches of one and of two axes; the cotangent of a shared operand is a sum in the kernel."""
    arrays = case.inputs()
    arrays = [
        a if axis is None else np.stack([a, np.flip(a, 0), 0.5 * a])
        for a, axis in zip(arrays, in_axes, strict=True)
    ]
    function = cases.value_and_cotangents(jax.vmap(case.function(jaxwarp), in_axes))
    actual, expected = on_both(monkeypatch, function, *arrays)
    cases.assert_close(actual, expected, TOLERANCE["float64"])

    image, points = case.inputs()
    image, points = np.stack([image, 2 * image]), np.stack([points, np.flip(points, 0), points])
    crossed = jax.vmap(jax.vmap(case.function(jaxwarp), (None, 0)), (0, None))
    actual, expected = on_both(monkeypatch, cases.value_and_cotangents(crossed), image, points)
    cases.assert_close(actual, expected, TOLERANCE["float64"])


def bits(tree):
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(tree)]


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("case", cases.FEW, ids=str)
def test_deterministic(monkeypatch, case, dtype):
    """Close to what the CPU gives, and the same bits in another order; also of a shared image."""
    point_dtype = "float64" if dtype == "float64" else "float32"
    image, points, *rest = with_channels(case, 3, dtype=dtype, point_dtype=point_dtype)
    function = case.function(jaxwarp)
    batched = jax.vmap(lambda image, points: function(image, points, *rest), (None, 0))
    for run, arrays in (
        (cases.value_and_cotangents(function), (image, points, *rest)),
        (
            value_and_tangent(case.function(jaxwarp, forward_mode=True)),
            (image, points, *rest),
        ),
        (cases.value_and_cotangents(batched), (image, np.stack([points, np.flip(points, 0)]))),
    ):
        actual, expected = on_both(monkeypatch, run, *arrays, deterministic=True)
        cases.assert_close(actual, expected, TOLERANCE[dtype])
        again = on_host(monkeypatch, run, *arrays, deterministic=True, backwards=True)
        assert bits(again) == bits(actual)


def crowd(dtype, scale):
    """Many sources of very different sizes that meet in few targets, and what each sum is."""
    rng = np.random.default_rng(0)
    values = (rng.standard_normal((5000, 2)) * 10.0 ** rng.uniform(-scale, 0, (5000, 2))).astype(
        dtype
    )
    points = np.round(rng.uniform(-0.5, 2.5, (5000, 2)) * 16).astype(dtype) / 16  # exact weights
    exact = values.astype(np.longdouble)
    sums = np.zeros((3, 3, 2), np.longdouble)
    for y, x in np.ndindex(3, 3):
        weight = np.prod(np.maximum(1 - np.abs(points - [x, y]), 0), axis=-1)
        sums[y, x] = (weight[:, None] * exact).sum(0)
    return values, points, sums


@pytest.mark.parametrize(("dtype", "scale"), [("float32", 6), ("float64", 20)])
def test_deterministic_sums_are_exact(monkeypatch, dtype, scale):
    """Better than sums in the dtype itself, whose bits change with the order."""
    values, points, sums = crowd(dtype, scale)

    def splat(values, points):
        return jaxwarp.splat(values, points, (3, 3))

    forth = on_host(monkeypatch, splat, values, points)
    back = on_host(monkeypatch, splat, values, points, backwards=True)
    assert bits(forth) != bits(back)  # else nothing is shown below
    forth = on_host(monkeypatch, splat, values, points, deterministic=True)
    back = on_host(monkeypatch, splat, values, points, deterministic=True, backwards=True)
    assert bits(forth) == bits(back)
    # Each product w f is rounded once before it is added; 2500 of them reach a target.
    parts = splat(np.abs(values), points)
    error = np.abs(np.asarray(forth) - sums)
    np.testing.assert_array_less(error, np.finfo(dtype).eps * np.asarray(parts))


def test_deterministic_sums_of_many_parts(monkeypatch):
    """Two million parts of a float32 sum, rounded to 2^-38 of the largest, all the same way."""
    count = 2**21
    values = np.full((count, 1), 2**-38.5, np.float32)
    values[-1] = 1

    def splat(values, points):
        return jaxwarp.splat(values, points, (1, 1))[0, 0, 0]

    total = on_host(
        monkeypatch, splat, values, np.zeros((count, 2), np.float32), deterministic=True
    )
    digits = 62 - (4 * count).bit_length()  # four corners
    exact = values.astype(np.float64).sum()
    assert abs(float(total) - exact) <= count * 2.0**-digits + 2.0**-24


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_deterministic_sums_of_any_size(monkeypatch, dtype):
    info = np.finfo(dtype)
    inf, nan, big, small = np.inf, np.nan, info.max, float(info.smallest_normal)
    parts, expected = zip(
        ((1, 2, 3), 6),
        ((0, -0.0, 0), 0),
        ((inf, 1, 2), inf),
        ((-inf, big, 2), -inf),
        ((inf, -inf, 2), nan),
        ((nan, 1, inf), nan),
        ((nan, 1, 1), nan),
        ((big, big, 1), inf),
        ((big, -big, 1), 0),
        ((small, small, -small), small),
        ((small, 1, -1), 0),
        ((1, info.eps / 8, -1), info.eps / 8),
        strict=True,
    )
    values = np.array(parts, dtype).T[..., None]  # (3, N, 1): three sources on each of N pixels
    points = np.broadcast_to(
        np.stack([np.arange(len(parts)), np.zeros(len(parts))], -1), (3, len(parts), 2)
    ).astype(dtype)

    def splat(values, points):
        return jaxwarp.splat(values, points, (1, len(parts)), method="nearest")[0, :, 0]

    actual = on_host(monkeypatch, splat, values, points, deterministic=True)
    np.testing.assert_array_equal(actual, np.array(expected, dtype))


@pytest.mark.parametrize("flow_dtype", ["float16", "bfloat16"])
def test_half_flow(monkeypatch, flow_dtype):
    case = next(c for c in cases.FEW if c.op == "backward_warp")
    arrays = case.inputs(kind="random", dtype="float32", point_dtype=flow_dtype)
    function = cases.value_and_cotangents(case.function(jaxwarp))
    actual, expected = on_both(monkeypatch, function, *arrays)
    cases.assert_close(actual, expected, TOLERANCE["float16"])


def test_more_than_one_block(monkeypatch):
    rng = np.random.default_rng(0)
    values = rng.standard_normal((70, 90, 4)).astype(np.float32)
    flow = rng.uniform(-9, 9, (70, 90, 2)).astype(np.float32)
    importance = rng.uniform(0.1, 1, (70, 90)).astype(np.float32)

    def warp(values, flow, importance):
        return jaxwarp.forward_warp(values, flow, importance=importance, return_coverage=True)

    actual, expected = on_both(
        monkeypatch, cases.value_and_cotangents(warp), values, flow, importance
    )
    cases.assert_close(actual, expected, TOLERANCE["float32"])


def test_more_batches_than_blocks(monkeypatch):
    """Of 65535 blocks along y, the first take the last batch elements as well."""
    rng, shape = np.random.default_rng(0), (65_540, 1, 2)
    image = rng.standard_normal((*shape, 1))
    flow = rng.integers(-64, 64, (*shape, 2)) / 64
    function = cases.value_and_cotangents(jaxwarp.backward_warp)
    actual, expected = on_both(monkeypatch, function, image, flow)
    cases.assert_close(actual, expected, TOLERANCE["float64"])


@pytest.mark.parametrize("dims", [2, 3])
def test_images_past_31_bits(monkeypatch, dims):
    """Indices of 64 bits, in the gather and in the gradient in the positions."""
    shape = cases.LARGE_SHAPES[dims]
    image, host = cases.sparse_image((*shape, 1))
    block = np.random.default_rng(0).standard_normal((*(5,) * dims, 1))
    host[tuple(slice(-5, None) for _ in shape)] = block
    points = np.array(shape[::-1]) - np.array([[1.5] * dims, [2.25] * dims, [0.5] * dims])
    points = points.astype(np.float32)

    def value_and_gradient(image, points):
        out, pull = jax.vjp(lambda p: jaxwarp.gather(image, p), points)
        return out, pull(jnp.ones_like(out))

    actual, expected = on_both(monkeypatch, value_and_gradient, image, points)
    assert np.all(expected[0] != 0)
    cases.assert_close(actual, expected, TOLERANCE["float16"])
