"""The cotangents of every operation: against the reference, differences and first principles."""

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads
from remembered import remembered

import jaxwarp
from jaxwarp import reference

EXACT = 1e-12  # float64: sums of a few products of numbers near 1, in another order of operations
# Dividing by D_j magnifies the rounding; the least D_j of these positions is (1/64)^3 = 4e-6.
AVERAGED = 1e-10
SINGLE = 1e-5

# Weights along an axis know nothing of the boundary: the higher orders in 3-D meet two of them.
CASES = [
    case
    for case in cases.ALL
    if case in cases.UNDIFFERENTIATED
    or case.dims == 2
    or case.options["boundary"] in ("constant", "mirror")
]


def cotangents(function, jit=True):
    """A function of (cotangent of the output, arrays) that returns the cotangents of the arrays."""

    def run(ct, *arrays):
        _, vjp = jax.vjp(function, *arrays)
        return vjp(ct)

    return jax.jit(run) if jit else run


def cotangent_like(function, *arrays, seed=7):
    rng = np.random.default_rng(seed)
    outputs = jax.eval_shape(function, *arrays)
    return jax.tree.map(lambda o: rng.standard_normal(o.shape).astype(o.dtype), outputs)


def tolerance(case):
    return AVERAGED if case.options.get("reduce", "sum") != "sum" else EXACT


# ---------------------------------------------------------------------------------- reference


@pytest.mark.parametrize("case", CASES, ids=str)
def test_float64(case):
    arrays = case.inputs()
    ct = cotangent_like(case.function(jaxwarp), *arrays)
    expected = remembered(cotangents(case.function(reference), jit=False), ct, *arrays)
    actual = cotangents(case.function(jaxwarp))(ct, *arrays)
    cases.assert_close(actual, expected, tolerance(case))


@pytest.mark.parametrize(
    "case", [case for case in CASES if case in cases.UNDIFFERENTIATED and case.dims == 2], ids=str
)
def test_float32(case):
    arrays = case.inputs(dtype="float32", point_dtype="float32")
    ct = cotangent_like(case.function(jaxwarp), *arrays)
    actual = cotangents(case.function(jaxwarp))(ct, *arrays)
    # The points stay as they are: a huge one is rounded when its pixel is added.
    wide = [a if i == 1 else a.astype(np.float64) for i, a in enumerate(arrays)]
    ct = jax.tree.map(lambda a: a.astype(np.float64), ct)
    expected = remembered(cotangents(case.function(reference), jit=False), ct, *wide)
    cases.assert_close(actual, expected, SINGLE)


@pytest.mark.parametrize("point_dtype", cases.DTYPES)
@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize(
    "case",
    [
        cases.Case("gather"),
        cases.Case("splat"),
        cases.Case("backward_warp", options={"boundary": "nearest"}),
        cases.Case("forward_warp", options={"reduce": "sum"}, weighted=True),
    ],
    ids=str,
)
def test_dtypes_of_cotangents_are_those_of_the_arrays(case, dtype, point_dtype):
    if "points" in case.arguments and point_dtype in ("float16", "bfloat16"):
        pytest.skip("half-precision points are refused: test_errors.py")
    arrays = case.inputs("random", dtype, point_dtype)
    ct = cotangent_like(case.function(jaxwarp), *arrays)
    actual = cotangents(case.function(jaxwarp))(ct, *arrays)
    assert [a.dtype for a in actual] == [a.dtype for a in arrays]

    def up(a):
        return np.asarray(a, np.float64)

    expected = remembered(cotangents(case.function(reference), jit=False), up(ct), *map(up, arrays))
    for a, e in zip(actual, expected, strict=True):
        # Accumulated in float32 at least, rounded once to the dtype of the array.
        scale = np.max(np.abs(e), initial=1.0)
        half_ulp = float(jnp.finfo(a.dtype).eps) / 2
        np.testing.assert_allclose(up(a), e, rtol=half_ulp, atol=1e-6 * scale)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_average_in_half_precision_uses_the_unrounded_result(dtype):
    # f_i - out_j of (6) is a small difference: with out_j rounded to the storage dtype the
    # gradient would be off by the rounding of out_j, some per cent of it here.
    case = cases.Case("forward_warp", weighted=True)
    values, flow, w = case.inputs("inside", dtype)
    values = (values + 10).astype(values.dtype)
    ct = cotangent_like(case.function(jaxwarp), values, flow, w)
    actual = cotangents(case.function(jaxwarp))(ct, values, flow, w)
    wide = (np.asarray(a, np.float64) for a in (values, flow, w))
    expected = remembered(
        cotangents(case.function(reference), jit=False), np.asarray(ct, np.float64), *wide
    )
    cases.assert_close(actual[1], expected[1], SINGLE)


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("boundary", cases.BOUNDARIES)
@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (5, 1), (1, 1, 1), (1, 4, 2)], ids=str)
def test_small_images(shape, boundary, dims):
    if len(shape) != dims:
        pytest.skip("the other number of dimensions")
    rng = np.random.default_rng(0)
    image, ct = rng.standard_normal((*shape, 2)), rng.standard_normal((*shape, 2))
    flow = cases.positions(rng, "mixed", shape, shape) - cases.grid(shape)
    for op, options in (("backward_warp", {"method": "cubic"}), ("forward_warp", {})):

        def warp(module, op=op, options=options):
            return lambda i, f: getattr(module, op)(i, f, boundary=boundary, **options)

        actual = cotangents(warp(jaxwarp))(ct, image, flow)
        expected = remembered(cotangents(warp(reference)), ct, image, flow)
        cases.assert_close(actual, expected, AVERAGED)


