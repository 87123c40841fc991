"""The CPU takes plain points apart from all others, a tile at a time: the same numbers must come
from both, in every place of a tile, for every number of channels and every dtype."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from remembered import remembered

import jaxwarp

CHANNELS = (1, 2, 3, 4, 5, 7, 8, 11, 12, 17)
WIDTHS = (2, 3, 7, 8, 9, 16, 21, 63, 64, 65, 130)
# Of the largest result: sums of a few values of this size, and one rounding of results that are
# stored in half types, of the values and of the cotangents.
TOLERANCE = {"float64": 1e-13, "float32": 2e-5, "bfloat16": 2.0**-6, "float16": 2.0**-9}


def arrays(shape, channels, seed=0, reach=3.0):
    """Image, flow, cotangent. Displacements are multiples of 1/64, exact in float32, and some are
    whole, so that blocks hold both kinds."""
    rng = np.random.default_rng(seed)
    flow = rng.uniform(-reach, reach, (*shape, len(shape)))
    flow = (np.round(flow * 64) / 64).astype(np.float32)
    flow[rng.random(shape) < 0.2] = 1
    image, ct = rng.standard_normal((2, *shape, channels)).astype(np.float32)
    return image, flow, ct


def everything(module, image, flow, ct):
    """Values and gradients."""

    def softmax(image, flow):
        logits = 3 * image[..., 0].astype(flow.dtype)
        return module.forward_warp(image, flow, reduce="softmax", importance=logits)

    results = []
    for warp in (module.backward_warp, module.forward_warp, softmax):
        out, vjp = jax.vjp(warp, image, flow)
        results += [out, *vjp(ct.astype(out.dtype))]
    return results


REFERENCE = jax.jit(partial(everything, jaxwarp.reference))


def check(image, flow, ct, dtype="float32"):
    """The kernels against the reference in float64, from the same numbers."""
    real = np.float64 if dtype == "float64" else np.float32
    image, flow, ct = image.astype(dtype), flow.astype(real), ct.astype(dtype)
    actual = jax.jit(partial(everything, jaxwarp))(image, flow, ct)
    # Channels of zeros change nothing else: so the reference is compiled once for each shape.
    zeros = [(0, 0)] * (image.ndim - 1) + [(0, CHANNELS[-1] - image.shape[-1])]
    exact = remembered(
        REFERENCE, *(np.float64(x) for x in (np.pad(image, zeros), flow, np.pad(ct, zeros)))
    )
    for a, e in zip(actual, exact, strict=True):
        e = e[..., : a.shape[-1]]
        scale = np.abs(e).max() + 1
        np.testing.assert_allclose(
            np.float64(a), e, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] * scale
        )


@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("width", WIDTHS)
def test_every_width_and_channel_count(width, channels):
    check(*arrays((6, width), channels))


@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("dtype", ["float64", "bfloat16", "float16"])
def test_every_dtype(dtype, channels):
    check(*arrays((6, 70), channels), dtype)


@pytest.mark.parametrize("channels", CHANNELS)
def test_volumes(channels):
    check(*arrays((5, 6, 11), channels))


@pytest.mark.parametrize("channels", [1, 3, 4, 7])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_no_other_pixel_counts(channels, bad):
    """Everything but the corners of the points is infinite or NaN, in and behind the block."""
    shape = (8, 20)
    image, flow, _ = arrays(shape, channels, reach=0.9)
    flow[::2] = [0.25, -0.5]
    flow[:, ::3] = 0  # weight on one corner only
    seen = np.asarray(jax.grad(lambda i: jaxwarp.backward_warp(i, flow).sum())(image)) != 0
    spoilt = np.where(seen, image, np.float32(bad))
    exact = jaxwarp.backward_warp(image, flow)
    np.testing.assert_array_equal(jaxwarp.backward_warp(spoilt, flow), exact)
    # A source without weight at a target must not spoil it.
    sources = flow[..., 0] != 0
    values = np.where(sources[..., None], image, np.float32(bad))
    flow = np.where(sources[..., None], flow, np.float32(1e9))
    out = jaxwarp.forward_warp(values, flow)
    expected = jaxwarp.forward_warp(np.where(sources[..., None], image, 0), flow)
    np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize("channels", [1, 3, 4, 5])
def test_the_same_bits_by_another_route(channels):
    """Channels-first arrays take the general loop; values do not depend on the route."""
    shape = (40, 61)
    image, flow, _ = arrays(shape, channels)
    first = jax.vmap(lambda plane: jaxwarp.backward_warp(plane[..., None], flow)[..., 0], -1, -1)
    np.testing.assert_array_equal(jaxwarp.backward_warp(image, flow), first(image))
    same = jax.vmap(
        lambda plane: jaxwarp.forward_warp(plane[..., None], flow, reduce="sum")[..., 0], -1, -1
    )
    np.testing.assert_array_equal(jaxwarp.forward_warp(image, flow, reduce="sum"), same(image))


def test_coordinates_and_half_flows():
    """Points without a grid, and flows of bfloat16, are read in another way."""
    shape = (30, 37)
    image, flow, _ = arrays(shape, 3)
    points = np.asarray(jaxwarp.pixel_grid(shape, dtype=jnp.float32) + flow)
    np.testing.assert_array_equal(jaxwarp.gather(image, points), jaxwarp.backward_warp(image, flow))
    half = flow.astype(jnp.bfloat16)
    np.testing.assert_array_equal(
        jaxwarp.backward_warp(image, half), jaxwarp.backward_warp(image, half.astype(np.float32))
    )


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 8])
def test_subnormal_halves(channels):
    """Float16 is subnormal below 6.1e-5, and XLA's threads treat subnormal float32 numbers as 0."""
    tiny = np.array([6e-8, 1e-7, 3e-6, 3e-5, 6.1e-5, 7e-5, 1e-4, 1], np.float16)
    image = np.broadcast_to(tiny[:, None, None], (8, 20, channels))
    for flow in (np.zeros((8, 20, 2), np.float32), np.full((8, 20, 2), [0.25, 0], np.float32)):
        out, vjp = jax.vjp(lambda i, flow=flow: jaxwarp.backward_warp(i, flow), image)
        np.testing.assert_array_equal(out[:, :18], image[:, :18])
        np.testing.assert_array_equal(vjp(image)[0][:, 1:18], image[:, 1:18])
