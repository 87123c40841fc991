"""Images of complex numbers, of integers and of bools, and fills that are arrays."""

import re
from functools import partial

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jaxwarp
from jaxwarp import reference

EXACT = 1e-12  # float64: sums of a few products of numbers near 1, in another order of operations
AVERAGED = 1e-10  # divided by small D_j besides
MODULES = pytest.mark.parametrize("module", [jaxwarp, reference], ids=["jaxwarp", "reference"])
MIXED = "one for each axis"


def with_cotangents(function, ct):
    def compute(*arrays):
        out, pull = jax.vjp(function, *arrays)
        return out, pull(jax.tree.map(lambda x, o: x.astype(o.dtype), ct, out))

    return compute


def random_like(tree, seed=7):
    """Of the shapes and dtypes of `tree`."""
    rng = np.random.default_rng(seed)

    def draw(x):
        part = rng.standard_normal(x.shape)
        return (part + 1j * part[::-1] if jnp.iscomplexobj(x) else part).astype(x.dtype)

    return jax.tree.map(draw, tree)


# ------------------------------------------------------------------------------------ integers


def whole_numbers(dtype, shape):
    """Of the whole range, with both of its ends."""
    rng = np.random.default_rng(3)
    if dtype == "bool":
        return rng.random(shape) < 0.5
    low, high = np.iinfo(dtype).min, np.iinfo(dtype).max
    x = rng.integers(low, high, shape, dtype, endpoint=True)
    x.flat[:3] = low, high, 1
    return x


def largest(dtype):
    return True if dtype == "bool" else int(np.iinfo(dtype).max)


@pytest.mark.parametrize("boundary", ["constant", "reflect", MIXED])
@pytest.mark.parametrize("op", ["gather", "backward_warp", "grid_sample"])
@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("dtype", cases.INTEGERS)
def test_integers_keep_every_bit(dtype, dims, op, boundary):
    if op == "grid_sample":
        if boundary == MIXED:
            pytest.skip("PyTorch has one padding_mode")
        padding = {"constant": "zeros", "reflect": "reflection"}[boundary]
        options = {"mode": "nearest", "padding_mode": padding, "align_corners": False}
        case = cases.Case(op, dims, options, size=cases.GRID_SHAPES[dims, False])
    else:
        along = cases.PER_AXIS[dims] if boundary == MIXED else boundary
        options = {"method": "nearest", "boundary": along, "fill_value": largest(dtype)}
        case = cases.Case(op, dims, options)
    image, points = case.inputs()
    image = whole_numbers(dtype, image.shape)
    actual = jax.jit(case.function(jaxwarp))(image, points)
    expected = case.function(reference)(image, points)
    assert actual.dtype == expected.dtype == dtype
    np.testing.assert_array_equal(actual, expected)


@MODULES
@pytest.mark.parametrize("dtype", cases.INTEGERS)
def test_integers_are_picked_at_the_rounded_position(dtype, module):
    image, rng = whole_numbers(dtype, (5, 6, 2)), np.random.default_rng(0)
    points = np.concatenate([rng.uniform(-2, 8, (50, 2)), [[np.nan, 1], [2, np.inf], [0.5, 1.5]]])
    out = module.gather(image, points, method="nearest", fill_value=largest(dtype))
    expected = np.full((len(points), 2), largest(dtype), dtype)
    for i, p in enumerate(points):
        x, y = np.rint(p)  # ties to even
        if 0 <= x < 6 and 0 <= y < 5:
            expected[i] = image[int(y), int(x)]
    np.testing.assert_array_equal(out, expected)


@MODULES
@pytest.mark.parametrize("boundary", [*cases.BOUNDARIES, MIXED])
@pytest.mark.parametrize("dims", [2, 3])
def test_integers_are_those_numbers(dims, boundary, module):
    """Those that float64 holds, at positions of all kinds."""
    along = cases.PER_AXIS[dims] if boundary == MIXED else boundary
    case = cases.Case("gather", dims, {"method": "nearest", "boundary": along, "fill_value": -7})
    image, points = case.inputs()
    image = whole_numbers("int32", image.shape)
    expected = case.function(module)(image.astype(np.float64), points)
    out = case.function(module)(image, points)
    np.testing.assert_array_equal(out, np.where(np.isnan(expected), -7, expected))