def test_empty_arrays():
    def gradients(f, *arrays):
        return jax.grad(lambda *a: jnp.sum(f(*a)), tuple(range(len(arrays))))(*arrays)

    image, points = np.ones((4, 5, 2)), np.ones((3, 2))
    ct_image, ct_points = gradients(jaxwarp.gather, image, points[:0])
    assert not ct_image.any()
    assert ct_points.shape == (0, 2)
    ct_image, ct_points = gradients(jaxwarp.gather, image[:0], points)
    assert ct_image.shape == (0, 5, 2)
    assert not ct_points.any()
    for empty in (image[:0], image[:, :0], image[..., :0]):
        flow = np.ones((*empty.shape[:2], 2))
        ct_values, ct_flow = gradients(jaxwarp.forward_warp, empty, flow)
        assert ct_values.shape == empty.shape
        assert ct_flow.shape == flow.shape
        assert not ct_flow.any()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5, 8, 17, 64, 1000])
def test_any_number_of_channels(channels, dtype):
    rng = np.random.default_rng(channels)
    image = rng.standard_normal((5, 6, channels)).astype(jnp.dtype(dtype))
    flow = (rng.integers(-192, 192, (5, 6, 2)) / 64).astype(np.float32)

    def warps(module):
        def run(image, flow):
            average = module.forward_warp(image, flow)
            return module.backward_warp(image, flow, boundary="reflect"), average

        return run

    ct = cotangent_like(warps(jaxwarp), image, flow)
    actual = cotangents(warps(jaxwarp))(ct, image, flow)
    ct, image = jax.tree.map(lambda a: np.asarray(a, np.float64), (ct, image))
    expected = remembered(cotangents(warps(reference)), ct, image, flow)
    # The image's cotangent is a sum of two rounded ones.
    one_ulp = float(jnp.finfo(dtype).eps)
    cases.assert_close(actual[0], expected[0], max(one_ulp, SINGLE))
    cases.assert_close(actual[1], expected[1], SINGLE)


@pytest.mark.parametrize("reach", [0.5, 64], ids=["smooth", "random"])
def test_large_arrays_and_a_shared_image(reach):
    rng, shape = np.random.default_rng(0), (300, 400)
    image = rng.standard_normal((*shape, 3)).astype(np.float32)
    flow = np.round(rng.uniform(-reach, reach, (2, *shape, 2)) * 64).astype(np.float32) / 64
    w = rng.uniform(0.5, 1, shape).astype(np.float32)

    def warps(module):
        def run(image, flow, w):
            average = module.forward_warp(image, flow, importance=w)
            return module.backward_warp(image, flow), average

        return run

    ct = cotangent_like(warps(jaxwarp), image, flow, w)
    actual = cotangents(warps(jaxwarp))(ct, image, flow, w)
    expected = remembered(
        cotangents(warps(reference)),
        jax.tree.map(np.float64, ct),
        *map(np.float64, (image, flow, w)),
    )
    cases.assert_close(actual, expected, SINGLE)


# ------------------------------------------------------------------------------ first principles


