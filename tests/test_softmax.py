"""forward_warp with reduce="softmax": loops in NumPy, exact sums, invariances."""

import itertools
from decimal import Decimal, localcontext
from functools import partial

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads
from remembered import remembered

import jaxwarp
from jaxwarp import reference

# float64, divided by sums of weights of down to (1/64)^2, in 3-D (1/64)^3 = 4e-6.
EXACT = 1e-10
SINGLE = 1e-5

both_modules = pytest.mark.parametrize("module", [reference, jaxwarp], ids=["reference", "jaxwarp"])


def warp(module, values, flow, logits, **options):
    return module.forward_warp(values, flow, reduce="softmax", importance=logits, **options)


def warp_and_vjp(module, **options):
    def run(ct, *arrays):
        out, vjp = jax.vjp(partial(warp, module, **options), *arrays)
        return out, vjp(ct)

    return jax.jit(run)


def inputs(rng, shape=(5, 6), channels=2, kind="random", spread=3):
    """Values, flow, logits and a cotangent. The logits are multiples of 1/64."""
    flow = cases.positions(rng, kind, shape, shape) - cases.grid(shape)
    values, ct = rng.standard_normal((2, *shape, channels))
    return values, flow, np.round(rng.standard_normal(shape) * spread * 64) / 64, ct


# ------------------------------------------------------------------------------------- oracles


def axis_weights(x, n, method, boundary):
    """g and its right-hand derivative along one axis: both (positions, pixels, corners)."""
    reach = 30
    modes = {"nearest": "edge", "mirror": "reflect", "reflect": "symmetric", "wrap": "wrap"}
    where = {"mode": modes[boundary]} if boundary in modes else {"constant_values": -1}
    pixel = np.pad(np.arange(n), reach, **where)
    corners = 1 if method == "nearest" else 2
    g, dg = np.zeros((2, len(x), n, corners))
    for i, position in enumerate(x):
        base = int(np.round(position) if method == "nearest" else np.floor(position))
        t = position - base
        for k in range(corners):
            j = pixel[base + k + reach]
            if j >= 0:
                g[i, j, k] = 1 if corners == 1 else (1 - t, t)[k]
                dg[i, j, k] = 0 if corners == 1 else (-1, 1)[k]
    return g, dg


def corner_weights(flow, method="linear", boundary="constant"):
    """g (sources, targets, corners) and dg (d, sources, targets, corners), (x, y[, z]) first.

    A corner is one way to reach a target: a boundary may fold two corners onto one pixel.
    """
    shape = flow.shape[:-1]
    points = (cases.grid(shape) + flow).reshape(-1, len(shape))
    axes = [axis_weights(points[:, -1 - a], n, method, boundary) for a, n in enumerate(shape)]

    def product(differentiated):
        out = np.ones((len(points), 1, 1))
        for a, pair in enumerate(axes):
            w = pair[int(a == differentiated)]
            out = out[:, :, None, :, None] * w[:, None, :, None, :]
            out = out.reshape(len(points), out.shape[1] * out.shape[2], -1)
        return out

    dims = len(shape)
    return product(None), np.stack([product(dims - 1 - axis) for axis in range(dims)])


def softmax_by_loops(values, flow, logits, ct, fill_value=0.0, min_coverage=0.0, **options):
    """Equations (5) and (6) target by target: out, coverage and the three cotangents."""
    g, dg = corner_weights(flow, **options)
    f, l, ct = values.reshape(len(g), -1), logits.ravel(), ct.reshape(len(g), -1)
    out = np.full(f.shape, fill_value)
    ct_f, ct_p, ct_l = np.zeros(f.shape), np.zeros((len(g), len(dg))), np.zeros(len(g))
    for j in range(len(g)):
        g_j = g[:, j].sum(-1)
        if not (g_j > min_coverage).any() and not g_j.sum() > min_coverage:
            continue
        peak = max(l[i] for i in np.flatnonzero(g_j))
        with np.errstate(invalid="ignore"):
            w = np.exp(np.minimum(l - peak, 0))
        w[l == -np.inf] = 0
        w[(l == peak) & (l == np.inf)] = 1
        total = w @ g_j
        if total == 0:
            continue
        out[j] = (w * g_j) @ f / total
        pull = (f - out[j]) @ ct[j] * w / total
        ct_f += np.outer(w * g_j / total, ct[j])
        ct_l += pull * g_j
        ct_p += pull[:, None] * dg[:, :, j].sum(-1).T
    coverage = g.sum((0, 2))
    return tuple(
        a.reshape(s)
        for a, s in zip(
            (out, coverage, ct_f, ct_p, ct_l),
            (values.shape, logits.shape, values.shape, flow.shape, logits.shape),
            strict=True,
        )
    )


