"""The reference against oracles that share no code with it: SciPy, PyTorch, double loops in NumPy.

Everything else in this folder is compared with the reference, so this is where the tests stand.
"""

import itertools
from functools import partial

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from jaxwarp import reference

# Both sides compute in float64, in another order of operations; a few additions of numbers near 1.
ROUNDING = 1e-12


def call(op, *arrays, **options):
    """One operation of the reference, compiled as a whole: op by op it is slow."""
    return jax.jit(lambda *arrays: getattr(reference, op)(*arrays, **options))(*arrays)


# ---------------------------------------------------------------------------------------- SciPy


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("boundary", cases.BOUNDARIES)
@pytest.mark.parametrize("method", ["nearest", "linear"])
def test_gather_is_scipy_map_coordinates(method, boundary, dims):
    ndimage = pytest.importorskip("scipy.ndimage")
    rng, shape = np.random.default_rng(0), cases.SHAPES[dims]
    image = rng.standard_normal((*shape, 2))
    # No ties of "nearest" here: SciPy rounds them up, and this package to even.
    points = rng.uniform(-2, 3, (200, dims)) * shape[::-1]
    out = call("gather", image, points, method=method, boundary=boundary, fill_value=0.7)
    mode = {"constant": "grid-constant", "wrap": "grid-wrap"}.get(boundary, boundary)
    order = {"nearest": 0, "linear": 1}[method]
    for c in range(image.shape[-1]):
        expected = ndimage.map_coordinates(
            image[..., c], points.T[::-1], order=order, mode=mode, cval=0.7, prefilter=False
        )
        np.testing.assert_allclose(out[:, c], expected, rtol=0, atol=ROUNDING)


def test_nearest_takes_ties_to_even():
    image = np.arange(6.0)[None, :, None]
    points = np.stack([np.arange(0.5, 5), np.zeros(5)], axis=-1)
    np.testing.assert_array_equal(
        call("gather", image, points, method="nearest")[:, 0], [0, 2, 2, 4, 4]
    )


NUMPY_MODES = {"nearest": "edge", "mirror": "reflect", "reflect": "symmetric", "wrap": "wrap"}


@pytest.mark.parametrize("method", ["linear", "cubic"])
def test_a_boundary_for_each_axis_is_an_image_padded_along_each(method):
    rng, beyond = np.random.default_rng(0), 9
    image, ct = rng.standard_normal((5, 6, 2)), rng.standard_normal((60, 2))
    points = rng.uniform(-6, 12, (60, 2))

    @partial(jax.jit, static_argnums=0)
    def sampled(boundary, image, points):
        options = {"method": method, "boundary": boundary, "fill_value": 0.7}
        out, pull = jax.vjp(lambda i, p: reference.gather(i, p, **options), image, points)
        return out, pull(ct)[1]

    for boundary in itertools.product(cases.BOUNDARIES, repeat=2):
        padded = image
        for axis, along in enumerate(boundary[::-1]):
            pad = [(0, 0)] * 3
            pad[axis] = (beyond, beyond)
            more = {"constant_values": 0.7} if along == "constant" else {}
            padded = np.pad(padded, pad, NUMPY_MODES.get(along, "constant"), **more)

        out, ct_points = sampled(boundary, image, points)
        expected, expected_ct = sampled("constant", padded, points + beyond)  # which are all inside
        np.testing.assert_allclose(out, expected, rtol=0, atol=ROUNDING)
        np.testing.assert_allclose(ct_points, expected_ct, rtol=0, atol=1e-11)


def test_an_infinite_coordinate_asks_the_boundary_of_its_axis():
    points = [[np.inf, 1], [1, -np.inf], [np.inf, np.inf], [np.nan, 1], [1, np.nan]]
    image = np.ones((2, 3, 1))
    for derivative, far in (((0, 0), 0.5), ((0, 1), 0)):
        options = {"boundary": ("wrap", "constant"), "fill_value": 0.5, "derivative": derivative}
        out = call("gather", image, np.array(points), **options)[:, 0]
        np.testing.assert_array_equal(out, [np.nan, far, np.nan, np.nan, np.nan])


# -------------------------------------------------------------------------------------- PyTorch

