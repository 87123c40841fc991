"""jaxwarp.flow: against NumPy written here, against known inverses and compositions, and against
the colours of the standard library."""

import colorsys
import inspect
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import DTYPES, SHAPES, grid
from jax.test_util import check_grads

import jaxwarp
from jaxwarp.flow import compose, consistency, invert

FUNCTIONS = {
    "invert": (("flow",), {"forward_mode": False}),
    "compose": (("first", "second"), {"forward_mode": False}),
    "consistency": (("forward", "backward"), {"forward_mode": False}),
    "to_rgb": (("flow",), {"max_length": None}),
}
HALF = ("float16", "bfloat16")
to_rgb = jax.jit(jaxwarp.flow.to_rgb, static_argnames="max_length")  # one program, not one per step
PAIRED = pytest.mark.parametrize("function", [compose, consistency], ids=lambda f: f.__name__)


def random_flow(*shape, seed=0, scale=2.0):
    """(*shape, d) with d = len(shape); positions stay 0.1 pixels away from integer coordinates."""
    rng = np.random.default_rng(seed)
    whole = np.round(scale * rng.standard_normal((*shape, len(shape))))
    return whole + rng.uniform(0.1, 0.9, whole.shape)


def affine(matrix, offset, shape):
    """The flow of the map q -> matrix q + offset, and its analytic inverse."""
    matrix, offset, q = np.array(matrix), np.array(offset), grid(shape)
    inverse = np.linalg.inv(matrix)
    return q @ matrix.T + offset - q, (q - offset) @ inverse.T - q


def corners(points):
    """Pixels (*S, d) in the order of the axes of the image, and their bilinear weights (*S)."""
    base = np.floor(points)
    for taps in itertools.product((0, 1), repeat=points.shape[-1]):
        weights = np.where(taps, points - base, 1 - (points - base)).prod(-1)
        yield (base + taps)[..., ::-1].astype(int), weights


def invert_numpy(flow):
    shape = flow.shape[:-1]
    total, weight = np.zeros_like(flow), np.zeros(shape)
    for pixels, g in corners(grid(shape) + flow):
        inside = ((pixels >= 0) & (pixels < shape)).all(-1)
        at = tuple(pixels[inside].T)
        np.add.at(total, at, -flow[inside] * g[inside][:, None])
        np.add.at(weight, at, g[inside])
    hole = weight == 0
    return np.where(hole[..., None], 0, total / np.where(hole, 1, weight)[..., None])


def compose_numpy(first, second):
    total = first.copy()
    last = np.array(second.shape[:-1]) - 1
    for pixels, g in corners(grid(first.shape[:-1]) + first):
        total += g[..., None] * second[tuple(np.moveaxis(np.clip(pixels, 0, last), -1, 0))]
    return total


def consistency_numpy(forward, backward):
    return np.sqrt((compose_numpy(forward, backward) ** 2).sum(-1))


IN_NUMPY = {invert: invert_numpy, compose: compose_numpy, consistency: consistency_numpy}


# ---------------------------------------------------------------------------- values