def softmax_exactly(values, flow, logits):
    """(5) with w = exp(logit) itself, to 60 digits: no maximum is subtracted."""
    g, _ = corner_weights(flow)
    f = values.reshape(len(g), -1)
    out = np.full(f.shape, np.nan)
    with localcontext() as context:
        context.prec = 60
        w = [Decimal(float(l)).exp() for l in logits.ravel()]
        for j in range(len(g)):
            share = [w_i * Decimal(x) for w_i, x in zip(w, g[:, j].sum(-1).tolist(), strict=True)]
            if any(share):
                for c, column in enumerate(f.T.tolist()):
                    pairs = zip(share, column, strict=True)
                    out[j, c] = float(sum(s * Decimal(x) for s, x in pairs) / sum(share))
    return out.reshape(values.shape)


@both_modules
@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("boundary", cases.BOUNDARIES)
@pytest.mark.parametrize("method", cases.AVERAGING)
def test_loops(method, boundary, dims, module):
    rng, shape = np.random.default_rng(0), {2: (5, 6), 3: (3, 4, 2)}[dims]
    options = {"method": method, "boundary": boundary}
    more = {"fill_value": -3.0, "min_coverage": 0.3}
    run = warp_and_vjp(module, **options, **more, return_coverage=True)
    holes = []
    for kind in ("inside", "random", "integer", "border"):
        *arrays, ct = inputs(rng, shape, kind=kind)
        expected = softmax_by_loops(*arrays, ct, **options, **more)
        (out, coverage), cotangents = run((ct, np.zeros(shape)), *arrays)
        cases.assert_close((out, coverage, *cotangents), expected, EXACT)
        holes.append(expected[1] <= 0.3)
    assert 0 < np.mean(holes) < 1


@both_modules
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_exact_sums_with_logits_of_any_size(dtype, module):
    rng = np.random.default_rng(1)
    run, g = jax.jit(partial(warp, module, fill_value=np.nan)), None
    for spread in (1, 30, 1e4):
        for offset in (0, 1e4, -1e4):
            values, flow, logits, _ = (
                a.astype(dtype).astype(float) for a in inputs(rng, spread=spread)
            )
            logits = (logits + offset).astype(dtype).astype(float)
            g, _ = corner_weights(flow)
            expected = softmax_exactly(values, flow, logits)
            assert np.isnan(expected).any() == (g.sum((0, 2)) == 0).any()
            out = run(*(a.astype(dtype) for a in (values, flow, logits)))
            # The logits themselves are exact; the exponent has their difference.
            cases.assert_close(out, expected, EXACT if dtype == "float64" else SINGLE)


@both_modules
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_weights_that_are_tiny_everywhere(dtype, module):
    # Source 0 reaches target (1, 1) with g = 2^-40, and (0, 1) and (1, 0) with 2^-20. Then source
    # 1 covers (0, 1), and touches (1, 1), with a logit that is lower.
    tiny = 2.0**-20
    values = np.arange(1.0, 9).reshape(2, 2, 2)
    flow = np.full((2, 2, 2), 20.0)
    flow[0, 0] = tiny, tiny
    run = jax.jit(partial(warp, module, fill_value=-1.0))
    out = run(*(a.astype(dtype) for a in (values, flow, np.zeros((2, 2)))))
    np.testing.assert_allclose(out, np.broadcast_to(values[0, 0], (2, 2, 2)), rtol=SINGLE)
    flow[0, 1] = 0, tiny
    for below in (0, 20, 30, 200, 5000):
        logits = np.array([[0.0, -below], [7.0, 9.0]])
        expected = softmax_exactly(values, flow, logits)
        assert (expected != values[0, 0]).any() == (below < 200)
        out = run(*(a.astype(dtype) for a in (values, flow, logits)))
        np.testing.assert_allclose(out, expected, rtol=1e-12 if dtype == "float64" else SINGLE)


