"""An image whose rows lie on several devices: equal to the whole image on one device."""

import re
from functools import partial

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

import jaxwarp

DEVICES = 4
LIMIT = 3.0
SHAPES = {2: (32, 5), 3: (32, 3, 4)}


def sharded(limit=LIMIT, devices=DEVICES, **options):
    mesh = jax.make_mesh((devices,), ("rows",), (AxisType.Auto,), devices=jax.devices()[:devices])
    warp = partial(jaxwarp.halo.backward_warp, axis_name="rows", max_displacement=limit, **options)
    rows = PartitionSpec(None, "rows")
    return jax.jit(jax.shard_map(warp, mesh=mesh, in_specs=rows, out_specs=rows))


def inputs(dims, dtype=np.float64):
    rng = np.random.default_rng(0)
    image = rng.standard_normal((2, *SHAPES[dims], 3))
    flow = np.round(rng.uniform(-LIMIT, LIMIT, (2, *SHAPES[dims], dims)) * 8) / 8  # ties as well
    flow[0, 0, 0, ..., -1], flow[0, 1, 0, ..., -1] = LIMIT, -LIMIT
    return image.astype(dtype), flow.astype(dtype)


def with_cotangents(function):
    def compute(image, flow):
        out, pull = jax.vjp(function, image, flow)
        return out, pull(jnp.sin(3 * out))

    return compute


@pytest.mark.parametrize("boundary", [*cases.BOUNDARIES, "one for each axis"])
@pytest.mark.parametrize("method", cases.METHODS)
@pytest.mark.parametrize("dims", [2, 3])
def test_equals_one_device(dims, method, boundary):
    boundary = cases.PER_AXIS[dims] if boundary == "one for each axis" else boundary
    options = {"method": method, "boundary": boundary}
    options |= {"fill_value": 0.5} if "constant" in boundary else {}
    image, flow = inputs(dims)
    actual = with_cotangents(sharded(**options))(image, flow)
    expected = with_cotangents(partial(jaxwarp.backward_warp, **options))(image, flow)
    cases.assert_close(actual, expected, 1e-12)


def test_only_halos_are_moved():
    image, flow = inputs(2)
    program = jax.jit(with_cotangents(sharded())).lower(image, flow).compile().as_text()
    moves = re.findall(
        r"= (\S+) (collective-permute|all-[a-z]+|reduce-scatter)(?:-start)?\(", program
    )
    assert len(moves) == 4  # up and down, and back
    for shape, kind in moves:
        assert kind == "collective-permute" and "[2,5,5,3]" in shape  # 3 rows and 2 for the method


@pytest.mark.parametrize("wrong", [LIMIT + 0.25, -20.0, 1e30, np.inf, -np.inf, np.nan])
def test_beyond_the_halo_is_nan_and_never_another_pixel(wrong):
    image, flow = inputs(2)
    flow[1, 9, 2, 1] = wrong
    (out, (ct_image, ct_flow)) = with_cotangents(
        lambda i, f: jnp.where(jnp.isnan(w := sharded()(i, f)), 0, w)
    )(image, flow)
    assert np.isnan(sharded()(image, flow)[1, 9, 2]).all()
    flow[1, 9, 2] = 0

    def others(image, flow):
        return jaxwarp.backward_warp(image, flow).at[1, 9, 2].set(0)

    expected = with_cotangents(others)(image, flow)
    cases.assert_close((out, (ct_image, ct_flow)), expected, 1e-12)


@pytest.mark.parametrize("dtype", ["bool", "uint8", "int64", "complex128"])
def test_other_numbers_and_arrays_as_fill(dtype):
    image, flow = inputs(2)
    image = (2**10 * image).astype(dtype)
    flow[1, 9, 2, 1] = np.nan
    fill = np.array([0, 1, 1]).astype(dtype)
    for boundary in ("constant", ("wrap", "nearest")):
        options = {"method": "nearest", "boundary": boundary, "fill_value": fill}
        actual = sharded(**options)(image, flow)
        expected = jaxwarp.backward_warp(image, flow, **options)
        np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_dtypes(dtype):
    image, flow = inputs(2, dtype)
    actual = with_cotangents(sharded())(image, flow)
    expected = with_cotangents(jaxwarp.backward_warp)(image, flow)
    assert jax.tree.map(lambda x: x.dtype, actual) == jax.tree.map(lambda x: x.dtype, expected)
    # The cotangent of a row is rounded on each device that has it, before it is summed.
    cases.assert_close(actual, expected, 8 * float(jnp.finfo(dtype).eps))


def test_forward_mode():
    image, flow = inputs(2)
    tangents = np.cos(image), np.sin(flow)
    actual = jax.jvp(sharded(forward_mode=True), (image, flow), tangents)
    expected = jax.jvp(partial(jaxwarp.backward_warp, forward_mode=True), (image, flow), tangents)
    cases.assert_close(actual, expected, 1e-12)


@pytest.mark.parametrize("limit", [6.0, 5.5, 1e9, np.inf, np.nan, -1.0])
def test_wrong_limit(limit):
    image, flow = inputs(2)
    with pytest.raises(ValueError, match="max_displacement: expected a number from 0 to 5 for 8"):
        sharded(limit)(image, flow)
    sharded(5.0)(image, flow)


def test_wrong_rows():
    image, flow = inputs(2)
    with pytest.raises(ValueError, match="flow: expected the image's 8 rows"):
        sharded()(image, flow[:, :16])
