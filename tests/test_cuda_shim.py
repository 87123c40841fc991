"""The CUDA kernels, compiled for the host over tests/cuda_shim, against the CPU kernels.

Index arithmetic, vector paths and tails run as on a GPU; the order of threads does not.
"""

import importlib
import os

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


def on_both(monkeypatch, function, *arrays):
    """What `function` gives with the CPU kernels, and with the CUDA kernels on the host."""
    expected = jax.jit(lambda *a: function(*a))(*arrays)
    called, call = [], _ffi.call

    def host_call(target, *args, **kwargs):
        called.append(target)
        return call(PREFIX + target, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(_ffi, "call", host_call)
        actual = jax.jit(lambda *a: function(*a))(*arrays)
    assert called
    return actual, expected


def value_and_cotangents(function):
    def compute(*arrays):
        out, pull = jax.vjp(function, *arrays)
        ct = [
            jnp.cos(jnp.arange(o.size)).reshape(o.shape).astype(o.dtype)
            for o in jax.tree.leaves(out)
        ]
        return out, pull(jax.tree.unflatten(jax.tree.structure(out), ct))

    return compute


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
        value_and_cotangents(case.function(jaxwarp)),
        value_and_tangent(case.function(jaxwarp, forward_mode=True)),
    ):
        actual, expected = on_both(monkeypatch, function, *case.inputs())
        cases.assert_close(actual, expected, TOLERANCE["float64"])


@pytest.mark.parametrize("channels", [1, 3, 8, 36])
@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("case", cases.FEW, ids=str)
def test_packs_and_tails(monkeypatch, case, dtype, channels):
    point_dtype = "float64" if dtype == "float64" else "float32"
    arrays = with_channels(case, channels, dtype=dtype, point_dtype=point_dtype)
    for function in (
        value_and_cotangents(case.function(jaxwarp)),
        value_and_tangent(case.function(jaxwarp, forward_mode=True)),
    ):
        actual, expected = on_both(monkeypatch, function, *arrays)
        cases.assert_close(actual, expected, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
@pytest.mark.parametrize("case", [c for c in cases.FEW if c.arguments[0] == "image"], ids=str)
def test_second_order(monkeypatch, case, dtype):
    point_dtype = "float64" if dtype == "float64" else "float32"
    arrays = with_channels(case, 8, dtype=dtype, point_dtype=point_dtype)
    function = value_and_tangent(value_and_cotangents(case.function(jaxwarp)))
    actual, expected = on_both(monkeypatch, function, *arrays)
    cases.assert_close(actual, expected, TOLERANCE[dtype])


@pytest.mark.parametrize("in_axes", [(None, 0), (0, None), (0, 0)], ids=str)
@pytest.mark.parametrize("case", [c for c in cases.FEW if not c.weighted], ids=str)
def test_shared_operands(monkeypatch, case, in_axes):
    """Batches of one and of two axes; the cotangent of a shared operand is a sum in the kernel."""
    arrays = case.inputs()
    arrays = [
        a if axis is None else np.stack([a, np.flip(a, 0), 0.5 * a])
        for a, axis in zip(arrays, in_axes, strict=True)
    ]
    function = value_and_cotangents(jax.vmap(case.function(jaxwarp), in_axes))
    actual, expected = on_both(monkeypatch, function, *arrays)
    cases.assert_close(actual, expected, TOLERANCE["float64"])

    image, points = case.inputs()
    image, points = np.stack([image, 2 * image]), np.stack([points, np.flip(points, 0), points])
    crossed = jax.vmap(jax.vmap(case.function(jaxwarp), (None, 0)), (0, None))
    actual, expected = on_both(monkeypatch, value_and_cotangents(crossed), image, points)
    cases.assert_close(actual, expected, TOLERANCE["float64"])


@pytest.mark.parametrize("flow_dtype", ["float16", "bfloat16"])
def test_half_flow(monkeypatch, flow_dtype):
    case = next(c for c in cases.FEW if c.op == "backward_warp")
    arrays = case.inputs(kind="random", dtype="float32", point_dtype=flow_dtype)
    function = value_and_cotangents(case.function(jaxwarp))
    actual, expected = on_both(monkeypatch, function, *arrays)
    cases.assert_close(actual, expected, TOLERANCE["float16"])


def test_more_than_one_block(monkeypatch):
    rng = np.random.default_rng(0)
    values = rng.standard_normal((70, 90, 4)).astype(np.float32)
    flow = rng.uniform(-9, 9, (70, 90, 2)).astype(np.float32)
    importance = rng.uniform(0.1, 1, (70, 90)).astype(np.float32)

    def warp(values, flow, importance):
        return jaxwarp.forward_warp(values, flow, importance=importance, return_coverage=True)

    actual, expected = on_both(monkeypatch, value_and_cotangents(warp), values, flow, importance)
    cases.assert_close(actual, expected, TOLERANCE["float32"])


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