@both_modules
@pytest.mark.parametrize(("dtype", "tiny"), [("float32", 1e-25), ("float64", 1e-200)])
def test_gradient_of_a_weight_whose_square_is_too_small_a_number(dtype, tiny, module):
    # Source 0 alone reaches pixel 1, with D = tiny: (6) has 1 / D and nowhere 1 / D^2.
    values = np.array([3.0, 5.0]).reshape(1, 2, 1).astype(dtype)
    flow = np.array([[[tiny, 0], [20, 0]]]).astype(dtype)
    ct, logits = np.array([0.0, 1]).reshape(1, 2, 1).astype(dtype), np.zeros((1, 2), dtype)
    out, (ct_values, ct_flow, ct_logits) = warp_and_vjp(module)(ct, values, flow, logits)
    eps = np.finfo(dtype).eps
    np.testing.assert_allclose(out[0, :, 0], [3, 3], rtol=4 * eps)
    np.testing.assert_allclose(ct_values[0, :, 0], [1, 0], rtol=4 * eps)
    assert np.abs(ct_flow[0, 0]).max() <= 4 * eps * 3 / tiny  # 4 eps |f| |dg| / D
    assert np.abs(ct_logits).max() <= 4 * eps * 3


# --------------------------------------------------------------------------------- invariances


@both_modules
def test_a_constant_added_to_all_logits_changes_nothing(module):
    values, flow, logits, ct = inputs(np.random.default_rng(2))
    run = warp_and_vjp(module)
    expected = run(ct, values, flow, logits)
    for shift in (1.0, -8.0, 4096.0, -(2.0**20)):
        shifted = logits + shift
        np.testing.assert_array_equal(shifted - shift, logits)
        for a, e in zip(
            *map(jax.tree.leaves, (run(ct, values, flow, shifted), expected)), strict=True
        ):
            np.testing.assert_array_equal(a, e)
    # So the gradient of the logits adds up to 0.
    assert abs(expected[1][2].sum()) < EXACT
    assert np.abs(expected[1][2]).max() > 0.1


@both_modules
@pytest.mark.parametrize("logit", [0.0, 0.5, -1e5, np.inf])
def test_equal_logits_are_an_average(logit, module):
    values, flow, logits, ct = inputs(np.random.default_rng(3))
    out, cotangents = warp_and_vjp(module)(ct, values, flow, np.full_like(logits, logit))
    expected, vjp = jax.vjp(jax.jit(reference.forward_warp), values, flow)
    cases.assert_close((out, cotangents[:2]), (expected, vjp(ct)), EXACT)


@both_modules
def test_logits_that_are_logarithms_are_an_importance(module):
    rng = np.random.default_rng(4)
    values, flow, _, ct = inputs(rng)
    w = rng.uniform(0.1, 2, flow.shape[:-1]) * (rng.random(flow.shape[:-1]) > 0.2)  # some are 0

    @jax.jit
    def average(values, flow, w):
        return reference.forward_warp(values, flow, importance=w)

    expected, vjp = jax.vjp(average, values, flow, w)
    *ct_expected, ct_w = vjp(ct)
    with np.errstate(divide="ignore"):
        out, cotangents = warp_and_vjp(module)(ct, values, flow, np.log(w))
    # On no target here is a clipped exponent, which integer positions have.
    cases.assert_close((out, cotangents), (expected, (*ct_expected, ct_w * w)), EXACT)


@both_modules
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("logit", [0.0, -300.0, 1e4])
def test_isolated_source_has_no_flow_gradient(logit, dtype, module):
    # Its value arrives whole wherever it lands, so the gradient is 0 but for rounding:
    # 4 eps |f| |dg| / g per target, with |ct| = 1.
    rng, eps = np.random.default_rng(0), np.finfo(dtype).eps
    run = warp_and_vjp(module)
    for _ in range(20):
        values = rng.standard_normal((5, 5, 1)).astype(dtype)
        flow = np.full((5, 5, 2), 100, dtype)
        flow[2, 2] = rng.uniform(-1, 1, 2)
        logits = np.full((5, 5), logit, dtype)
        out, (_, ct_flow, ct_logits) = run(np.ones((5, 5, 1), dtype), values, flow, logits)
        f = abs(float(values[2, 2, 0]))
        assert np.isclose(np.abs(out).max(), f, rtol=4 * eps)
        x, y = np.float64(flow[2, 2]) % 1
        # |dg| / g of a target is 1 / its weight along the axis.
        bound = 4 * eps * f * np.array([2 / x + 2 / (1 - x), 2 / y + 2 / (1 - y)])
        assert (np.abs(ct_flow[2, 2]) <= bound).all()
        assert abs(ct_logits[2, 2]) <= 4 * eps * 4 * f
        assert not np.delete(np.reshape(ct_flow, (25, 2)), 12, 0).any()