@pytest.mark.parametrize("dtype", ["bool", "uint8", "int16", "int32", "uint32"])
def test_integers_without_x64(dtype):
    image, points = whole_numbers(dtype, (4, 5, 3)), np.float32([[1, 2], [3.2, 0.9], [9, 9]])
    with jax.enable_x64(False):
        out = jaxwarp.gather(image, points, method="nearest", fill_value=largest(dtype))
    np.testing.assert_array_equal(out, [image[2, 1], image[1, 3], np.full(3, largest(dtype))])
    assert out.dtype == dtype


def test_an_identifier_that_float32_would_round():
    ids = np.full((3, 4, 1), 2**24 + 1)
    out = jaxwarp.backward_warp(ids, np.zeros((3, 4, 2), np.float32), method="nearest")
    np.testing.assert_array_equal(out, ids)


def test_integers_have_no_derivative_and_ask_for_no_mode():
    image, points = whole_numbers("int32", (4, 5, 3)), np.full((7, 2), 1.25)
    warp = partial(jaxwarp.gather, method="nearest")
    out, pull = jax.vjp(warp, image, points)
    ct_image, ct_points = pull(np.zeros(out.shape, jax.dtypes.float0))
    assert ct_image.dtype == jax.dtypes.float0 and ct_image.shape == image.shape
    np.testing.assert_array_equal(ct_points, np.zeros_like(points))

    def loss(points):
        return warp(image, points).astype(np.float64).sum()

    np.testing.assert_array_equal(jax.grad(loss)(points), 0 * points)
    np.testing.assert_array_equal(jax.jvp(loss, (points,), (points,))[1], 0)


def test_integers_under_vmap():
    images = whole_numbers("uint8", (3, 4, 5, 2))
    points = np.random.default_rng(0).uniform(-1, 6, (2, 7, 2))
    warp = partial(jaxwarp.gather, method="nearest", fill_value=9)
    for image_axis, points_axis in ((0, None), (None, 0)):
        i = images if image_axis == 0 else images[0]
        p = points if points_axis == 0 else points[0]
        out = jax.vmap(warp, (image_axis, points_axis))(i, p)
        one_by_one = [warp(x, p) for x in i] if image_axis == 0 else [warp(i, x) for x in p]
        np.testing.assert_array_equal(out, one_by_one)


@MODULES
@pytest.mark.parametrize("fill", [(1, 2, 255), [1, 2, 255], np.uint8([1, 2, 255])], ids=repr)
def test_integers_with_a_fill_for_each_channel(fill, module):
    image = np.zeros((2, 2, 3), np.uint8)
    for given in (np.uint8(fill), jnp.uint8(fill)) if module is reference else (fill,):
        out = module.gather(image, [[9.0, 9.0]], method="nearest", fill_value=given)
        np.testing.assert_array_equal(out, [[1, 2, 255]])


def test_fills_of_large_integers_are_exact():
    image, outside = np.ones((2, 2, 2), np.uint64), np.float64([[9, 9]])
    for fill in ((1, 2**63 + 1), [0, 2**64 - 1], np.uint64([5, 2**64 - 1])):
        out = jaxwarp.gather(image, outside, method="nearest", fill_value=fill)
        np.testing.assert_array_equal(out, np.array([fill], np.uint64))
    for dtype, fill in (("int64", 2.0**63), ("uint64", 2.0**64)):
        with pytest.raises(ValueError, match="fill_value: expected what"):
            jaxwarp.gather(image.astype(dtype), outside, method="nearest", fill_value=fill)


def test_integers_do_not_touch_debug_nans():
    with jax.debug_nans(True):
        out = jaxwarp.gather(np.ones((2, 2, 1), int), np.float64([[9, 9]]), method="nearest")
    np.testing.assert_array_equal(out, [[0]])


# ------------------------------------------------------------------------------------- complex

OF_COMPLEX = [
    *(case for case in cases.FEW if case.options.get("reduce") != "softmax"),
    cases.Case("forward_warp", 2, {"reduce": "softmax", "fill_value": 0.5}, weighted=True),
    next(c for c in cases.GRID_SAMPLE if str(c) == "grid_sample-2d-bicubic-zeros"),
    next(c for c in cases.GRID_SAMPLE if str(c) == "grid_sample-3d-bilinear-reflection-aligned"),
]