@pytest.mark.parametrize("dims", SHAPES)
def test_values(dims):
    first, second = (random_flow(*SHAPES[dims], seed=seed) for seed in (0, 1))
    other_size = random_flow(*(n + 2 for n in SHAPES[dims]), seed=2)
    inverse = invert_numpy(first)
    # The case holds what it is to show: holes, averages, and positions outside.
    assert (inverse == 0).any() and (inverse != 0).any()
    assert (grid(SHAPES[dims]) + first < 0).any()
    # 1e-12 pixels: some thirty operations in float64 on values around 5.
    np.testing.assert_allclose(invert(first), inverse, rtol=0, atol=1e-12)
    for function in (compose, consistency):
        for backward in (second, other_size):
            expected = IN_NUMPY[function](first, backward)
            np.testing.assert_allclose(function(first, backward), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_translation_inverts_exactly(dtype):
    for shift in ([2.0, -1.0], [1.5, -0.25]):  # exact in every dtype
        flow = jnp.broadcast_to(jnp.array(shift, dtype), (6, 7, 2))
        inverse = invert(flow)
        assert inverse.dtype == flow.dtype
        reached = (np.abs(grid((6, 7)) - shift - [3, 2.5]) < [4, 3.5]).all(-1, keepdims=True)
        assert 0 < reached.sum() < 42
        np.testing.assert_array_equal(inverse, np.where(reached, np.negative(shift), 0))
        assert (consistency(inverse, flow)[reached[..., 0]] == 0).all()


def test_inverse_of_a_smooth_flow():
    shape, inside = (48, 56), np.s_[10:-10, 10:-10]
    flow, exact = affine([[1.02, -0.2], [0.18, 0.9]], [1.3, -2.7], shape)
    inverse, coverage = jaxwarp.forward_warp(-flow, flow, return_coverage=True)
    np.testing.assert_array_equal(invert(flow), inverse)  # the recipe of the docstring
    seen = np.asarray(coverage) > 0
    assert not seen.all() and seen[inside].all()
    # The bound of the docstring: less than one pixel along x and one along y, times the inverse's
    # change per pixel.
    bound = np.abs(exact[1:, 1:] - exact[:-1, 1:])[0, 0] + np.abs(exact[1:, 1:] - exact[1:, :-1])
    error = np.abs(inverse - exact)
    assert (error[seen] <= bound[0, 0]).all()
    assert error[inside].max() < 0.25 * bound[0, 0].max()
    better = -jaxwarp.backward_warp(flow, inverse, boundary="nearest")
    assert np.abs(better - exact)[inside].max() < 0.25 * error[inside].max()
    # What is left of the round trip is the error of the inverse, turned and sheared by the flow.
    residual = consistency(flow, inverse)[inside]
    assert 0 < residual.max() < 2 * error.max(-1)[seen].max()
    assert consistency(flow, better)[inside].max() < 0.25 * residual.max()


def test_composition_of_affine_flows():
    shape, inside = (16, 18), np.s_[5:-5, 5:-5]
    one, two = np.array([[1.1, 0.05], [-0.1, 0.95]]), np.array([[0.9, -0.1], [0.2, 1.05]])
    first, _ = affine(one, [0.7, -1.2], shape)
    second, _ = affine(two, [-0.4, 0.9], shape)
    both, _ = affine(two @ one, two @ [0.7, -1.2] + [-0.4, 0.9], shape)
    swapped, _ = affine(one @ two, one @ [-0.4, 0.9] + [0.7, -1.2], shape)
    assert np.abs(both - swapped)[inside].max() > 0.1
    np.testing.assert_allclose(compose(first, second)[inside], both[inside], rtol=0, atol=1e-12)
    # On an image that is linear, warping once is warping twice, in the order that is promised.
    image = (grid(shape) @ [0.3, -0.8])[..., None]
    twice = jaxwarp.backward_warp(jaxwarp.backward_warp(image, second), first)
    once = jaxwarp.backward_warp(image, compose(first, second))
    np.testing.assert_allclose(once[inside], twice[inside], rtol=0, atol=1e-12)


def test_outside_the_second_flow_is_that_of_its_edge():
    second = random_flow(4, 5)
    first = np.full((4, 5, 2), [100.0, 0])
    expected = first + second[:, -1:]
    np.testing.assert_allclose(compose(first, second), expected, rtol=0, atol=1e-12)


def test_known_residuals():
    np.testing.assert_array_equal(
        consistency(np.full((2, 3, 2), [3.0, 4.0]), np.zeros((2, 3, 2))), np.full((2, 3), 5.0)
    )
    np.testing.assert_array_equal(
        consistency(np.full((1, 2, 3, 3), [2.0, 3.0, 6.0]), np.zeros((1, 2, 3, 3))),
        np.full((1, 2, 3), 7.0),
    )


def test_holes_and_non_finite_displacements():
    flow = np.full((4, 5, 2), [2.0, 0.0])
    flow[1, 0], flow[2, 1] = [np.nan, 0], [0, np.inf]
    inverse = np.asarray(invert(flow))
    hole = np.zeros((4, 5), bool)
    hole[:, :2] = hole[1, 2] = hole[2, 3] = True
    np.testing.assert_array_equal(inverse[hole], 0)
    np.testing.assert_array_equal(inverse[~hole], np.full((10, 2), [-2, 0]))
    _, coverage = jaxwarp.forward_warp(-flow, flow, return_coverage=True)
    np.testing.assert_array_equal(np.asarray(coverage) == 0, hole)
    lost = ~np.isfinite(flow).all(-1)
    for function in (compose, consistency):
        got = np.asarray(function(flow, np.zeros_like(flow))).reshape(4, 5, -1)
        np.testing.assert_array_equal(np.isnan(got).all(-1), lost)
        assert np.isfinite(got[~lost]).all()


@pytest.mark.parametrize("dtype", HALF)
def test_half_precision_is_rounded_once(dtype):
    # Displacements around 60 pixels, which bfloat16 knows to 1/4; forward and backward cancel.
    shape = (60, 70)
    mean = np.array([60, -55])
    forward = jnp.asarray(random_flow(*shape) + mean, dtype)
    backward = jnp.asarray(random_flow(*shape, seed=1) - mean, dtype)
    half_step = float(jnp.finfo(dtype).eps) / 2
    for function, flows in (
        (invert, [forward]),
        (compose, [forward, backward]),
        (consistency, [forward, backward]),
        (compose, [forward, forward]),
    ):
        exact = IN_NUMPY[function](*(np.asarray(flow, np.float64) for flow in flows))
        got = function(*flows)
        assert got.dtype == dtype
        # Half a step of the result from the one rounding; 1e-4 from float32, of values around 200.
        error = np.abs(np.asarray(got, np.float64) - exact)
        assert (error <= half_step * np.abs(exact) + 1e-4).all()
        assert error.max() > 0  # the rounding is seen


@PAIRED
@pytest.mark.parametrize(
    "first, second, result",
    [(t, t, t) for t in DTYPES]
    + [
        ("float32", "float64", "float64"),
        ("float64", "bfloat16", "float64"),
        ("float16", "float32", "float32"),
        ("float16", "bfloat16", "float32"),
    ],
)
def test_dtypes(function, first, second, result):
    flows = [jnp.asarray(random_flow(4, 5, seed=s), t) for s, t in enumerate((first, second))]
    out, gradients = jax.value_and_grad(lambda *f: function(*f).sum(), (0, 1))(*flows)
    assert out.dtype == result
    assert [g.dtype for g in gradients] == [first, second]
    exact = IN_NUMPY[function](*(np.asarray(flow, np.float64) for flow in flows))
    eps = float(jnp.finfo(result).eps)
    # One rounding of each result, and in float32 of what it is made of, up to 12 pixels.
    np.testing.assert_allclose(
        np.asarray(function(*flows), np.float64), exact, rtol=eps, atol=12 * max(eps**2, 2e-7)
    )


# ---------------------------------------------------------------------------- derivatives


@pytest.mark.parametrize("function", IN_NUMPY, ids=lambda f: f.__name__)
def test_disable_jit(function):
    flows = [random_flow(3, 4, seed=seed, scale=0.7) for seed in (0, 1)]
    flows = flows[: len(inspect.signature(function).parameters) - 1]
    value_and_grad = jax.value_and_grad(lambda flow: function(flow, *flows[1:]).sum())
    expected = jax.jit(value_and_grad)(flows[0])
    with jax.disable_jit():
        actual = value_and_grad(flows[0])
    for a, e in zip(actual, expected, strict=True):
        np.testing.assert_allclose(a, e, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dims", SHAPES)
@pytest.mark.parametrize("function", IN_NUMPY, ids=lambda f: f.__name__)
def test_gradients(function, dims):
    shape = (3, 4, 3)[:dims]
    flows = [random_flow(*shape, seed=seed, scale=0.7) for seed in (0, 1)]
    flows = flows[: len(inspect.signature(function).parameters) - 1]
    if function is consistency:  # away from 0, where the norm has a kink
        assert function(*flows).min() > 0.1
    check_grads(function, flows, order=1, modes=["rev"])
    check_grads(lambda *f: function(*f, forward_mode=True), flows, order=1, modes=["fwd"])
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(function, flows, flows)


@pytest.mark.parametrize("dtype", DTYPES)
def test_derivatives_of_a_zero_residual(dtype):
    forward = np.full((4, 5, 2), [1.5, -0.5])
    backward = -forward
    backward[0, 4] += [3, 4]
    flows = jnp.asarray(forward, dtype), jnp.asarray(backward, dtype)
    residual = consistency(*flows)
    zero = np.asarray(residual == 0)
    assert zero.any() and not zero.all()

    def total(forward, backward):
        return consistency(forward, backward, forward_mode=True).sum()

    for gradient in jax.grad(total, (0, 1))(*flows):
        assert np.isfinite(gradient).all() and (gradient != 0).any()
    for_zeros = jax.grad(lambda f: jnp.where(zero, consistency(f, flows[1]), 0).sum())(flows[0])
    np.testing.assert_array_equal(for_zeros, 0)
    np.testing.assert_array_equal(jax.grad(total)(*map(jnp.zeros_like, flows)), 0)
    # Where the second flow does not vary it is the unit vector of the residual.
    unit = jax.grad(total)(jnp.asarray(forward, dtype), jnp.zeros_like(flows[1]))
    expected = np.full((4, 5, 2), [1.5, -0.5]) / np.sqrt(2.5)
    np.testing.assert_allclose(
        np.asarray(unit, np.float64), expected, rtol=2 * float(jnp.finfo(dtype).eps)
    )
    assert np.isfinite(jax.jvp(total, flows, flows)[1])
    if dtype == "float64":
        assert np.isfinite(jax.hessian(total)(*flows)).all()


def test_holes_pass_no_gradient():
    flow = random_flow(5, 6)
    hole = invert_numpy(flow) == 0
    assert hole.any()
    gradient = jax.grad(lambda flow: jnp.where(hole, invert(flow), 0).sum())(flow)
    np.testing.assert_array_equal(gradient, 0)


# ---------------------------------------------------------------------------- transformations


@PAIRED
def test_batches_broadcast_and_mean_vmap(function):
    first = np.stack([random_flow(4, 5, seed=seed) for seed in range(3)])[:, None]
    second = np.stack([random_flow(6, 4, seed=seed) for seed in range(5, 7)])
    out = jax.jit(function)(first, second)
    expected = [[IN_NUMPY[function](f[0], s) for s in second] for f in first]
    np.testing.assert_allclose(out, expected, rtol=0, atol=1e-12)
    nested = jax.vmap(jax.vmap(function, (None, 0)), (0, None))(first[:, 0], second)
    np.testing.assert_array_equal(nested, out)
    # A flow without batch axes is shared, and its gradient is the sum.
    shared = jax.grad(lambda f: function(f, second).sum())(first[0, 0])
    alone = [jax.grad(lambda f, s=s: function(f, s).sum())(first[0, 0]) for s in second]
    np.testing.assert_allclose(shared, sum(alone), rtol=0, atol=1e-12)


@pytest.mark.parametrize("function", [invert, to_rgb], ids=lambda f: f.__name__)
def test_batches_of_one_flow(function):
    flows = np.stack([(1 + seed) * random_flow(4, 5, seed=seed) for seed in range(6)])
    flows = flows.reshape(3, 2, 4, 5, 2)
    alone = np.array([[function(f) for f in row] for row in flows])
    np.testing.assert_array_equal(jax.jit(function)(flows), alone)
    np.testing.assert_array_equal(jax.vmap(function, 1, 1)(flows), alone)


def test_three_dimensional_batches():
    flows = np.stack([random_flow(*SHAPES[3], seed=seed) for seed in range(2)])
    np.testing.assert_array_equal(invert(flows), np.stack([invert(f) for f in flows]))
    got = consistency(flows[0], flows)
    np.testing.assert_array_equal(got, np.stack([consistency(flows[0], f) for f in flows]))


@pytest.mark.parametrize("shape", [(0, 5), (4, 0), (0, 0), (0, 4, 5), (2, 4, 0)])
def test_empty_flows(shape):
    dims = 2
    flow = np.zeros((*shape, dims), np.float32)
    assert invert(flow).shape == flow.shape
    assert compose(flow, flow).shape == flow.shape
    assert consistency(flow, flow).shape == shape
    assert to_rgb(flow).shape == to_rgb(flow, max_length=1.0).shape == (*shape, 3)
    assert jax.grad(lambda f: consistency(f, f).sum())(flow).shape == flow.shape
    batched = np.zeros((3, 1, *shape, dims), np.float32)
    assert compose(flow, batched).shape == batched.shape
    # Nothing is asked of the second flow here, so that it may have any size.
    if 0 in shape[-2:]:
        assert compose(flow, np.zeros((4, 5, dims), np.float32)).shape == flow.shape


# ---------------------------------------------------------------------------- colours


def colours(flow, max_length=None):
    """to_rgb with the HSV of the standard library, pixel by pixel, before rounding."""
    longest = max_length or max(np.hypot(*v) for v in flow.reshape(-1, 2))
    out = []
    for x, y in flow.reshape(-1, 2):
        turn = np.arctan2(y, x) / (2 * np.pi)
        out.append(colorsys.hsv_to_rgb(turn % 1, min(np.hypot(x, y) / longest, 1), 1))
    return 255 * np.reshape(out, (*flow.shape[:-1], 3))


def test_colours_of_directions():
    half = 3**0.5 / 2
    wheel = {  # the table of the docstring; y points down
        (1, 0): (255, 0, 0),
        (0.5, half): (255, 255, 0),
        (0, 1): (128, 255, 0),
        (-0.5, half): (0, 255, 0),
        (-1, 0): (0, 255, 255),
        (-0.5, -half): (0, 0, 255),
        (0, -1): (128, 0, 255),
        (0.5, -half): (255, 0, 255),
        (0, 0): (255, 255, 255),
    }
    flow = np.array([list(wheel)])
    got = to_rgb(7 * flow)
    assert got.dtype == np.uint8
    # 127.5 rounds to either side, after a hue that is not exact.
    np.testing.assert_allclose(np.asarray(got, int), [list(wheel.values())], rtol=0, atol=1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("max_length", [None, 1.5, 40.0])
def test_colours(dtype, max_length):
    flow = jnp.asarray(random_flow(9, 11), dtype)
    got = np.asarray(to_rgb(flow, max_length=max_length), float)
    expected = colours(np.asarray(flow, float), max_length)
    # Half a level from rounding, 0.001 of one from float32.
    np.testing.assert_allclose(got, expected, rtol=0, atol=0.501)
    if max_length != 40.0:
        assert got.min() == 0  # some colour is full
    else:
        assert got.min() > 150


def test_colours_without_a_length():
    assert (np.asarray(to_rgb(np.zeros((2, 3, 4, 2), np.float32))) == 255).all()
    flow = np.array([[[2.0, 0], [1.0, 0], [0, 0], [np.nan, 0], [0, np.inf], [-np.inf, np.nan]]])
    red, pink, white, black = [255, 0, 0], [255, 128, 128], [255] * 3, [0] * 3
    expected = np.array([[red, pink, white, black, black, black]])
    for dtype in DTYPES:  # the longest is the longest finite one
        np.testing.assert_array_equal(to_rgb(flow.astype(jnp.dtype(dtype))), expected)
    np.testing.assert_array_equal(to_rgb(flow, max_length=2.0), expected)
    assert (np.asarray(to_rgb(np.full((2, 3, 2), np.nan))) == 0).all()
    long = np.array([[[1e30, 0], [0, 0], [-1.0, 0]]], np.float32)
    np.testing.assert_array_equal(to_rgb(long), [[red, white, white]])
    for max_length in (1.0, 1e-40):  # the latter is no normal float32
        colours = [[red, white, [0, 255, 255]]]
        np.testing.assert_array_equal(to_rgb(long, max_length=max_length), colours)


def test_every_image_has_its_own_longest_displacement():
    flow = random_flow(5, 6)
    batch = np.stack([flow, 10 * flow])
    np.testing.assert_array_equal(*to_rgb(batch))
    first, second = np.asarray(to_rgb(batch, max_length=20.0), int)
    assert np.abs(first - second).max() > 100


# ---------------------------------------------------------------------------- errors, conventions

FLOW, VOLUME = np.zeros((5, 6, 2), np.float32), np.zeros((3, 4, 5, 3), np.float32)
FLOATS = "float16, bfloat16, float32, float64"
LAYOUTS = "(*batch, H, W, 2) or (*batch, D, H, W, 3)"


@pytest.mark.parametrize(
    "error, argument, expected, received, call",
    [
        (TypeError, "flow", FLOATS, "int32", lambda: invert(FLOW.astype(np.int32))),
        (TypeError, "flow", FLOATS, "uint16", lambda: to_rgb(FLOW.astype(np.uint16))),
        (TypeError, "first", FLOATS, "int8", lambda: compose(FLOW.astype(np.int8), FLOW)),
        (TypeError, "second", FLOATS, "bool", lambda: compose(FLOW, FLOW > 0)),
        (TypeError, "forward", FLOATS, "complex64", lambda: consistency(FLOW + 0j, FLOW)),
        (TypeError, "backward", FLOATS, "int32", lambda: consistency(FLOW, FLOW.astype("i4"))),
        (ValueError, "flow", LAYOUTS, "(5, 6, 4)", lambda: invert(np.zeros((5, 6, 4)))),
        (ValueError, "flow", LAYOUTS, "(5, 6, 3)", lambda: invert(np.zeros((5, 6, 3)))),
        (ValueError, "flow", LAYOUTS, "()", lambda: invert(1.0)),
        (ValueError, "first", LAYOUTS, "(2, 5, 6)", lambda: compose(np.zeros((2, 5, 6)), FLOW)),
        (ValueError, "second", LAYOUTS, "(6, 2)", lambda: compose(FLOW, FLOW[0])),
        (ValueError, "second", "2, as first has", "3", lambda: compose(FLOW, VOLUME)),
        (ValueError, "backward", "3, as forward has", "2", lambda: consistency(VOLUME, FLOW)),
        (
            ValueError,
            "first, second",
            "broadcast",
            "first (2,), second (3,)",
            lambda: compose(np.stack([FLOW] * 2), np.stack([FLOW] * 3)),
        ),
        (
            ValueError,
            "forward, backward",
            "broadcast",
            "forward (2,), backward (3,)",
            lambda: consistency(np.stack([FLOW] * 2), np.stack([FLOW] * 3)),
        ),
        (ValueError, "second", "no empty axis", "(0, 6, 2)", lambda: compose(FLOW, FLOW[:0])),
        (ValueError, "backward", "no empty", "(5, 0, 2)", lambda: consistency(FLOW, FLOW[:, :0])),
        (TypeError, "forward_mode", "True or False", "1", lambda: invert(FLOW, forward_mode=1)),
        (TypeError, "forward_mode", "True or F", "2", lambda: compose(FLOW, FLOW, forward_mode=2)),
        (ValueError, "flow", "(*batch, H, W, 2)", "(3, 4, 5, 3)", lambda: to_rgb(VOLUME)),
        (ValueError, "flow", "(*batch, H, W, 2)", "(2, 6, 5)", lambda: to_rgb(FLOW.T)),
        (ValueError, "max_length", "finite number > 0", "0.0", lambda: to_rgb(FLOW, max_length=0)),
        (ValueError, "max_length", "> 0", "-1.0", lambda: to_rgb(FLOW, max_length=-1)),
        (ValueError, "max_length", "> 0", "inf", lambda: to_rgb(FLOW, max_length=np.inf)),
        (ValueError, "max_length", "> 0", "nan", lambda: to_rgb(FLOW, max_length=np.nan)),
        (TypeError, "max_length", "float", "str", lambda: to_rgb(FLOW, max_length="2")),
    ],
)
def test_errors(error, argument, expected, received, call):
    pattern = (
        f"^{re.escape(argument)}: expected .*{re.escape(expected)}"
        f".*, got .*{re.escape(received)}.*; .+"
    )
    with pytest.raises(error, match=pattern):
        jax.jit(call)()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_signatures(name):
    positional, options = FUNCTIONS[name]
    parameters = inspect.signature(getattr(jaxwarp.flow, name)).parameters.values()
    required = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    keywords = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
    assert (tuple(required), keywords) == (positional, options)


def test_public_names():
    assert sorted(jaxwarp.flow.__all__) == sorted(FUNCTIONS)