# --------------------------------------------------------------------------------- derivatives


def off_the_kinks(rng, arrays):
    # 1/64 is 0.0156: a step of a finite difference stays within the cell.
    values, flow, logits = arrays
    return values, flow + rng.uniform(0.002, 0.01, flow.shape), logits


@both_modules
@pytest.mark.parametrize("dims", [2, 3])
def test_finite_differences(dims, module):
    rng = np.random.default_rng(5)
    *arrays, _ = inputs(rng, cases.SHAPES[dims], spread=1)
    arrays = off_the_kinks(rng, arrays)
    f = jax.jit(lambda *a: warp(module, *a, min_coverage=0.1, forward_mode=True))
    # Truncation and rounding are near 1e-9, which a denominator magnifies.
    check_grads(f, arrays, order=1, eps=1e-6, rtol=1e-6, atol=1e-6)


@both_modules
@pytest.mark.parametrize("kind", ["inside", "random"])
def test_second_order_is_the_finite_difference_of_the_first(kind, module):
    rng, step = np.random.default_rng(6), 1e-6
    *arrays, _ = inputs(rng, kind=kind, spread=1)
    arrays = off_the_kinks(rng, arrays)
    tangents = [rng.standard_normal(a.shape) for a in arrays]

    def gradient(*a):
        loss = lambda *a: jnp.sum(jnp.sin(warp(module, *a, min_coverage=0.1)))  # noqa: E731
        return jax.grad(loss, (0, 1, 2))(*a)

    along_each = [[t if i == k else 0 * t for i, t in enumerate(tangents)] for k in range(3)]
    gradient = jax.jit(gradient)
    hvp = jax.jit(lambda a, d: jax.jvp(gradient, tuple(a), tuple(d))[1])
    for d in along_each:
        there, back = (
            gradient(*(x + s * step * t for x, t in zip(arrays, d, strict=True))) for s in (1, -1)
        )
        expected = jax.tree.map(lambda p, m: (p - m) / (2 * step), there, back)
        # Rounding of 1e-16 / step and truncation of step^2 f''', each over powers of D >= 0.1.
        cases.assert_close(hvp(arrays, d), expected, 1e-6)
    reverse = jax.jit(jax.grad(lambda *a: sum(map(jnp.vdot, gradient(*a), tangents)), (0, 1, 2)))
    cases.assert_close(reverse(*arrays), hvp(arrays, tangents), EXACT)  # it is symmetric


@both_modules
def test_hessian_of_logits_knows_that_a_weight_is_its_own_derivative(module):
    # Two sources in one place: out = sigmoid(l0 - l1), whose derivatives are known to any order;
    # at l0 = l1 too, where the maximum has a kink and no derivative of it may enter.
    values = np.array([1.0, 0.0]).reshape(1, 2, 1)
    flow = np.array([[[0.0, 0], [-1.0, 0]]])

    def out(l):
        return warp(module, values, flow, l[None])[0, 0, 0]

    def derivatives(l):
        hessian = jax.hessian(out)
        return out(l), jax.grad(out)(l), hessian(l), jax.grad(lambda l: hessian(l)[0, 0])(l)

    derivatives = jax.jit(derivatives)
    for l in ([0.3, -0.4], [0.2, 0.2], [-1.0, 2.0]):
        l = np.array(l)
        s = 1 / (1 + np.exp(l[1] - l[0]))
        first, second = s * (1 - s), s * (1 - s) * (1 - 2 * s)
        third = s * (1 - s) * (1 - 6 * s + 6 * s * s)
        signs = np.array([1, -1])
        expected = s, first * signs, second * np.outer(signs, signs), third * signs
        cases.assert_close(derivatives(l), expected, 1e-14)


