"""`reconstruct` against the dense reference, against differences and unrolled differentiation.

In float64 with a `tol` of 1e-13, so that what is compared are solutions. Three kinds of points:
those that determine every pixel, fewer points than pixels, and a mixture, in which one corner has
points to spare and the rest too few.
"""

import functools

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import skimage.data
from jax.test_util import check_grads

import jaxwarp
from jaxwarp import reference

KINDS = ("determined", "sparse", "mixed")
EXACT = {"tol": 1e-13, "max_steps": 300}
# The search stops at 1e-13 of the right-hand side, and its epsilon moves the solution by about as
# much; both grow with the inverse of the smallest eigenvalue, which is above 1e-3 for these seeds.
TOLERANCE = 1e-9


def problem(kind="determined", dims=2, dtype=np.float64, seed=4):
    """(values, points, shape). Off the kinks, around which a difference is no derivative."""
    rng = np.random.default_rng(seed)
    shape = cases.SHAPES[dims]
    count = {"determined": 150 * (dims - 1), "sparse": 9, "mixed": 24}[kind]
    points = rng.uniform(-0.4, np.array(shape[::-1]) - 0.6, (count, dims))
    if kind == "mixed":
        points[:16] = points[:16] / np.array(shape[::-1]) * 1.9
    near = np.abs(points - np.round(points)) < 0.02
    points = np.where(near, np.round(points) + 0.03, points)
    return rng.standard_normal((count, 2)).astype(dtype), points.astype(dtype), shape


def solver(module, shape, **options):
    return jax.jit(functools.partial(module.reconstruct, shape=shape, **EXACT | options))


def loss(f):
    """With derivatives of every order, and a cotangent that no samples explain."""

    def compute(*x):
        out = f(*x)
        return jnp.sum(jnp.sin(out) * jnp.cos(jnp.arange(out.size)).reshape(out.shape))

    return compute


def gradient(f):
    return jax.jit(jax.grad(loss(f), (0, 1)))


# ---------------------------------------------------------------------------- values


@pytest.mark.parametrize("dims", [2, 3])
def test_samples_back(dims):
    values, points, shape = problem("determined", dims)
    image = np.random.default_rng(1).standard_normal((*shape, 2))
    for dtype, tol, tolerance in (("float64", 1e-12, 1e-10), ("float32", 1e-6, 1e-4)):
        # Relative to |G^T f|, hence a solution to `tol` times the condition number, some 30.
        taken = jaxwarp.gather(image.astype(dtype), points)
        found = solver(jaxwarp, shape, tol=tol)(taken, points)
        assert found.dtype == dtype
        cases.assert_close(found, image, tolerance)
        cases.assert_close(jaxwarp.gather(found, points), taken, tolerance)
    # Values that no image has as samples: the residual is orthogonal to all images.
    found = solver(jaxwarp, shape)(values, points)
    residual = values - jaxwarp.gather(found, points)
    cases.assert_close(jaxwarp.splat(residual, points, shape), 0 * found, 1e-10)


@pytest.mark.parametrize("damping", [0.0, 0.1])
def test_stops_at_the_tolerance(damping, tol=1e-2):
    values, points, shape = problem("determined")
    total = jaxwarp.splat(values, points, shape)

    def length(max_steps):
        f = solver(jaxwarp, shape, damping=damping, tol=tol, max_steps=max_steps)
        x = f(values, points)
        r = total - jaxwarp.splat(jaxwarp.gather(x, points), points, shape) - damping * x
        return jnp.linalg.norm(r) / jnp.linalg.norm(total)

    lengths = [length(k) for k in (1, 2, 3, 4, 5, 6, 100)]
    last = next(k for k, found in enumerate(lengths) if found <= tol)
    assert 0 < last < 6
    np.testing.assert_array_equal(lengths[last:], lengths[last])  # and no step more


