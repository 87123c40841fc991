"""What the operations return, against the reference: every option, dtype, size and edge."""

import itertools
import math
import os
import subprocess
import sys

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from remembered import remembered

import jaxwarp
from jaxwarp import reference

# float64: sums of a few products of numbers near 1, in another order of operations.
EXACT = 1e-12
# float32: some ten times the rounding of such sums.
SINGLE = 1e-5

ONE_OF_EACH_OP = [
    cases.Case("gather"),
    cases.Case("splat"),
    cases.Case("backward_warp"),
    cases.Case("forward_warp", options={"return_coverage": True}, weighted=True),
]


def both(case, *arrays, **more):
    """(result of the operation, result of the reference).

    The reference runs op by op here: over many cases that is faster than compiling each.
    """
    actual = jax.jit(case.function(jaxwarp, **more))(*arrays)
    return actual, remembered(case.function(reference, **more), *arrays)


def upcast(arrays, dtype):
    """The arrays in a wider dtype, but for the points: a position is formed in their own dtype."""
    keep = 1 if np.dtype(arrays[1].dtype).itemsize >= 4 else None
    return tuple(a if i == keep else np.asarray(a, dtype) for i, a in enumerate(arrays))


def assert_stored(actual, exact, dtype):
    """`actual` is the float32 result `exact`, rounded once to the storage `dtype`."""
    info = jnp.finfo(dtype)
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(exact), strict=True):
        expected, half_ulp = np.asarray(e, np.float64), float(info.eps) / 2
        # Besides that rounding: the one of the float32 sums, and subnormal numbers of float16.
        atol = 1e-6 * np.max(np.abs(expected), where=np.isfinite(expected), initial=1.0)
        np.testing.assert_allclose(np.asarray(a, np.float64), expected, rtol=half_ulp, atol=atol)


# ------------------------------------------------------------------------------ options and dtypes


@pytest.mark.parametrize("case", cases.ALL, ids=str)
def test_float64(case):
    actual, expected = both(case, *case.inputs())
    cases.assert_close(actual, expected, EXACT)


@pytest.mark.parametrize("case", cases.FEW, ids=str)
def test_without_jit(case):
    arrays = case.inputs(seed=1)
    expected = remembered(case.function(reference), *arrays)
    cases.assert_close(case.function(jaxwarp)(*arrays), expected, EXACT)


@pytest.mark.parametrize("case", cases.UNDIFFERENTIATED, ids=str)
def test_float32(case):
    arrays = case.inputs(dtype="float32", point_dtype="float32")
    actual = jax.jit(case.function(jaxwarp))(*arrays)
    assert all(out.dtype == np.float32 for out in jax.tree.leaves(actual))
    expected = remembered(case.function(reference), *upcast(arrays, np.float64))
    cases.assert_close(actual, expected, SINGLE)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("case", cases.FEW, ids=str)
def test_half_precision_is_rounded_once(case, dtype):
    arrays = case.inputs(dtype=dtype, point_dtype="float32")
    actual = jax.jit(case.function(jaxwarp))(*arrays)
    exact = remembered(case.function(reference), *upcast(arrays, np.float32))
    assert jax.tree.leaves(actual)[0].dtype == dtype
    if "return_coverage" in case.options:
        assert actual[1].dtype == np.float32
        cases.assert_close(actual[1], exact[1], SINGLE)
        actual, exact = actual[0], exact[0]
    assert_stored(actual, exact, dtype)