@both_modules
def test_gradient_of_a_source_that_only_touches_is_bounded(module):
    # Source 0 stays at pixel 0 and touches pixel 1 with g = 0: there its exponent of 50 is clipped.
    values = np.array([3.0, 5.0]).reshape(1, 2, 1)
    ct = np.array([0.0, 1.0]).reshape(1, 2, 1)
    run = warp_and_vjp(module)
    for logit, weight in ((50.0, 1), (2.0, 1), (-2.0, np.exp(-2.0)), (-np.inf, 0)):
        out, (ct_values, ct_flow, ct_logits) = run(
            ct, values, np.zeros((1, 2, 2)), np.array([[logit, 0.0]])
        )
        np.testing.assert_array_equal(out[0, 1], values[0, 1])
        np.testing.assert_array_equal(ct_values[0, :, 0], [0, 1])
        np.testing.assert_allclose(ct_flow[0, 0], [(3 - 5) * weight, 0], rtol=1e-14)
        np.testing.assert_array_equal(ct_logits, [[0, 0]])


# ---------------------------------------------------------------------------------- the edges


@both_modules
def test_logits_that_are_not_finite(module):
    # Three sources land on pixel 0, the fourth alone on pixel 2; 1 and 3 are left empty.
    values = np.array([1.0, 2, 4, 8]).reshape(1, 4, 1)
    flow = np.zeros((1, 4, 2))
    flow[0, :, 0] = 0, -1, -2, -1
    ct = np.array([1.0, 10, 100, 1000]).reshape(1, 4, 1)
    run = warp_and_vjp(module, fill_value=-7.0)
    inf, nan = np.inf, np.nan
    e = np.exp(1.0)
    for logits, at_0, at_2, shares in (
        ([0, 0, 0, 0], 7 / 3, 8, [1 / 3, 1 / 3, 1 / 3]),
        ([-inf, 0, 1, -inf], (2 + 4 * e) / (1 + e), -7, [0, 1 / (1 + e), e / (1 + e)]),
        ([-inf, -inf, -inf, 0], -7, 8, [0, 0, 0]),
        ([inf, 0, 5, inf], 1, 8, [1, 0, 0]),
        ([inf, -inf, inf, 5], 2.5, 8, [0.5, 0, 0.5]),
        ([inf, inf, inf, inf], 7 / 3, 8, [1 / 3, 1 / 3, 1 / 3]),
        ([nan, 0, 1, 0], nan, 8, None),
        ([0, 1, 2, nan], (1 + 2 * e + 4 * e * e) / (1 + e + e * e), nan, None),
        ([nan, inf, -inf, -inf], nan, -7, None),
    ):
        logits = np.array([logits], float)
        out, cotangents = run(ct, values, flow, logits)
        np.testing.assert_allclose(out[0, :, 0], [at_0, -7, at_2, -7], rtol=1e-14)
        if shares is None:
            continue
        ct_values, ct_flow, ct_logits = cotangents
        if np.isneginf(logits[0, 3]):
            assert not ct_values[0, 3].any()
            assert not ct_flow[0, 3].any()
        np.testing.assert_allclose(ct_values[0, :3, 0], shares, rtol=1e-14, atol=0)
        pull = np.array(shares) * (values[0, :3, 0] - at_0)
        np.testing.assert_allclose(ct_logits[0, :3], pull, rtol=1e-12, atol=1e-14)
        # A step along x or y takes from the weight at pixel 0; pixel 1 has no cotangent.
        for along in ct_flow[0, :3].T:
            np.testing.assert_allclose(along, -pull, rtol=1e-12, atol=1e-14)