def complex_inputs(case, dtype="complex128", point_dtype="float64", kind="random"):
    image, *rest = case.inputs(kind, "float64", point_dtype)
    return ((image + 1j * image[::-1, ::-1]).astype(dtype), *rest)


def by_parts(case, module):
    """What a complex image means: the operation on its real and on its imaginary part."""
    fill = complex(case.options.get("fill_value", 0))

    def function(image, *rest):
        found = []
        for part, value in ((jnp.real(image), fill.real), (jnp.imag(image), fill.imag)):
            more = {"fill_value": value} if "fill_value" in case.options else {}
            found.append(case.function(module, **more)(part, *rest))
        if isinstance(found[0], tuple):
            return jax.lax.complex(found[0][0], found[1][0]), found[0][1]
        return jax.lax.complex(*found)

    return function


@MODULES
@pytest.mark.parametrize("case", OF_COMPLEX, ids=str)
def test_complex_numbers_are_two_channels(case, module):
    arrays = complex_inputs(case)
    oracle = by_parts(case, reference)
    ct = random_like(jax.eval_shape(oracle, *arrays))
    actual = jax.jit(with_cotangents(case.function(module), ct))(*arrays)
    expected = jax.jit(with_cotangents(oracle, ct))(*arrays)
    assert jax.tree.map(lambda x: x.dtype, actual) == jax.tree.map(lambda x: x.dtype, expected)
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        cases.assert_close(jnp.real(a), jnp.real(e), AVERAGED)
        cases.assert_close(jnp.imag(a), jnp.imag(e), AVERAGED)


@MODULES
@pytest.mark.parametrize("op", ["gather", "forward_warp"])
def test_complex_fill(op, module):
    case = cases.Case(op, options={"fill_value": 0.5 - 2j})
    arrays = complex_inputs(case)
    expected = by_parts(case, reference)(*arrays)
    np.testing.assert_allclose(case.function(module)(*arrays), expected, rtol=0, atol=AVERAGED)
    fills = np.array([1j, 2.0, -1 + 1j])
    out = case.function(module, fill_value=fills)(*arrays)
    for c, fill in enumerate(fills):
        one = cases.Case(op, options={"fill_value": fill})
        expected = by_parts(one, reference)(*arrays)[..., c]
        np.testing.assert_allclose(out[..., c], expected, rtol=0, atol=AVERAGED)


def test_complex64_is_accumulated_in_float32():
    case = cases.Case("forward_warp", options={"return_coverage": True})
    arrays = complex_inputs(case, "complex64", "float32")
    ct = random_like(jax.eval_shape(case.function(jaxwarp), *arrays))
    (out, coverage), cts = with_cotangents(case.function(jaxwarp), ct)(*arrays)
    assert (out.dtype, coverage.dtype) == (np.complex64, np.float32)
    assert [ct.dtype for ct in cts] == [np.complex64, np.float32]
    expected, _ = by_parts(case, reference)(*arrays)
    np.testing.assert_allclose(out, expected, rtol=0, atol=1e-5)


def test_complex_in_other_modes():
    case = cases.Case("gather")
    arrays = complex_inputs(case)
    tangents = random_like(arrays)
    oracle = by_parts(case, reference)
    actual = jax.jvp(case.function(jaxwarp, forward_mode=True), arrays, tangents)
    for a, e in zip(actual, jax.jvp(oracle, arrays, tangents), strict=True):
        np.testing.assert_allclose(a, e, rtol=0, atol=EXACT)

    def energy(function):
        return jax.hessian(lambda points: jnp.square(jnp.abs(function(arrays[0], points))).sum())

    few = arrays[1][:5] + 1 / 128  # off the kinks
    actual = energy(case.function(jaxwarp, forward_mode=True))(few)
    np.testing.assert_allclose(actual, energy(oracle)(few), rtol=0, atol=AVERAGED)


@MODULES
def test_reconstruct_complex(module):
    rng = np.random.default_rng(0)
    values = rng.standard_normal((40, 2)) + 1j * rng.standard_normal((40, 2))
    points = rng.uniform(0, 3, (40, 2))
    solve = partial(module.reconstruct, tol=1e-14, max_steps=1000)
    out = solve(values, points, (4, 4))
    expected = solve(values.real, points, (4, 4)) + 1j * solve(values.imag, points, (4, 4))
    assert out.dtype == np.complex128
    np.testing.assert_allclose(out, expected, rtol=0, atol=1e-8)