@pytest.mark.parametrize(
    ("kind", "dims", "boundary"),
    [*(("mixed", 2, b) for b in cases.BOUNDARIES), *((k, 3, "constant") for k in KINDS)],
)
def test_equals_the_reference(kind, dims, boundary):
    values, points, shape = problem(kind, dims)
    points[::7] += np.array(shape[::-1]) * 0.7  # across the border
    for damping in (0.0, 0.3):
        actual, expected = (
            solver(module, shape, boundary=boundary, damping=damping)(values, points)
            for module in (jaxwarp, reference)
        )
        cases.assert_close(actual, expected, TOLERANCE)


def test_starts_from_the_average():
    """What one step finds lies on the line from (5) along its preconditioned residual."""
    values, points, shape = problem("sparse")

    def average(values):
        total = jaxwarp.splat(values, points, shape)
        coverage = jaxwarp.splat(np.ones((len(points), 1)), points, shape)
        return jnp.where(coverage > 0, total / jnp.where(coverage > 0, coverage, 1), 0)

    start = average(values)
    direction = average(values - jaxwarp.gather(start, points))
    step = solver(jaxwarp, shape, max_steps=1)(values, points) - start
    along = jnp.vdot(step, direction) / jnp.vdot(direction, direction)
    cases.assert_close(step, along * direction, 1e-12)
    assert along > 1


def test_holes_are_zero_and_pass_no_gradient():
    values, points, shape = problem("sparse")
    coverage = jaxwarp.splat(np.ones((len(points), 1)), points, shape)[..., 0]
    assert (coverage == 0).sum() > 5
    for damping in (0.0, 0.1):
        f = solver(jaxwarp, shape, damping=damping)
        out, pull = jax.vjp(f, values, points)
        np.testing.assert_array_equal(out[coverage == 0], 0)
        in_holes = jnp.where(coverage[..., None] == 0, jnp.ones_like(out), 0)
        for ct in pull(in_holes):
            np.testing.assert_array_equal(ct, 0)


def test_damping_shrinks_the_image():
    values, points, shape = problem("mixed")
    sizes = [
        float(jnp.linalg.norm(solver(jaxwarp, shape, damping=damping)(values, points)))
        for damping in (0.0, 0.1, 10.0)
    ]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] < 0.5 * sizes[0]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_more_steps_do_no_harm(dtype):
    """A search that could go on for ever along what rounding leaves, in values and gradients."""
    values, points, shape = problem("mixed", seed=1)
    expected, gradients = (
        f(values, points) for f in (solver(reference, shape), gradient(solver(reference, shape)))
    )
    f = solver(jaxwarp, shape, tol=0.0, max_steps=500)
    values, points = values.astype(dtype), points.astype(dtype)
    # The epsilon of the search moves what is least determined by epsilon / eigenvalue (2e-3).
    tolerance = {"float32": 1e-2, "float64": TOLERANCE}[dtype]
    cases.assert_close(f(values, points), expected, tolerance)
    cases.assert_close(gradient(f)(values, points), gradients, tolerance)


def test_values_of_any_size():
    values, points, shape = problem("determined", dtype=np.float32)
    f = solver(jaxwarp, shape, tol=1e-5)
    expected = f(values, points)
    for size in (2.0**-100, 2.0**100):  # whose squares float32 does not hold
        actual = f(values * np.float32(size), points)
        cases.assert_close(actual / np.float32(size), expected, 1e-6)


@pytest.mark.parametrize("boundary", ["constant", "nearest"])  # does a far point matter or not?
def test_nonfinite_points_are_dropped(boundary):
    values, points, shape = problem("mixed")
    bad = np.array([[np.nan, 1], [2, np.inf], [-np.inf, -np.inf]])
    more = np.concatenate([points, bad])
    f = solver(jaxwarp, shape, boundary=boundary)
    compute = jax.jit(lambda *x: (f(*x), gradient(f)(*x)))
    expected, expected_ct = compute(values, points)
    for fill in (1.0, np.nan):
        given = np.concatenate([values, np.full((3, 2), fill)]), more
        found, cts = compute(*given)
        cases.assert_close(found, expected, TOLERANCE)
        cases.assert_close([ct[:-3] for ct in cts], expected_ct, TOLERANCE)
        for ct in cts:
            np.testing.assert_array_equal(ct[-3:], 0)
    cases.assert_close(solver(reference, shape, boundary=boundary)(*given), expected, TOLERANCE)