# boundary -> padding_mode and align_corners of grid_sample. In pixels the latter decides only what
# a reflection is taken about: pixel centres (mirror) or pixel edges (reflect). "wrap" has no peer.
TORCH = {
    "constant": ("zeros", True),
    "nearest": ("border", True),
    "mirror": ("reflection", True),
    "reflect": ("reflection", False),
}


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("boundary", TORCH)
@pytest.mark.parametrize("method", ["nearest", "linear"])
def test_gather_and_its_gradients_are_torch_grid_sample(method, boundary, dims):
    torch = pytest.importorskip("torch")
    padding_mode, align_corners = TORCH[boundary]
    rng, shape = np.random.default_rng(1), cases.SHAPES[dims]
    image = rng.standard_normal((*shape, 3))
    points = rng.uniform(-1, 2, (100, dims)) * shape[::-1]
    ct = rng.standard_normal((100, 3))

    def gather_and_vjp(image, points, ct):
        out, vjp = jax.vjp(
            lambda i, p: reference.gather(i, p, method=method, boundary=boundary), image, points
        )
        return out, *vjp(ct)

    size = torch.tensor(shape[::-1])
    torch_image = torch.tensor(image, requires_grad=True)
    torch_points = torch.tensor(points, requires_grad=True)
    normalised = (
        2 * torch_points / (size - 1) - 1 if align_corners else (2 * torch_points + 1) / size - 1
    )
    out = torch.nn.functional.grid_sample(
        torch_image.movedim(-1, 0)[None],
        normalised.reshape(1, *(1,) * (dims - 1), 100, dims),
        mode={"nearest": "nearest", "linear": "bilinear"}[method],
        padding_mode=padding_mode,
        align_corners=align_corners,
    )
    out = out.reshape(3, 100).T
    out.backward(torch.tensor(ct))
    expected = (out.detach(), torch_image.grad, torch_points.grad)
    # The way to normalised coordinates and back costs rounding of its own.
    cases.assert_close(jax.jit(gather_and_vjp)(image, points, ct), expected, 1e-10)


@pytest.mark.parametrize("weighted", [False, True])
def test_average_and_its_gradients_are_those_of_torch_index_add(weighted):
    torch = pytest.importorskip("torch")
    case = cases.Case("forward_warp", 2, {}, weighted=True)
    arrays = case.inputs("random")
    if not weighted:
        arrays = (*arrays[:2], np.ones(case.shape))
    height, width = case.shape
    ct = np.random.default_rng(2).standard_normal(arrays[0].shape)

    def warp_and_vjp(values, flow, w, ct):
        def warp(values, flow, w):
            return reference.forward_warp(values, flow, importance=w if weighted else None)

        out, vjp = jax.vjp(warp, values, flow, w)
        return out, *vjp(ct)

    values, flow, w = (torch.tensor(a, requires_grad=True) for a in arrays)
    x, y = (torch.tensor(cases.grid(case.shape)) + flow).unbind(-1)
    sums = torch.zeros(height * width, 4, dtype=torch.float64)
    for i, j in itertools.product((0, 1), repeat=2):
        column, row = x.detach().floor() + i, y.detach().floor() + j
        # Not 1 - |x - column|: at its kink PyTorch's derivative is not the right-hand one.
        g = (x - column + 1 if i else column + 1 - x) * (y - row + 1 if j else row + 1 - y)
        inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
        moved = (w * g)[..., None] * torch.cat([values, torch.ones_like(values[..., :1])], -1)
        sums = sums.index_add(0, (row * width + column)[inside].long(), moved[inside])
    hole = sums[:, 3:] == 0
    out = torch.where(hole, 0.0, sums[:, :3] / torch.where(hole, 1.0, sums[:, 3:]))
    out = out.reshape(height, width, 3)
    out.backward(torch.tensor(ct))
    expected = (out.detach(), values.grad, flow.grad, w.grad)
    actual = jax.jit(warp_and_vjp)(*arrays, ct)
    if not weighted:
        actual, expected = actual[:3], expected[:3]
    # The least denominator is 1/64^2; it magnifies the rounding of the gradient by as much.
    cases.assert_close(actual, expected, 64**2 * ROUNDING)


# ---------------------------------------------------------------------------------- double loops


def kernel(method, u):
    """The weight of a pixel at distance u = p - j along one axis, as a function on the line."""
    a = abs(u)
    if method == "nearest":
        return float(a < 0.5)  # no ties are drawn
    if method == "linear":
        return max(0.0, 1 - a)
    if a < 1:  # Keys (1981), a = -1/2
        return 1.5 * a**3 - 2.5 * a**2 + 1
    return -0.5 * a**3 + 2.5 * a**2 - 4 * a + 2 if a < 2 else 0.0