@pytest.mark.parametrize("point_dtype", cases.DTYPES)
@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("case", ONE_OF_EACH_OP, ids=str)
def test_dtypes_mix(case, dtype, point_dtype):
    if "points" in case.arguments and point_dtype in ("float16", "bfloat16"):
        pytest.skip("half-precision points are refused: test_errors.py")
    arrays = case.inputs("random", dtype, point_dtype)
    if case.weighted:
        # Its own dtype, which need not be that of the values.
        arrays = (*arrays[:2], arrays[2].astype(np.float32))
    actual, expected = both(case, *arrays)
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.dtype == e.dtype
    exact = remembered(case.function(reference), *upcast(arrays, np.float64))
    if case.op == "forward_warp":
        cases.assert_close(actual[1], exact[1], SINGLE)
        actual, exact = actual[0], exact[0]
    if dtype == "float64" and point_dtype == "float64" and not case.weighted:
        cases.assert_close(actual, exact, EXACT)
    else:
        assert_stored(actual, exact, "float32" if dtype == "float64" else dtype)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_weights_are_computed_in_the_dtype_of_the_points(dtype):
    # float32 cannot hold this position; a float64 one must not be narrowed to the image's dtype.
    image = np.random.default_rng(0).standard_normal((4, 8, 2)).astype(dtype)
    points = np.array([[8e9 + 1.375, 4e9 + 2.625]])
    out = jaxwarp.gather(image, points, boundary="wrap")
    cases.assert_close(out, reference.gather(image, [[1.375, 2.625]], boundary="wrap"), SINGLE)