def test_nonfinite_values_are_seen():
    values, points, shape = problem("determined")
    for bad in (np.nan, np.inf):
        values[3, 1] = bad
        assert jnp.isnan(solver(jaxwarp, shape)(values, points)).all()


@pytest.mark.parametrize(
    ("dtype", "points_dtype"),
    [
        ("float16", "float32"),
        ("bfloat16", "float64"),
        ("float32", "float64"),
        ("float64", "float32"),
    ],
)
def test_dtypes(dtype, points_dtype):
    values, points, shape = problem("determined")
    # Multiples of 1/64 and values of 8 bits are the same in all dtypes.
    values, points = np.round(values * 32) / 32, np.round(points * 64) / 64
    given = values.astype(jnp.dtype(dtype)), points.astype(points_dtype)
    f = solver(jaxwarp, shape, tol=1e-6)
    exact = solver(reference, shape)(given[0].astype(np.float64), points)
    out = f(*given)
    assert out.dtype == dtype
    # A rounding of the result; and in float32 `tol` times the condition number.
    tolerance = max(1e-4, float(jnp.finfo(dtype).eps))
    cases.assert_close(out.astype(np.float64), exact, tolerance)
    assert jax.eval_shape(solver(reference, shape), *given).dtype == dtype
    cts = jax.eval_shape(gradient(f), *given)
    assert [ct.dtype for ct in cts] == [dtype, points_dtype]


@pytest.mark.parametrize(
    ("count", "channels", "shape"),
    [
        ((0,), 2, (4, 5)),
        ((7,), 0, (4, 5)),
        ((7,), 2, (0, 5)),
        ((0, 3), 2, (2, 0, 3)),
        ((7,), 2, (1, 1)),
        ((), 1, (1, 6)),
        ((2, 3), 1, (2, 3, 4)),
    ],
)
def test_sizes(count, channels, shape):
    values, points = np.ones((*count, channels)), np.full((*count, len(shape)), 0.25)
    values_of = [solver(module, shape)(values, points) for module in (jaxwarp, reference)]
    cases.assert_close(*values_of, TOLERANCE)
    assert values_of[0].shape == (*shape, channels)
    cotangents = gradient(solver(jaxwarp, shape))(values, points)
    for ct, primal in zip(cotangents, (values, points), strict=True):
        assert ct.shape == primal.shape
        assert jnp.isfinite(ct).all()


def test_sharper_than_the_average():
    """Forward-warp a photograph and return: by (5) it comes back blurred."""
    image = skimage.data.astronaut()[60:156, 180:276].astype(np.float32) / 255
    y, x = np.mgrid[: image.shape[0], : image.shape[1]].astype(np.float32)
    flow = np.stack([1.7 * np.sin(y / 17) + 0.4, 1.3 * np.cos(x / 23 + 0.02 * y)], -1)
    points = jaxwarp.pixel_grid(flow.shape[:2]) + flow
    inside = ((points >= 0) & (points <= jnp.array(image.shape[1::-1]) - 1)).all(-1)

    def psnr(there):
        error = (jaxwarp.backward_warp(there, flow) - image)[inside]
        return -10 * jnp.log10(jnp.mean(error**2))

    average = psnr(jaxwarp.forward_warp(image, flow))
    options = {"tol": 1e-5, "max_steps": 100}
    damped = psnr(solver(jaxwarp, image.shape[:2], damping=0.01, **options)(image, points))
    solved = psnr(solver(jaxwarp, image.shape[:2], **options)(image, points))
    assert average + 5 < damped < solved  # 34.2, 40.5 and 43.3 dB