@both_modules
def test_nan_logit_reaches_only_what_it_touches(module):
    values, flow, logits, _ = inputs(np.random.default_rng(7))
    run = jax.jit(partial(warp, module))
    clean = np.asarray(run(values, flow, logits))
    g, _ = corner_weights(flow)
    source = np.flatnonzero(g.sum((1, 2)) == 1)[0]  # all of it inside
    logits.ravel()[source] = np.nan
    touched = (g[source].sum(-1) > 0).reshape(logits.shape)
    out = np.asarray(run(values, flow, logits))
    assert 0 < touched.sum() < touched.size
    np.testing.assert_array_equal(np.isnan(out), np.broadcast_to(touched[..., None], out.shape))
    np.testing.assert_array_equal(out[~touched], clean[~touched])
    # On a pixel it weighs its neighbours with 0, and they do not see it.
    flow[:] = 0
    out = np.asarray(run(values, flow, logits)).reshape(-1, 2)
    expected = values.reshape(-1, 2).copy()
    expected[source] = np.nan
    np.testing.assert_array_equal(out, expected)
    primals = values, flow, logits
    tangents = np.ones_like(values), np.zeros_like(flow), np.ones_like(logits)
    d_out = jax.jvp(partial(warp, module, forward_mode=True), primals, tangents)[1].reshape(-1, 2)
    # The tangent sees it where the weight would change, too, but not across the corner.
    slopes = [source, source + 1, source + logits.shape[1]]
    np.testing.assert_allclose(np.delete(d_out, slopes, axis=0), 1, rtol=1e-14)


@pytest.mark.parametrize("shape", [(6, 70), (4, 5, 9)])
def test_whole_displacements_and_logits_of_any_size(shape):
    """Zero weights beside targets of any logit, or of none: the loop for plain points has both."""
    values, _, logits, ct = inputs(np.random.default_rng(13), shape, channels=3, spread=300)
    rng = np.random.default_rng(14)
    flow = rng.integers(-2, 3, (*shape, len(shape))).astype(float)
    for actual, expected in zip(
        jax.tree.leaves(warp_and_vjp(jaxwarp)(ct, values, flow, logits)),
        jax.tree.leaves(remembered(warp_and_vjp(reference), ct, values, flow, logits)),
        strict=True,
    ):
        np.testing.assert_allclose(actual, expected, rtol=1e-12, atol=1e-12)
    logits[rng.random(shape) < 0.3] = -np.inf
    logits[rng.random(shape) < 0.1] = np.inf
    actual = warp(jaxwarp, values, flow, logits)
    np.testing.assert_allclose(actual, warp(reference, values, flow, logits), rtol=1e-12)


@both_modules
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_source_with_a_logit_of_minus_infinity_is_not_read(bad, module):
    values, flow, logits, ct = inputs(np.random.default_rng(8))
    logits[1:3] = -np.inf
    run = warp_and_vjp(module, return_coverage=True)
    ct = (ct, np.zeros_like(logits))
    expected = run(ct, values, flow, logits)
    values[1:3] = bad
    cases.assert_close(run(ct, values, flow, logits), expected, 0)
    for cotangent in expected[1]:
        assert not cotangent[1:3].any()
    # The coverage does not know of logits.
    cases.assert_close(expected[0][1], corner_weights(flow)[0].sum((0, 2)).reshape(5, 6), 1e-12)


@both_modules
def test_sources_at_positions_that_are_not_finite_are_dropped(module):
    rng = np.random.default_rng(9)
    values, flow, logits, ct = inputs(rng)
    run = warp_and_vjp(module)
    dropped = rng.random(logits.shape) < 0.3
    expected = run(ct, values, np.where(dropped[..., None], 100, flow), logits)
    for bad in (np.nan, np.inf, -np.inf):
        axis = rng.integers(2, size=logits.shape)[..., None] == np.arange(2)
        moved = np.where(dropped[..., None] & axis, bad, flow)
        # Nor does its logit count, or its value.
        out, cotangents = run(
            ct,
            np.where(dropped[..., None], np.nan, values),
            moved,
            np.where(dropped, rng.choice([1e9, np.inf, np.nan], logits.shape), logits),
        )
        cases.assert_close((out, cotangents), expected, 1e-14)
        for cotangent in cotangents:
            assert not cotangent[dropped].any()


@both_modules
def test_holes_pass_no_gradient(module):
    values, flow, logits, ct = inputs(np.random.default_rng(10))
    options = {"fill_value": 3.0, "min_coverage": 0.5}
    _, coverage, *_ = softmax_by_loops(values, flow, logits, ct)
    hole = coverage <= 0.5
    assert hole.any()
    assert not hole.all()
    run = warp_and_vjp(module, **options)
    out, clean = run(np.where(hole[..., None], 0, ct), values, flow, logits)
    np.testing.assert_array_equal(out[hole], np.full_like(out[hole], 3))
    _, dirty = run(np.where(hole[..., None], np.inf, ct), values, flow, logits)
    cases.assert_close(dirty, clean, 0)
    _, none = run(ct, values, flow, np.full_like(logits, -np.inf))
    assert not any(c.any() for c in none)