# --------------------------------------------------------------------------- fills as arrays

FILLED = [
    *(
        cases.Case("gather", dims, {"method": method, "boundary": boundary, "derivative": order})
        for dims in (2, 3)
        for method in cases.METHODS
        for boundary in ("constant", cases.PER_AXIS[dims], "nearest")
        for order in cases.DERIVATIVES[dims][:2]
    ),
    *(
        cases.Case("backward_warp", dims, {"method": method, "boundary": cases.PER_AXIS[dims]})
        for dims, method in ((2, "linear"), (3, "cubic"))
    ),
    *(
        cases.Case("forward_warp", dims, {"reduce": reduce, "min_coverage": 0.2}, weighted)
        for dims, reduce, weighted in (
            (2, "average", False),
            (3, "average", True),
            (2, "softmax", True),
        )
    ),
]


def filled(case, module, **options):
    """As a function of its arrays and its fill."""
    return lambda *x: case.function(module, **options, fill_value=x[-1])(*x[:-1])


@pytest.mark.parametrize("shape", [(), (cases.CHANNELS,)], ids=["scalar", "channels"])
@pytest.mark.parametrize("case", FILLED, ids=str)
def test_fill_as_an_array(case, shape):
    fill = np.random.default_rng(1).standard_normal(shape)
    arrays = (*case.inputs(), fill)
    ct = random_like(jax.eval_shape(filled(case, jaxwarp), *arrays))
    actual = jax.jit(with_cotangents(filled(case, jaxwarp), ct))(*arrays)
    expected = with_cotangents(filled(case, reference), ct)(*arrays)
    cases.assert_close(actual, expected, AVERAGED)
    assert actual[1][-1].shape == shape


@pytest.mark.parametrize("case", FILLED, ids=str)
def test_fill_as_an_array_is_that_number(case):
    arrays = case.inputs()
    ct = random_like(jax.eval_shape(case.function(jaxwarp), *arrays))
    expected = with_cotangents(case.function(jaxwarp, fill_value=0.7), ct)(*arrays)
    for fill in (jnp.asarray(0.7), np.full(cases.CHANNELS, 0.7)):
        actual = with_cotangents(case.function(jaxwarp, fill_value=fill), ct)(*arrays)
        cases.assert_close(actual, expected, AVERAGED)


@pytest.mark.parametrize("fill_dtype", [*cases.DTYPES, "int32"])
@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("op", ["gather", "forward_warp"])
def test_dtypes_of_fills(op, dtype, fill_dtype):
    case = cases.Case(op)
    image, points = case.inputs("random", dtype, "float32")
    fill = np.array([1, 0, -3]).astype(fill_dtype)
    ct = random_like(jax.eval_shape(case.function(jaxwarp), image, points))
    out, cts = with_cotangents(filled(case, jaxwarp), ct)(image, points, fill)
    no_cotangent = jax.dtypes.float0 if fill_dtype == "int32" else fill_dtype
    assert out.dtype == dtype
    assert [x.dtype for x in cts] == [dtype, np.float32, no_cotangent]
    # Rounded once, as with a number: for half types the bits are equal, and for others the sums are
    # taken in another order.
    for c, number in enumerate([1.0, 0.0, -3.0]):
        expected = case.function(jaxwarp, fill_value=number)(image, points)[..., c]
        ulp = float(jnp.finfo(dtype).eps) if dtype in ("float32", "float64") else 0
        scale = np.abs(np.asarray(expected, np.float64)).max()
        np.testing.assert_allclose(
            np.asarray(out[..., c], np.float64),
            np.asarray(expected, np.float64),
            rtol=0,
            atol=4 * ulp * scale,
        )


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("method", cases.AVERAGING)
def test_a_fill_that_is_no_number_touches_only_what_lies_outside(method, number):
    case = cases.Case("gather", options={"method": method})
    image, points = case.inputs("random")
    points = np.concatenate([points, np.floor(case.inputs("inside")[1])])  # and whole pixels
    ct = random_like(jax.eval_shape(case.function(jaxwarp), image, points))
    given = case.function(jaxwarp, fill_value=np.array([number] * 3))
    out, (ct_image, ct_points) = with_cotangents(given, ct)(image, points)
    given = case.function(jaxwarp, fill_value=number)
    expected, (expected_image, expected_points) = with_cotangents(given, ct)(image, points)
    np.testing.assert_allclose(out, expected, rtol=0, atol=EXACT)
    np.testing.assert_allclose(ct_image, expected_image, rtol=0, atol=EXACT)
    others = case.function(jaxwarp, fill_value=np.array([0.5, number, 1.0]))(image, points)
    for channel, own in enumerate((0.5, number, 1.0)):  # of another channel's fill nothing is seen
        alone = case.function(jaxwarp, fill_value=own)(image, points)
        np.testing.assert_allclose(others[..., channel], alone[..., channel], rtol=0, atol=EXACT)
    inside = np.isfinite(expected_points)
    assert inside[-48:].all()
    np.testing.assert_allclose(ct_points[inside], expected_points[inside], rtol=0, atol=EXACT)
    if method == "nearest":  # no weight moves, so no derivative is such a number

        def function(points):
            fill = np.array([number] * 3)
            return case.function(jaxwarp, fill_value=fill, forward_mode=True)(image, points)

        np.testing.assert_array_equal(jax.jvp(function, (points,), (points,))[1], 0)