# ---------------------------------------------------------------------------- derivatives


@pytest.mark.parametrize(("kind", "damping"), [*((k, 0.0) for k in KINDS), ("mixed", 0.1)])
def test_gradients_against_differences(kind, damping):
    values, points, shape = problem(kind)
    f = solver(jaxwarp, shape, damping=damping)
    # Steps of 1e-5: an error of their square, and of the rounding divided by them.
    options = {"order": 1, "atol": 1e-6, "rtol": 1e-6, "eps": 1e-5}
    check_grads(f, (values, points), modes=("rev", "fwd"), **options)


@pytest.mark.parametrize(
    ("kind", "damping"), [("determined", 0.0), ("sparse", 0.0), ("sparse", 0.1)]
)
def test_gradients_against_unrolled_differentiation(kind, damping):
    """Of SIRT, x <- x + (splat(f - gather(x)) - damping x) / (D + damping), which starts with (5)
    and ends at the same image."""
    values, points, shape = problem(kind)
    coverage = jaxwarp.splat(np.ones((len(points), 1)), points, shape)

    def unrolled(values, points):
        D = jaxwarp.splat(np.ones((len(points), 1)), points, shape) + damping
        scale = jnp.where(coverage + damping > 0, 1 / jnp.where(coverage > 0, D, damping or 1), 0)

        def step(x, _):
            r = jaxwarp.splat(values - jaxwarp.gather(x, points), points, shape) - damping * x
            return x + scale * r, None

        return jax.lax.scan(step, jnp.zeros((*shape, 2)), length=1500)[0]

    implicit = solver(jaxwarp, shape, damping=damping)
    expected = jax.jit(jax.value_and_grad(loss(unrolled), (0, 1)))(values, points)
    actual = jax.value_and_grad(loss(implicit), (0, 1))(values, points)
    cases.assert_close(actual, expected, 1e-8)


TRANSFORMATIONS = {
    "grad": lambda f, x, dx: gradient(f)(*x),
    "grad_in_values": lambda f, x, dx: jax.grad(loss(f), 0)(*x),
    "grad_in_points": lambda f, x, dx: jax.grad(loss(f), 1)(*x),
    "jvp": lambda f, x, dx: jax.jvp(f, x, dx),
    "jvp_in_values": lambda f, x, dx: jax.jvp(lambda v: f(v, x[1]), x[:1], dx[:1]),
    "jacrev": lambda f, x, dx: jax.jacrev(f, 1)(*x),
    "jacfwd": lambda f, x, dx: jax.jacfwd(f, 1)(*x),
    "jvp_of_grad": lambda f, x, dx: jax.jvp(gradient(f), x, dx),
    "grad_of_grad": lambda f, x, dx: gradient(
        lambda *x: sum(jnp.vdot(a, b) for a, b in zip(gradient(f)(*x), dx, strict=True))[None]
    )(*x),
    "checkpoint": lambda f, x, dx: gradient(jax.checkpoint(f))(*x),
    "scan": lambda f, x, dx: jax.grad(
        lambda v: jnp.sum(jnp.sin(jax.lax.scan(lambda c, k: (c, f(c * k, x[1])), v, dx[2])[1]))
    )(x[0]),
}


DAMPED = ("grad", "jvp_of_grad")


@pytest.mark.parametrize(
    ("name", "damping"), [*((n, 0.0) for n in TRANSFORMATIONS), *((n, 0.1) for n in DAMPED)]
)
def test_transformations(name, damping):
    values, points, shape = problem("mixed")
    rng = np.random.default_rng(5)
    dx = [rng.standard_normal(a.shape) for a in (values, points)]
    dx += [np.array([1.0, -0.5])] * (name == "scan")
    transform = TRANSFORMATIONS[name]
    actual, expected = (
        jax.jit(functools.partial(transform, solver(module, shape, damping=damping)))(
            (values, points), tuple(dx)
        )
        for module in (jaxwarp, reference)
    )
    cases.assert_close(actual, expected, 1e-7 if "of_grad" in name else TOLERANCE)