def weights(method, boundary, points, shape):
    """The dense matrix of eq. (1): (points, pixels). Pixel indices outside come from numpy.pad."""
    reach = 12
    matrix = np.zeros((len(points), *shape))
    modes = {"nearest": "edge", "mirror": "reflect", "reflect": "symmetric", "wrap": "wrap"}
    lookup = [
        np.pad(np.arange(n), reach, constant_values=-1)
        if boundary == "constant"
        else np.pad(np.arange(n), reach, mode=modes[boundary])
        for n in shape
    ]
    for i, point in enumerate(points):
        for place in itertools.product(*(range(n + 2 * reach) for n in shape)):
            j = tuple(pixel[at] for pixel, at in zip(lookup, place, strict=True))
            if min(j) >= 0:
                distances = point[::-1] - (np.array(place) - reach)
                if np.abs(distances).max() < 2:
                    matrix[(i, *j)] += np.prod([kernel(method, u) for u in distances])
    return matrix.reshape(len(points), -1)


@pytest.mark.parametrize(("dims", "boundary"), [*((2, b) for b in cases.BOUNDARIES), (3, "mirror")])
@pytest.mark.parametrize("method", cases.METHODS)
def test_gather_and_splat_are_a_dense_matrix_and_its_transpose(method, boundary, dims):
    rng, shape = np.random.default_rng(3), cases.SHAPES[dims]
    points = rng.uniform(-8, 8, (12, dims)) + np.array(shape[::-1]) / 2
    image, values = rng.standard_normal((*shape, 2)), rng.standard_normal((12, 2))
    matrix = weights(method, boundary, points, shape)
    gathered = call("gather", image, points, method=method, boundary=boundary)
    splatted = call("splat", values, points, shape=shape, method=method, boundary=boundary)
    cases.assert_close(gathered, matrix @ image.reshape(-1, 2), ROUNDING)
    cases.assert_close(splatted, (matrix.T @ values).reshape(*shape, 2), ROUNDING)


@pytest.mark.parametrize("boundary", cases.BOUNDARIES)
@pytest.mark.parametrize(
    ("reduce", "method"), [*(("average", m) for m in cases.AVERAGING), ("sum", "cubic")]
)
def test_forward_warp_is_the_ratio_of_two_dense_products(reduce, method, boundary):
    rng, shape = np.random.default_rng(4), cases.SHAPES[2]
    flow = rng.uniform(-4, 4, (*shape, 2))
    values, w = rng.standard_normal((*shape, 2)), rng.uniform(0, 2, shape)
    options = {"fill_value": -3.0, "min_coverage": 0.1} if reduce == "average" else {}
    out, coverage = call(
        "forward_warp",
        values,
        flow,
        importance=w,
        reduce=reduce,
        method=method,
        boundary=boundary,
        return_coverage=True,
        **options,
    )
    matrix = weights(method, boundary, (cases.grid(shape) + flow).reshape(-1, 2), shape)
    g = matrix.sum(0)
    numerator, denominator = matrix.T @ (w[..., None] * values).reshape(-1, 2), matrix.T @ w.ravel()
    expected = numerator
    if reduce == "average":
        assert (g <= 0.1).any() or boundary != "constant"  # there are holes to fill
        denominator = np.where(g > 0.1, denominator, np.nan)
        expected = np.nan_to_num(numerator / denominator[:, None], nan=-3.0)
    cases.assert_close(out, expected.reshape(*shape, 2), 1e-11)  # denominators down to 0.1
    cases.assert_close(coverage, g.reshape(shape), ROUNDING)


# ----------------------------------------------------------------------------------- derivatives


@pytest.mark.parametrize(("dims", "axis"), [(2, 0), (2, 1), (3, 2)])
@pytest.mark.parametrize(("method", "degree"), [("nearest", 0), ("linear", 1), ("cubic", 3)])
@pytest.mark.parametrize("op", ["gather", "splat"])
def test_each_order_is_the_finite_difference_of_the_one_below(op, method, degree, dims, axis):
    rng, step = np.random.default_rng(5), 1e-4
    case = cases.Case(op, dims, {"method": method, "boundary": "wrap"})
    first, points = case.inputs("random")
    points = np.floor(points) + rng.uniform(0.1, 0.4, points.shape)  # no kink within a step
    shift = step * np.eye(dims)[axis]
    here, *beside = [
        jax.jit(jax.vmap(case.function(reference, derivative=tuple(order)), (None, 0)))(
            first, points + np.array([0, 1, -1])[:, None, None] * shift
        )
        for order in np.arange(degree + 2)[:, None] * np.eye(dims, dtype=int)[axis]
    ]
    for above in beside:
        # Polynomials of degree 3: the truncation is step^2 f^(3) / 6, the rounding eps / step.
        cases.assert_close(above[0], (here[1] - here[2]) / (2 * step), 1e-7)
        here = above
    assert not np.any(above[0])  # past the degree of the polynomials