@pytest.mark.parametrize("case", [FILLED[0], FILLED[-3]], ids=str)
def test_transformations_of_a_fill(case):
    rng = np.random.default_rng(2)
    image, points, *w = case.inputs("random")
    arrays = (image, points + 1 / 128, *w)
    fills = rng.standard_normal((4, 3))

    def function(module):
        return filled(case, module, forward_mode=True)

    mapped = jax.vmap(lambda fill: function(jaxwarp)(*arrays, fill))(fills)
    one_by_one = [function(reference)(*arrays, fill) for fill in fills]
    cases.assert_close(list(mapped), one_by_one, AVERAGED)

    primals = (*arrays, fills[0])
    actual = jax.jvp(function(jaxwarp), primals, random_like(primals))
    expected = jax.jvp(function(reference), primals, random_like(primals))
    cases.assert_close(actual, expected, 1e-9)

    def curvature(module):
        def loss(points, fill):
            return jnp.sin(function(module)(image, points, *w, fill)).sum()

        gradient = jax.grad(loss, (0, 1))
        moved = random_like((points, fills[0]))
        return jax.jvp(gradient, (arrays[1], fills[0]), moved)

    cases.assert_close(curvature(jaxwarp), curvature(reference), 1e-9)


def test_a_hole_passes_its_cotangent_to_the_fill():
    values, flow = np.ones((1, 3, 2)), np.full((1, 3, 2), [1.0, 0.0])  # pixel 0 becomes a hole

    def warp(fill):
        return jaxwarp.forward_warp(values, flow, fill_value=fill)[0]

    out, pull = jax.vjp(warp, np.array([5.0, 6.0]))
    np.testing.assert_array_equal(out, [[5, 6], [1, 1], [1, 1]])
    np.testing.assert_array_equal(pull(np.array([[2.0, 3], [4, 5], [6, 7]]))[0], [2, 3])


# ---------------------------------------------------------------------------------- sharding


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=str)
@pytest.mark.parametrize("what", ["integers", "complex", "fill"])
def test_sharded_points_stay_where_they_are(what, axis_type):
    mesh = jax.make_mesh((4,), ("x",), (axis_type,), devices=jax.devices()[:4])
    rng = np.random.default_rng(0)
    image, flow = rng.standard_normal((8, 6, 3)), rng.uniform(-2, 2, (8, 6, 2))
    options = {"fill_value": np.array([1.0, 2.0, 3.0])}
    if what == "integers":
        image, options = (99 * image).astype(int), {"method": "nearest", "fill_value": 7}
    if what == "complex":
        image, options = image * (1 + 2j), {}
    warp = partial(jaxwarp.backward_warp, **options)
    expected = warp(image, flow)
    with jax.set_mesh(mesh):
        rows = jax.device_put(flow, NamedSharding(mesh, PartitionSpec("x")))
        whole = jax.device_put(image, NamedSharding(mesh, PartitionSpec()))
        program = jax.jit(warp).lower(whole, rows).compile()
        out = program(whole, rows)
    moves = re.findall(r"all-[a-z]+|collective-[a-z]+|reduce-scatter", program.as_text())
    assert not moves
    assert out.sharding.shard_shape(out.shape) == (2, 6, 3)
    np.testing.assert_array_equal(out, expected)