@both_modules
def test_nan_logit_in_a_hole_leaves_the_gradients_of_others(module):
    # Sources 0 (on pixels 0 and 1) and 3 (on 1 and 2) meet in pixel 1, which is a hole.
    values, flow = np.arange(1.0, 5).reshape(1, 4, 1), np.full((1, 4, 2), 20.0)
    flow[0, 0], flow[0, 3] = (0.25, 0), (-1.25, 0)
    logits, ct = np.array([[2.0, 0, 0, np.nan]]), np.ones((1, 4, 1))
    run = warp_and_vjp(module, min_coverage=0.6, fill_value=-1.0)
    out, cotangents = run(ct, values, flow, logits)
    np.testing.assert_allclose(out[0, :, 0], [1, -1, np.nan, -1], rtol=1e-14)
    np.testing.assert_allclose(np.concatenate([c[0, 0].ravel() for c in cotangents]), [1, 0, 0, 0])


@both_modules
def test_leading_axes_broadcast_as_vmap(module):
    rng = np.random.default_rng(11)
    values, logits = rng.standard_normal((3, 1, 4, 5, 2)), rng.standard_normal((2, 4, 5))
    flow = rng.integers(-192, 192, (4, 5, 2)) / 64
    both = jax.jit(partial(warp, module, return_coverage=True))(values, flow, logits)
    assert both[0].shape == (3, 2, 4, 5, 2)
    assert both[1].shape == (3, 2, 4, 5)
    for i, j in np.ndindex(3, 2):
        out, coverage, *_ = softmax_by_loops(values[i, 0], flow, logits[j], values[i, 0])
        cases.assert_close((both[0][i, j], both[1][i, j]), (out, coverage), EXACT)
    inner = jax.vmap(partial(warp, module, return_coverage=True), (None, None, 0))
    mapped = jax.jit(jax.vmap(inner, (0, None, None)))(values[:, 0], flow, logits)
    cases.assert_close(mapped, both, EXACT)


@pytest.mark.parametrize(
    ("module", "dtype", "logit_dtype"),
    [
        *((jaxwarp, *pair) for pair in itertools.product(cases.DTYPES, repeat=2)),
        *((reference, *pair) for pair in zip(cases.DTYPES, cases.DTYPES[::-1], strict=True)),
    ],
)
def test_dtypes_mix(module, dtype, logit_dtype):
    values, flow, logits, ct = inputs(np.random.default_rng(12))
    arrays = (values.astype(jnp.dtype(dtype)), flow, logits.astype(jnp.dtype(logit_dtype)))
    ct = ct.astype(arrays[0].dtype)
    out, cotangents = warp_and_vjp(module, min_coverage=0.05)(ct, *arrays)
    assert [a.dtype for a in (out, *cotangents)] == [a.dtype for a in (arrays[0], *arrays)]
    wide = [np.asarray(a, np.float64) for a in (*arrays, ct)]
    expected = softmax_by_loops(*wide, min_coverage=0.05)
    for a, e in zip((out, *cotangents), (expected[0], *expected[2:]), strict=True):
        # Accumulated in float32 at least, rounded once to the dtype of the array.
        half_ulp = float(jnp.finfo(a.dtype).eps) / 2
        atol = SINGLE * np.abs(e).max() if dtype != "float64" else 1e-9
        np.testing.assert_allclose(np.asarray(a, np.float64), e, rtol=half_ulp, atol=atol)


# ---------------------------------------------------------------------------------- the package


def test_logits_are_needed():
    values, flow = np.ones((2, 3, 4, 1)), np.zeros((3, 4, 2))
    with pytest.raises(ValueError, match=r"^importance: expected .*softmax.*, got None; .*"):
        jaxwarp.forward_warp(values, flow, reduce="softmax")
    with pytest.raises(ValueError, match=r"^method: expected .*reduce='softmax', got 'cubic'; .*"):
        warp(jaxwarp, values, flow, np.ones((3, 4)), method="cubic")