@pytest.mark.parametrize("forward_mode", [False, True])
@pytest.mark.parametrize("case", cases.FEW, ids=str)
def test_finite_differences(case, forward_mode):
    arrays = case.inputs("random")
    offset = np.random.default_rng(6).uniform(0.002, 0.01, arrays[1].shape)  # 1/64 is 0.0156
    arrays = (arrays[0], arrays[1] + offset, *arrays[2:])
    modes = ("fwd", "rev") if forward_mode else ("rev",)
    function = jax.jit(case.function(jaxwarp, forward_mode=forward_mode))
    # A step of 1e-6 stays within the cell of every point; truncation and rounding are near 1e-9,
    # which a denominator of down to 0.002^2 magnifies.
    check_grads(function, arrays, order=1, modes=modes, eps=1e-6, rtol=1e-5)


@pytest.mark.parametrize("case", cases.FEW, ids=str)
def test_finite_differences_of_second_order(case):
    arrays = case.inputs("inside")
    offset = np.random.default_rng(6).uniform(0.002, 0.01, arrays[1].shape)
    arrays = (arrays[0], arrays[1] + offset, *arrays[2:])
    function = jax.jit(case.function(jaxwarp, forward_mode=True))
    # As above; second derivatives are larger than the first by another 1 / D.
    check_grads(function, arrays, order=2, eps=1e-6, rtol=1e-3)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("case", [c for c in cases.GATHER_AND_SPLAT if c.op == "gather"], ids=str)
def test_splat_is_the_adjoint_of_gather(case, dtype):
    rng = np.random.default_rng(3)
    kinds = ("random", "integer", "border", "huge")
    points = [cases.positions(rng, kind, (16,), case.shape) for kind in kinds]
    points = np.concatenate(points).astype(dtype)
    image = rng.standard_normal((*case.shape, 3)).astype(dtype)
    values = rng.standard_normal((len(points), 3)).astype(dtype)
    options = {**case.options, "fill_value": 0.0}
    gathered = jaxwarp.gather(image, points, **options)
    del options["fill_value"]
    splatted = jaxwarp.splat(values, points, case.shape, **options)
    one, other = np.float64(gathered) * values, np.float64(splatted) * image
    summed = np.abs(one).sum() + np.abs(other).sum() + np.abs(values).sum() * np.abs(image).max()
    # The rounding of the sums, in units of what is summed; the last is for weights that cancel.
    assert abs(one.sum() - other.sum()) <= 8 * np.finfo(dtype).eps * summed


@pytest.mark.parametrize("boundary", cases.BOUNDARIES)
@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("op", ["gather", "splat", "backward_warp", "forward_warp"])
def test_derivative_at_integers_is_the_right_hand_one(op, dims, boundary):
    options = {"boundary": boundary} | ({"reduce": "sum"} if op == "forward_warp" else {})
    case = cases.Case(op, dims, options)
    first, points = case.inputs("integer")
    ct = cotangent_like(case.function(jaxwarp), first, points)
    _, slope = cotangents(case.function(jaxwarp))(ct, first, points)
    # Each position's share of <ct, out>: I(p) . ct for a gather, f . ct(p) for a splat.
    scattered = op in ("splat", "forward_warp")
    image, partner = (ct, first) if scattered else (first, ct)
    if op in ("backward_warp", "forward_warp"):
        points = points + cases.grid(points.shape[:-1])
    step = 1 / 64  # linear within a cell: any step to the right gives the derivative
    stepped = points[..., None, :] + step * np.concatenate([np.zeros((1, dims)), np.eye(dims)])
    share = reference.gather(image, stepped, boundary=boundary) * partner[..., None, :]
    here, *beside = np.moveaxis(np.asarray(share.sum(-1)), -1, 0)
    expected = np.stack([(there - here) / step for there in beside], axis=-1)
    np.testing.assert_allclose(slope, expected, rtol=0, atol=EXACT * 64)


def test_average_of_integer_displacements_has_the_right_hand_derivative():
    # Pixels 1, 2, 4 stay where they are. To the right, d out_j / d flow_i is (f_i - out_j) dg / D_j
    # with dg = -1 at j = i (where f_i = out_i) and +1 at j = i + 1, which i touches with g = 0.
    values = jnp.array([1.0, 2.0, 4.0]).reshape(1, 3, 1)
    ct = jnp.array([10.0, 100.0, 1000.0]).reshape(1, 3, 1)
    _, vjp = jax.vjp(jaxwarp.forward_warp, values, jnp.zeros((1, 3, 2)))
    ct_values, ct_flow = vjp(ct)
    np.testing.assert_allclose(ct_flow[0, :, 0], [(1 - 2) * 100, (2 - 4) * 1000, 0], atol=1e-9)
    np.testing.assert_array_equal(ct_flow[0, :, 1], np.zeros(3))
    np.testing.assert_allclose(ct_values, ct)