@pytest.mark.parametrize("flow_dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("op", ["backward_warp", "forward_warp"])
def test_wide_images_in_half_precision(op, dtype, flow_dtype):
    # 4095.5 is no number of either half type: pixel + flow is to be formed in float32.
    rng = np.random.default_rng(0)
    image = rng.standard_normal((2, 4096, 3)).astype(jnp.dtype(dtype))
    flow = (rng.integers(-32, 33, (2, 4096, 2)) / 16).astype(jnp.dtype(flow_dtype))
    actual = getattr(jaxwarp, op)(image, flow)
    exact = jax.jit(getattr(reference, op))(*(np.asarray(a, np.float32) for a in (image, flow)))
    assert actual.dtype == dtype
    assert_stored(actual, exact, dtype)


@pytest.mark.parametrize("case", ONE_OF_EACH_OP, ids=str)
def test_without_x64(case):
    arrays = case.inputs()
    expected = remembered(case.function(reference), *arrays)
    with jax.enable_x64(False):
        actual = jax.jit(case.function(jaxwarp))(*arrays)  # NumPy's float64 becomes float32
        assert all(out.dtype == np.float32 for out in jax.tree.leaves(actual))
        cases.assert_close(actual, expected, SINGLE)
        assert jaxwarp.pixel_grid((2, 3)).dtype == np.float32


# ------------------------------------------------------------------------------ inputs of all kinds


@pytest.mark.parametrize("case", ONE_OF_EACH_OP, ids=str)
def test_any_array_like(case):
    arrays = case.inputs("random")
    expected = remembered(case.function(reference), *arrays)

    def strided(a):
        wide = np.zeros([2 * n for n in a.shape])
        wide[(slice(None, None, -2),) * a.ndim] = a
        return wide[(slice(None, None, -2),) * a.ndim]

    for convert in (np.asfortranarray, strided, np.ndarray.tolist, jnp.asarray):
        given = [convert(a) for a in arrays]
        cases.assert_close(case.function(jaxwarp)(*given), expected, EXACT)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("channels", [0, 1, 2, 3, 4, 5, 8, 17, 64, 1000])
def test_any_number_of_channels(channels, dtype):
    rng = np.random.default_rng(channels)
    image = rng.standard_normal((5, 6, channels)).astype(jnp.dtype(dtype))
    flow = (rng.integers(-192, 192, (5, 6, 2)) / 64).astype(np.float32)
    points = flow + cases.grid((5, 6)).astype(np.float32)

    def everything(module, image):
        return (
            module.gather(image, points, boundary="reflect"),
            module.gather(image, points, method="cubic"),
            module.splat(image, points, (4, 7)),
            module.splat(image, points, (4, 7), method="cubic", boundary="wrap"),
            module.forward_warp(image, flow),
        )

    exact = remembered(
        jax.jit(lambda image: everything(reference, image)), np.asarray(image, np.float32)
    )
    assert_stored(everything(jaxwarp, image), exact, dtype)


SIZES = [(1, 1), (1, 7), (7, 1), (2, 2), (1, 1, 1), (1, 1, 5), (4, 1, 1), (1, 3, 1)]


@pytest.mark.parametrize("boundary", cases.BOUNDARIES)
@pytest.mark.parametrize("method", cases.METHODS)
@pytest.mark.parametrize("shape", SIZES, ids=str)
def test_small_images(shape, method, boundary):
    rng = np.random.default_rng(0)
    image = rng.standard_normal((*shape, 2))
    points = cases.positions(rng, "mixed", (40,), shape)
    flow = cases.positions(rng, "mixed", shape, shape) - cases.grid(shape)
    values = rng.standard_normal((40, 2))
    options = {"method": method, "boundary": boundary}

    def everything(module):
        @jax.jit
        def compute(image, points, values, flow):
            return (
                module.gather(image, points, **options),
                module.splat(values, points, shape, **options),
                module.backward_warp(image, flow, **options),
                module.forward_warp(image, flow, reduce="sum", return_coverage=True, **options),
            )

        return compute

    expected = remembered(everything(reference), image, points, values, flow)
    cases.assert_close(everything(jaxwarp)(image, points, values, flow), expected, EXACT)


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("method", cases.METHODS)
def test_empty_arrays(method, dims):
    shape = cases.SHAPES[dims]
    image, none = np.ones((*shape, 3)), np.ones((0, dims))
    points = np.zeros((4, 5, dims))
    for boundary in cases.BOUNDARIES:
        options = {"method": method, "boundary": boundary}
        assert jaxwarp.gather(image, none, **options).shape == (0, 3)
        assert jaxwarp.gather(image, points[:0], **options).shape == (0, 5, 3)
        assert jaxwarp.gather(image[..., :0], points, **options).shape == (4, 5, 0)
        assert not jaxwarp.splat(np.ones((0, 3)), none, shape, **options).any()
        assert jaxwarp.splat(points[..., :0], points, shape, **options).shape == (*shape, 0)
    for axis in range(dims):
        empty = np.delete(image, slice(None), axis)
        no_flow = np.ones((*empty.shape[:-1], dims))
        filled = jaxwarp.gather(empty, points, method=method, fill_value=2.5)
        np.testing.assert_array_equal(filled, np.full((4, 5, 3), 2.5))
        filled = jaxwarp.backward_warp(
            empty, np.ones((*shape, dims)), method=method, fill_value=2.5
        )
        np.testing.assert_array_equal(filled, np.full((*shape, 3), 2.5))
        out = jaxwarp.splat(np.ones((4, 5, 3)), points, empty.shape[:-1], method=method)
        assert out.shape == empty.shape
        out, coverage = jaxwarp.forward_warp(
            empty, no_flow, reduce="sum", method=method, return_coverage=True
        )
        assert out.shape == empty.shape
        assert coverage.shape == empty.shape[:-1]


def test_points_have_any_shape():
    rng = np.random.default_rng(0)
    image, points = rng.standard_normal((5, 6, 3)), rng.uniform(-1, 6, (2, 3, 1, 4, 2))
    out = jaxwarp.gather(image, points)
    cases.assert_close(out, reference.gather(image, points), EXACT)
    cases.assert_close(jaxwarp.gather(image, points[0, 1, 0, 2]), out[0, 1, 0, 2], 0)
    cases.assert_close(
        jaxwarp.splat(out, points, (5, 6)), reference.splat(out, points, (5, 6)), EXACT
    )
    one = jaxwarp.splat(out[0, 1, 0, 2], points[0, 1, 0, 2], (5, 6))
    cases.assert_close(one, reference.splat(out[0, 1, 0, 2], points[0, 1, 0, 2], (5, 6)), EXACT)


BATCHES = [
    ((2,), (2,), (2,)),
    ((), (3,), ()),
    ((3,), (), ()),
    ((), (), (3,)),
    ((2, 1), (3,), (1, 3)),
    ((1,), (4,), (1, 1)),
    ((2, 3), (1, 3), ()),
    ((0,), (1,), ()),
    ((1, 2, 1), (2, 1, 3), (1,)),
]


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("batches", BATCHES, ids=str)
def test_leading_axes_broadcast(batches, dims):
    rng, shape = np.random.default_rng(0), cases.SHAPES[dims]
    a, b, c = batches
    image = rng.standard_normal((*a, *shape, 2))
    flow = rng.integers(-192, 192, (*b, *shape, dims)) / 64
    w = rng.uniform(0.5, 1, (*c, *shape))
    batch = np.broadcast_shapes(a, b, c)

    def one_by_one(f, *arrays):
        results = [f(*(x[i] for x in arrays)) for i in np.ndindex(batch)]
        return jax.tree.map(lambda *r: jnp.stack(r).reshape(*batch, *r[0].shape), *results)

    out = jaxwarp.backward_warp(image, flow)
    assert out.shape == (*np.broadcast_shapes(a, b), *shape, 2)
    pair = jaxwarp.forward_warp(image, flow, importance=w, return_coverage=True)
    assert pair[0].shape == (*batch, *shape, 2)
    assert pair[1].shape == (*batch, *shape)
    if 0 not in batch:
        full = [
            np.broadcast_to(x, batch + x.shape[-n:])
            for x, n in zip((image, flow, w), (dims + 1, dims + 1, dims), strict=True)
        ]
        warped = one_by_one(jax.jit(reference.backward_warp), *full[:2])
        cases.assert_close(jnp.broadcast_to(out, warped.shape), warped, EXACT)

        def average(values, flow, w):
            return reference.forward_warp(values, flow, importance=w, return_coverage=True)

        cases.assert_close(pair, one_by_one(jax.jit(average), *full), EXACT)


def test_flow_has_a_spatial_shape_of_its_own():
    rng = np.random.default_rng(0)
    image, flow = rng.standard_normal((3, 5, 6, 2)), rng.uniform(-4, 4, (7, 3, 2))
    out = jaxwarp.backward_warp(image, flow)
    assert out.shape == (3, 7, 3, 2)
    cases.assert_close(out, reference.backward_warp(image, flow), EXACT)


# -------------------------------------------------------------------------------------- edges


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize(
    ("method", "fill_value"),
    [
        *itertools.product(cases.METHODS, [np.nan, 1e30, -3]),
        # Not "cubic": its weights of both signs would make inf - inf of it.
        *itertools.product(cases.AVERAGING, [np.inf, -np.inf]),
    ],
)
def test_fill_value_reaches_only_what_weighs_it(method, dims, fill_value):
    case = cases.Case("gather", dims, {"method": method, "fill_value": fill_value})
    image, points = case.inputs()
    for derivative in cases.DERIVATIVES[dims][:2]:
        actual, expected = both(case, image, points, derivative=derivative)
        cases.assert_close(actual, expected, EXACT)
    on_pixels = np.floor(case.inputs("inside")[1])
    assert np.isfinite(jaxwarp.gather(image, on_pixels, **case.options)).all()


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("boundary", cases.BOUNDARIES)
@pytest.mark.parametrize("method", cases.METHODS)
def test_nonfinite_values_reach_only_what_weighs_them(method, boundary, dims):
    found = []
    for op in ("gather", "splat", "forward_warp"):
        options = {"method": method, "boundary": boundary}
        options |= {"reduce": "sum"} if op == "forward_warp" else {}
        case = cases.Case(op, dims, options, weighted=op == "forward_warp")
        first, *rest = case.inputs()
        rng = np.random.default_rng(1)
        for bad, channel in itertools.product((np.nan, np.inf, -np.inf), (0, 1)):
            first[(*rng.integers(first.shape[:-1]), channel)] = bad
        actual, expected = both(case, first, *rest)
        cases.assert_close(actual, expected, EXACT)
        found.append(expected.ravel())
    found = np.concatenate(found)
    assert np.isfinite(found).any()
    assert np.isnan(found).any()


def test_source_of_no_importance_is_not_read():
    values = np.array([[np.nan, 1, 2, np.inf]])[..., None]
    flow = np.zeros((1, 4, 2))
    flow[0, 3, 0] = -1.5  # onto the sources 1 and 2
    w = np.array([[0.0, 1, 1, 0]])
    out, coverage = jaxwarp.forward_warp(
        values, flow, importance=w, fill_value=-1.0, return_coverage=True
    )
    np.testing.assert_allclose(out[0, :, 0], [-1, 1, 2, -1], rtol=EXACT)
    np.testing.assert_allclose(coverage[0], [1, 1.5, 1.5, 0], rtol=EXACT)


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("boundary", cases.BOUNDARIES)
@pytest.mark.parametrize("method", cases.METHODS)
def test_nonfinite_positions(method, boundary, dims):
    image = np.ones((*cases.SHAPES[dims], 1))
    options = {"method": method, "boundary": boundary}
    axes = np.eye(dims, dtype=bool)
    infinite = np.concatenate([np.where(axes, np.inf, 1.0), np.where(axes, -np.inf, 1.0)])
    nan = np.concatenate([np.where(axes, np.nan, 1.0), np.where(axes, np.nan, np.inf)])
    outside = 0.5 if boundary == "constant" else np.nan
    fill = {"fill_value": 0.5}
    first = tuple(int(a == 0) for a in range(dims))
    assert np.isnan(jaxwarp.gather(image, nan, **options, **fill)).all()
    assert np.isnan(jaxwarp.gather(image, nan, derivative=first, **options, **fill)).all()
    out = jaxwarp.gather(image, infinite, **options, **fill)
    np.testing.assert_array_equal(out, np.full_like(out, outside))
    out = jaxwarp.gather(image, infinite, derivative=first, **options, **fill)
    np.testing.assert_array_equal(out, np.full_like(out, 0 * outside))
    for bad in (nan, infinite):
        values = np.full((len(bad), 1), np.nan)
        assert not jaxwarp.splat(values, bad, image.shape[:-1], **options).any()


@pytest.mark.parametrize("boundary", cases.BOUNDARIES)
@pytest.mark.parametrize("method", cases.METHODS)
def test_huge_positions_are_ordinary(method, boundary):
    # Of these all but the last two are even integers in both dtypes, so that numpy can say where
    # they fall. (2^24 is the last integer before float32 has gaps.)
    big = np.array(
        [2.0**24, 2.0**31, -(2.0**31), 2.0**32, 2.0**53, -(2.0**63), 2.0**70, 1e30, -1e30]
    )
    big[-2:] = big[-2:].astype(np.float32)
    image = np.random.default_rng(0).standard_normal((1, 5, 1))
    period = {"wrap": 5, "reflect": 10, "mirror": 8}.get(boundary)
    if period:
        i = np.array([int(x) % period for x in big])
        i = np.where(i < 5, i, (10 if boundary == "reflect" else 8) - (boundary == "reflect") - i)
        expected = image[0, i, 0]
    elif boundary == "nearest":
        expected = np.where(big > 0, image[0, -1, 0], image[0, 0, 0])
    else:
        expected = np.full(len(big), 0.25)
    for dtype in (np.float32, np.float64):
        points = np.stack([big, 0 * big], axis=-1).astype(dtype)
        out = jaxwarp.gather(image, points, method=method, boundary=boundary, fill_value=0.25)
        np.testing.assert_allclose(out[:, 0], expected, rtol=EXACT)
        pile = jaxwarp.splat(
            np.ones((len(big), 1)), points, (1, 5), method=method, boundary=boundary
        )
        assert np.isclose(pile.sum(), 0 if boundary == "constant" else len(big))


# ---------------------------------------------------------------------------- coverage and holes


def test_coverage_of_the_identity_is_one_everywhere():
    values = np.random.default_rng(0).standard_normal((4, 5, 2))
    out, coverage = jaxwarp.forward_warp(values, np.zeros((4, 5, 2)), return_coverage=True)
    np.testing.assert_array_equal(out, values)
    np.testing.assert_array_equal(coverage, np.ones((4, 5)))


@pytest.mark.parametrize("scale", [0.5, 2.0])
def test_coverage_is_the_inverse_of_the_determinant(scale):
    flow = (scale - 1) * cases.grid((64, 64))
    _, coverage = jaxwarp.forward_warp(np.ones((64, 64, 1)), flow, return_coverage=True)
    mean = np.asarray(coverage)[8:24, 8:24].mean()
    assert np.isclose(mean, 1 / scale**2, rtol=1e-12)


@pytest.mark.parametrize("importance", [None, 0.5])
def test_holes(importance):
    # All sources go to the right: x = 0 is a hole, x = 1 half of one.
    values, flow = np.arange(1.0, 5).reshape(1, 4, 1), np.zeros((1, 4, 2))
    flow[..., 0] = 1.5
    w = None if importance is None else np.full((1, 4), importance)

    def warp(**options):
        out, coverage = jaxwarp.forward_warp(
            values, flow, importance=w, fill_value=-9.0, return_coverage=True, **options
        )
        # The coverage knows nothing of the importance.
        np.testing.assert_array_equal(coverage, [[0, 0.5, 1, 1]])
        return out[0, :, 0]

    np.testing.assert_allclose(warp(), [-9, 1, 1.5, 2.5], rtol=EXACT)
    np.testing.assert_allclose(warp(min_coverage=0.49), [-9, 1, 1.5, 2.5], rtol=EXACT)
    np.testing.assert_allclose(warp(min_coverage=0.5), [-9, -9, 1.5, 2.5], rtol=EXACT)
    np.testing.assert_allclose(warp(min_coverage=1.0), [-9, -9, -9, -9], rtol=EXACT)


def test_no_epsilon_in_the_denominator():
    # The value of an isolated source arrives unchanged, however small its weight there.
    values, flow = np.full((1, 3, 1), 7.0), np.full((1, 3, 2), 50.0)
    flow[0, 0] = (1 - 2.0**-40, 0)
    out, coverage = jaxwarp.forward_warp(
        values, flow, importance=np.full((1, 3), 1e-12), return_coverage=True
    )
    np.testing.assert_allclose(coverage[0], [2.0**-40, 1 - 2.0**-40, 0], rtol=EXACT)
    np.testing.assert_allclose(out[0, :, 0], [7, 7, 0], rtol=EXACT)


# --------------------------------------------------------------------------- large arrays, threads


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("reach", [0.5, 64], ids=["smooth", "random"])
def test_large_arrays(reach, dtype):
    rng, shape = np.random.default_rng(0), (300, 400)
    image = rng.standard_normal((*shape, 3)).astype(jnp.dtype(dtype))
    flow = np.round(rng.uniform(-reach, reach, (2, *shape, 2)) * 64).astype(np.float32) / 64
    w = rng.uniform(0.5, 1, shape).astype(np.float32)

    def everything(module, image):
        return (
            module.backward_warp(image, flow),  # one image, several flows
            module.backward_warp(image, flow[0], method="cubic", boundary="mirror"),
            module.forward_warp(image, flow, importance=w),
            module.splat(image, cases.grid(shape).astype(np.float32) + flow[1], (200, 100)),
        )

    exact = remembered(
        jax.jit(lambda image: everything(reference, image)), np.asarray(image, np.float32)
    )
    assert_stored(everything(jaxwarp, image), exact, dtype)


PROGRAM = """
import hashlib, sys
sys.path.insert(0, sys.argv[1])
import cases, jax, jaxwarp, numpy as np

rng, shape = np.random.default_rng(0), (300, 401)
image = rng.standard_normal((*shape, 3)).astype(np.float32)
flow = rng.uniform(-40, 40, (2, *shape, 2)).astype(np.float32)
w = rng.uniform(0, 1, shape).astype(np.float32)
volume = rng.standard_normal((20, 50, 60, 5)).astype(np.float32)
volume_flow = rng.uniform(-9, 9, (20, 50, 60, 3)).astype(np.float32)

def gradients(f):
    def both(*arrays):
        out, vjp = jax.vjp(f, *arrays)
        return out, vjp(out)
    return jax.jit(both)

programs = {
    "backward_warp": (gradients(jaxwarp.backward_warp), (image, flow)),
    "average": (gradients(lambda v, f, w: jaxwarp.forward_warp(v, f, importance=w)),
                (image, flow, w)),
    "sum": (gradients(lambda v, f: jaxwarp.forward_warp(v, f, reduce="sum")), (image, flow[0])),
    "half": (gradients(jaxwarp.forward_warp), (image.astype(jax.numpy.bfloat16), flow)),
    "cubic": (gradients(lambda v, f: jaxwarp.backward_warp(v, f, method="cubic", boundary="wrap")),
              (volume, volume_flow)),
}
for name, (program, arrays) in programs.items():
    for _ in range(3):
        results = jax.tree.leaves(program(*arrays))
        print(name, *(hashlib.sha256(np.asarray(r).tobytes()).hexdigest()[:16] for r in results))
"""


@pytest.mark.parametrize("boundary", ["constant", "nearest", "wrap"])
@pytest.mark.parametrize("dims", [2, 3])
def test_images_past_31_bits(dims, boundary):
    """The last pixels of a huge image are those of a small one."""
    shape, small = cases.LARGE_SHAPES[dims], (5,) * dims
    assert math.prod(shape) > 2**31
    image, host = cases.sparse_image((*shape, 1))
    corner = np.random.default_rng(0).standard_normal((*small, 1)).astype(np.float16)
    if boundary == "wrap":  # beyond the end follow the first pixels, which are 0
        for axis in range(dims):
            np.moveaxis(corner, axis, 0)[0] = 0
    host[tuple(slice(-n, None) for n in small)] = corner
    offset = np.array(shape[::-1], np.float32) - np.array(small[::-1], np.float32)
    points = [[2.25] * dims, [3.5] * dims, [4.0] * dims, [*[4.0] * (dims - 1), 2.5]]
    points = np.array(points, np.float32)  # multiples of 1/4: exact also beside the offset
    if boundary != "wrap":
        points = np.concatenate([points, points + np.float32(1.75)])

    def value_and_gradient(image, points):
        def total(points):
            return jaxwarp.gather(image, points, method="linear", boundary=boundary).sum()

        return jaxwarp.gather(image, points, boundary=boundary), jax.grad(total)(points)

    actual = jax.jit(value_and_gradient)(image, points + offset)
    expected = value_and_gradient(corner, points)
    cases.assert_close(actual, expected, 0)


def test_results_do_not_depend_on_threads_or_run():
    def run(threads):
        # NPROC is what XLA takes for the number of threads of its pool.
        environment = {**os.environ, "NPROC": str(threads), "JAX_PLATFORMS": "cpu"}
        command = [sys.executable, "-P", "-c", PROGRAM, os.path.dirname(__file__)]
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    first = run(1)
    assert len(first) == 15
    assert len(set(first)) == 5  # three runs of each program, all the same
    assert run(2) == first
    assert run(5) == first