@pytest.mark.parametrize("case", cases.FEW, ids=str)
def test_gradients_are_finite_differences(case):
    arrays = case.inputs("random")
    offset = np.random.default_rng(6).uniform(0.002, 0.01, arrays[1].shape)  # 1/64 is 0.0156
    arrays = (arrays[0], arrays[1] + offset, *arrays[2:])
    # A step of 1e-6 stays within the cell of every point; truncation and rounding are near 1e-9,
    # which a denominator of down to 0.002^2 magnifies.
    check_grads(jax.jit(case.function(reference)), arrays, order=1, eps=1e-6, rtol=1e-5)


@pytest.mark.parametrize("op", ["gather", "splat"])
def test_rule_of_the_family_is_the_product_rule(op):
    # The reference states its derivative with respect to the points as a rule. Here the same
    # sum, without the rule and without its care for NaN, goes through JAX's differentiation.
    case = cases.Case(op, 2, {"method": "cubic", "boundary": "nearest"})
    first, points = case.inputs("random")
    taps = np.array([-1, 0, 1, 2])

    def plain(first, points):
        index, weight = [], []
        for a, n in ((1, 5), (0, 6)):
            base = jax.lax.stop_gradient(jnp.floor(points[:, a, None]))
            u = jnp.abs(points[:, a, None] - base - taps)
            near, far = 1.5 * u**3 - 2.5 * u**2 + 1, -0.5 * u**3 + 2.5 * u**2 - 4 * u + 2
            weight.append(jnp.where(np.abs(taps - 0.5) < 1, near, far))
            index.append(jnp.clip(base.astype(int) + taps, 0, n - 1))
        (rows, columns), g = index, weight[0][:, :, None] * weight[1][:, None, :]
        at = rows[:, :, None], columns[:, None, :]
        if op == "gather":
            return jnp.einsum("nij,nijc->nc", g, first[at])
        return jnp.zeros((5, 6, 3)).at[at].add(g[..., None] * first[:, None, None, :])

    def hessian_vector(f):
        def gradient(first, points):
            return jax.grad(lambda *a: jnp.sum(jnp.sin(f(*a))), (0, 1))(first, points)

        return jax.jit(lambda *a: (gradient(*a), jax.jvp(gradient, a, jax.tree.map(jnp.cos, a))))

    points = points + 1 / 128  # |u| has no derivative where u = 0
    cases.assert_close(
        hessian_vector(case.function(reference))(first, points),
        hessian_vector(plain)(first, points),
        1e-11,
    )


# ------------------------------------------------------------------------------------- exactness


@pytest.mark.parametrize(("method", "degree"), [("nearest", 0), ("linear", 1), ("cubic", 2)])
def test_polynomials_are_reproduced_with_their_derivatives(method, degree):
    rng = np.random.default_rng(7)
    x, y = np.moveaxis(cases.grid((8, 9)), -1, 0)
    points = rng.uniform(2, 5, (50, 2))  # every tap is inside
    for i, j in itertools.product(range(degree + 1), repeat=2):
        image = (x**i * y**j)[..., None]
        for order in range(degree + 1):
            out = call("gather", image, points, method=method, derivative=(order, 0))
            factor = np.prod(np.arange(i, i - order, -1))
            px, py = points.T
            expected = factor * px ** max(i - order, 0) * py**j
            np.testing.assert_allclose(out[:, 0], expected, rtol=1e-12, atol=1e-10)  # up to 5^4


def test_cubic_is_that_of_jax_image_resize():
    image = np.random.default_rng(8).standard_normal((12, 12, 1))
    resized = jax.image.resize(image, (24, 24, 1), method="cubic")
    points = (cases.grid((24, 24)) + 0.5) / 2 - 0.5
    out = call("gather", image, points, method="cubic")
    inner = slice(4, -4)  # at the border resize renormalises its weights
    np.testing.assert_allclose(out[inner, inner], resized[inner, inner], rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("shape", [(2, 3), (2, 3, 4), (0, 3)])
def test_pixel_grid_is_x_first(shape):
    out = reference.pixel_grid(shape, dtype=np.float64)
    assert out.dtype == np.float64
    np.testing.assert_array_equal(out, cases.grid(shape))
    assert reference.pixel_grid(shape).dtype == np.float32