# ----------------------------------------------------------------------------- holes and edges


def holes(values, flow, w, ct, **options):
    def warp(values, flow, w):
        return jaxwarp.forward_warp(values, flow, importance=w, fill_value=3.0, **options)

    return cotangents(warp)(ct, values, flow, w)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_holes_pass_no_gradient(dtype):
    case = cases.Case("forward_warp", weighted=True)
    values, flow, w = case.inputs("random", dtype, dtype)
    ct = np.random.default_rng(1).standard_normal(values.shape).astype(dtype)
    for nothing in ({"min_coverage": 1e6}, {}):
        arrays = (values, flow, w if nothing else 0 * w)
        for cotangent in holes(*arrays, ct, **nothing):
            assert not cotangent.any()
    # A cotangent, even an infinite one, that arrives at a hole goes nowhere.
    _, coverage = jaxwarp.forward_warp(values, flow, return_coverage=True)
    hole = np.asarray(coverage <= 0.5)
    assert hole.any()
    assert not hole.all()
    clean = np.where(hole[..., None], 0, ct)
    dirty = np.where(hole[..., None], np.inf, ct)
    ones = np.ones_like(w)
    for a, b in zip(
        holes(values, flow, ones, clean, min_coverage=0.5),
        holes(values, flow, ones, dirty, min_coverage=0.5),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("importance", [1.0, 1e-3])
def test_isolated_source_has_no_flow_gradient(importance, dtype):
    # Its value arrives whole wherever it lands, so the gradient is 0 but for rounding:
    # 4 eps |f| |dg| w / (w g) per target, with |ct| = 1.
    rng, eps = np.random.default_rng(0), np.finfo(dtype).eps
    for _ in range(20):
        values = rng.standard_normal((5, 5, 1)).astype(dtype)
        flow = np.full((5, 5, 2), 100, dtype)
        flow[2, 2] = rng.uniform(-1, 1, 2)
        w = np.full((5, 5), importance, dtype)
        ct = np.ones((5, 5, 1), dtype)
        _, ct_flow, ct_w = holes(values, flow, w, ct)
        x, y = np.float64(flow[2, 2]) % 1
        f = abs(float(values[2, 2, 0]))
        # |dg| / g of a target is 1 / its weight along the axis.
        bound = 4 * eps * f * np.array([2 / x + 2 / (1 - x), 2 / y + 2 / (1 - y)])
        assert (np.abs(ct_flow[2, 2]) <= bound).all()
        assert abs(ct_w[2, 2]) <= 4 * eps * 4 * f / importance
        assert not np.delete(np.reshape(ct_flow, (25, 2)), 12, 0).any()


def test_source_of_no_importance_gets_no_gradient_but_its_importance_does():
    values = np.array([[1.0, 5.0, 2.0]])[..., None]
    flow, w = np.zeros((1, 3, 2)), np.array([[1.0, 0.0, 1.0]])
    flow[0, 1, 0] = 1  # onto the source 2
    ct_values, ct_flow, ct_w = holes(values, flow, w, np.ones((1, 3, 1)))
    assert not ct_values[0, 1].any()
    assert not ct_flow[0, 1].any()
    np.testing.assert_allclose(ct_w[0], [0, 5 - 2, 0], atol=EXACT)  # (f_i - out_j) g / D_j
    values[0, 1] = np.nan
    ct_values, ct_flow, _ = holes(values, flow, w, np.ones((1, 3, 1)))
    assert np.isfinite(ct_values).all()
    assert np.isfinite(ct_flow).all()


@pytest.mark.parametrize("reduce", ["sum", "average"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, 2.0])
def test_second_order_where_no_importance_hides_a_value(reduce, bad):
    """What is hidden has a derivative all the same: in the importance it is what is hidden."""
    values, w = np.array([[[bad], [3.0]]]), np.array([[0.0, 1.0]])
    flow = np.zeros((1, 2, 2))
    flow[..., 0] = 0.25

    def moved(module, argument):
        def total(values, flow, w):
            return module.forward_warp(values, flow, importance=w, reduce=reduce).sum()

        at = [values, flow, w]

        def slopes(x):
            return jax.grad(total, (0, 1))(*at[:argument], x, *at[argument + 1 :])

        return jax.jvp(slopes, (at[argument],), (np.ones_like(at[argument]),))[1]

    for argument in (1, 2):  # flow, importance
        cases.assert_close(moved(jaxwarp, argument), moved(reference, argument), EXACT)
    by_values, _ = moved(jaxwarp, 2)
    assert np.isfinite(by_values).all()
    assert by_values[0, 0, 0] > 0


def test_coverage_is_differentiable_in_the_flow():
    rng = np.random.default_rng(0)
    values, flow = rng.standard_normal((4, 5, 2)), rng.integers(-99, 99, (4, 5, 2)) / 64
    for reduce in ("average", "sum"):

        def coverage(module, reduce=reduce):
            return lambda v, f: module.forward_warp(v, f, reduce=reduce, return_coverage=True)[1]

        ct = cotangent_like(coverage(reference), values, flow)
        actual = cotangents(coverage(jaxwarp))(ct, values, flow)
        expected = remembered(cotangents(coverage(reference)), ct, values, flow)
        cases.assert_close(actual, expected, EXACT)
        assert not actual[0].any()
        assert actual[1].any()


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("boundary", cases.BOUNDARIES)
@pytest.mark.parametrize("method", cases.METHODS)
def test_nonfinite_positions(method, boundary, dims):
    options = {"method": method, "boundary": boundary}
    shape, axes = cases.SHAPES[dims], np.eye(dims, dtype=bool)
    nan = np.where(axes, np.nan, 1.0)
    infinite = np.concatenate([np.where(axes, np.inf, 1.0), np.where(axes, -np.inf, 1.0)])
    rng = np.random.default_rng(0)
    image = rng.standard_normal((*shape, 3))
    for points, expected in ((nan, np.nan), (infinite, 0 if boundary == "constant" else np.nan)):
        values = rng.standard_normal((len(points), 3))

        def gather(image, points):
            return jaxwarp.gather(image, points, fill_value=0.5, **options)

        ct_image, ct_points = cotangents(gather)(values, image, points)
        assert not ct_image.any()
        np.testing.assert_array_equal(ct_points, np.full_like(points, expected))

        def splat(values, points):
            return jaxwarp.splat(values, points, shape, **options)

        for cotangent in cotangents(splat)(image, values * np.nan, points):
            assert not cotangent.any()


@pytest.mark.parametrize("boundary", cases.BOUNDARIES)
@pytest.mark.parametrize("method", ["linear", "cubic"])
def test_nan_pixel_reaches_exactly_the_derivatives_that_weigh_it(method, boundary):
    case = cases.Case("gather", 2, {"method": method, "boundary": boundary})
    image, points = case.inputs("integer")
    image[2, 3, 1] = np.nan
    ct = np.random.default_rng(1).standard_normal((*points.shape[:-1], 3))
    actual = cotangents(case.function(jaxwarp))(ct, image, points)
    expected = remembered(cotangents(case.function(reference), jit=False), ct, image, points)
    cases.assert_close(actual, expected, EXACT)
    assert np.isfinite(actual[0]).all()
    one_of_two = np.isnan(actual[1]).sum(-1)
    assert set(one_of_two.ravel()) >= {0, 1}  # along one axis, where the other weighs it with 0


@pytest.mark.parametrize("op", ["gather", "splat"])
def test_nonfinite_cotangents_reach_only_what_they_weigh(op):
    """The adjoint in the values is the other operation, in which a weight of 0 hides a NaN."""
    options = {"method": "cubic", "boundary": "mirror"}
    case = cases.Case(op, 2, options)
    first, points = case.inputs("integer")
    ct = cotangent_like(case.function(reference), first, points)
    ct[0, ..., 0] = np.inf  # a point of a gather, a row of a splat
    ct[1, ..., 1] = np.nan
    actual, _ = cotangents(case.function(jaxwarp))(ct, first, points)
    if op == "gather":
        expected = reference.splat(ct, points, first.shape[:-1], **options)
    else:
        expected = reference.gather(ct, points, **options)
    cases.assert_close(actual, expected, EXACT)
    assert np.isfinite(actual).any() and not np.isfinite(actual).all()