@pytest.mark.parametrize("name", ["grad", "jvp", "checkpoint"])
def test_disable_jit(name):
    values, points, shape = problem("mixed")
    dx = [np.random.default_rng(5).standard_normal(a.shape) for a in (values, points)]
    function = functools.partial(TRANSFORMATIONS[name], solver(jaxwarp, shape, damping=0.1))
    expected = jax.jit(function)((values, points), tuple(dx))
    with jax.disable_jit():
        actual = function((values, points), tuple(dx))
    cases.assert_close(actual, expected, TOLERANCE)


def test_points_that_coincide():
    """Their values differ, so moving them pulls at pixels that they leave open, or at holes. No
    derivative exists; the formula still gives one, and no search runs away."""
    points = np.array([[0.5, 0], [0.5, 0], [2, 1], [2, 1], [1.3, 2.2]])
    x = np.random.default_rng(0).standard_normal((5, 2)), points
    dx = tuple(np.random.default_rng(1).standard_normal((2, 5, 2)))

    def derivatives(module):
        f = solver(module, (4, 4))
        return jax.jit(lambda: (jax.jvp(f, x, dx), gradient(f)(*x)))()

    cases.assert_close(derivatives(jaxwarp), derivatives(reference), TOLERANCE)


@pytest.mark.parametrize(
    ("axes", "damping"), [((0, 0), 0.0), ((0, None), 0.0), ((None, 0), 0.0), ((0, 0), 0.1)], ids=str
)
def test_batches(axes, damping):
    """By vmap over any operand: as one by one, each with its own number of steps."""
    batch = [problem("mixed", seed=seed) for seed in (3, 4, 7)]
    shape = batch[0][2]
    stacked = [np.stack([b[i] for b in batch]) for i in range(2)]
    x = tuple(stacked[i] if axis == 0 else stacked[i][0] for i, axis in enumerate(axes))
    each = [tuple(x[i][k] if axes[i] == 0 else x[i] for i in range(2)) for k in range(3)]
    # Not to the end: it would show if the steps of one image were also those of its neighbours.
    f = solver(jaxwarp, shape, damping=damping, tol=1e-3)
    compute = jax.jit(jax.value_and_grad(loss(f), (0, 1)))
    values, gradients = zip(*(compute(*e) for e in each), strict=True)
    values = jnp.stack(values)
    gradients = [jnp.stack(g) for g in zip(*gradients, strict=True)]
    if axes == (0, 0):
        cases.assert_close(jax.vmap(compute)(*x), (values, gradients), TOLERANCE)
        return
    shared = axes.index(None)  # has the sum of their gradients
    gradients[shared] = gradients[shared].sum(0)

    @jax.jit
    @functools.partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)
    def compute_all(*x):
        found = jax.vmap(loss(f), axes)(*x)
        return found.sum(), found

    (_, actual), actual_gradients = compute_all(*x)
    cases.assert_close((actual, actual_gradients), (values, gradients), TOLERANCE)


@pytest.mark.parametrize(
    ("damping", "argnums", "count"),
    [(0.0, None, 1), (0.0, (0, 1), 4), (0.0, 0, 3), (0.1, (0, 1), 2), (0.1, 0, 2)],
)
def test_number_of_searches(damping, argnums, count):
    """Of a value, and of the value and derivatives that are asked for."""
    values, points, shape = problem("mixed")
    f = loss(solver(jaxwarp, shape, damping=damping))
    f = jax.jit(f if argnums is None else jax.value_and_grad(f, argnums))
    assert f.lower(values, points).compile().as_text().count(" while(") == count
