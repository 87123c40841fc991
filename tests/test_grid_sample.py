"""grid_sample against PyTorch, the package against the reference, and the two coordinates."""

import functools
import itertools
import re

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads
from remembered import remembered
from test_hlo import NAMES, calls, compiled, cotangents, made, optimised  # noqa: F401

import jaxwarp
from jaxwarp import reference

SHAPES = cases.GRID_SHAPES
OPTIONS = [case.options for case in cases.GRID_SAMPLE if case.dims == 2]

# float64: a few products of numbers near 1; a gradient carries a factor of up to 9/2 besides.
EXACT = 1e-12
SINGLE = 1e-5

both_modules = pytest.mark.parametrize("module", [reference, jaxwarp], ids=["reference", "jaxwarp"])
every_option = pytest.mark.parametrize(
    "options", OPTIONS, ids=lambda o: "-".join(map(str, o.values()))
)
both_dims = pytest.mark.parametrize("dims", [2, 3])


def sample(module, options):
    return jax.jit(lambda input, grid: module.grid_sample(input, grid, **options))


def sample_and_vjp(module, options):
    return _sample_and_vjp(module, tuple(options.items()))


@functools.cache  # compiled once for all tests
def _sample_and_vjp(module, options):
    def run(input, grid, ct):
        out, vjp = jax.vjp(lambda i, g: module.grid_sample(i, g, **dict(options)), input, grid)
        return out, *vjp(ct)

    return jax.jit(run)


def kinks(rng, shape, count=80):
    """Positions on pixels, half-way between them and on the edges of the image, in pixels."""
    far = [rng.integers(-5 * n, 7 * n, count) / 2 for n in shape[::-1]]
    near = [rng.choice([-1, -0.5, 0, 0.5, n - 1.5, n - 1, n - 0.5, n], count) for n in shape[::-1]]
    return np.concatenate([np.stack(far, -1), np.stack(near, -1)])


def inputs(rng, points, shape, align_corners, channels=2):
    """Batches of one, in PyTorch's layout: input (1, C, *shape), grid (1, 1.., N, d), ct."""
    grid = cases.normalized(points, shape, align_corners)
    grid = grid.reshape(1, *(1,) * (len(shape) - 1), *grid.shape)
    input = rng.standard_normal((1, channels, *shape))
    return input, grid, rng.standard_normal((1, channels, *grid.shape[1:-1]))


# -------------------------------------------------------------------------------------- PyTorch


def torch_grid_sample(input, grid, mode, **options):
    """PyTorch's. In 5-D its newest bicubic, as 4-D ones: along x and y, and then along z."""
    from torch.nn.functional import grid_sample

    if mode != "bicubic" or input.ndim == 4:
        return grid_sample(input, grid, mode=mode, **options)
    options["mode"] = mode
    slices, points = input[0].flatten(0, 1)[None], grid[0, 0]
    at_xy = grid_sample(slices, points[None, ..., :2], **options)[0, :, 0]
    columns = at_xy.unflatten(0, input.shape[1:3]).movedim(-1, 0)[..., None]  # (N, C, D, 1)
    z = points[0, :, None, None, 2:]
    along_z = grid_sample(columns, z * z.new_tensor([0.0, 1.0]), **options)[..., 0, 0]
    return along_z.T[None, :, None, None]


def torch_results(torch, input, grid, ct, options):
    input, grid = (torch.tensor(a, requires_grad=True) for a in (input, grid))
    out = torch_grid_sample(input, grid, **options)
    out.backward(torch.tensor(ct))
    return out.detach(), input.grad, grid.grad


@both_modules
@both_dims
@every_option
def test_values_and_gradients_are_torchs(options, dims, module):
    torch = pytest.importorskip("torch")
    rng, align = np.random.default_rng(0), options["align_corners"]
    shape = SHAPES[dims, align]
    smooth = rng.uniform(-3, 4, (80, dims)) * shape[::-1]
    far = rng.uniform(-1e6, 1e6, (10, dims))
    at_kinks = kinks(rng, shape)
    points = np.concatenate([smooth, far, at_kinks])
    input, grid, ct = inputs(rng, points, shape, align)
    out, ct_input, ct_grid = sample_and_vjp(module, options)(input, grid, ct)
    expected, ct_input_expected, ct_grid_expected = torch_results(torch, input, grid, ct, options)
    # A position of 1e6 has 1e-10 left of a pixel.
    at_far = slice(len(smooth), len(smooth) + len(far))
    cases.assert_close(out[..., at_far], expected[..., at_far], 1e-8)
    cases.assert_close(ct_grid[..., at_far, :], ct_grid_expected[..., at_far, :], 1e-8)
    cases.assert_close(ct_input, ct_input_expected, 1e-8)
    others = np.r_[: len(smooth), len(smooth) + len(far) : len(points)]
    cases.assert_close(out[..., others], expected[..., others], EXACT)
    if options["mode"] != "bilinear":  # without kinks in the value between two ties
        cases.assert_close(ct_grid[..., others, :], ct_grid_expected[..., others, :], EXACT)
        return
    n = len(smooth)
    cases.assert_close(ct_grid[..., :n, :], ct_grid_expected[..., :n, :], EXACT)
    # At its kinks PyTorch's derivative is the one or the other or 0, and here the right-hand one:
    # within a cell the value is linear, so that a difference of PyTorch's values is exact.
    step = 1 / 64
    for axis in range(dims):
        moved = cases.normalized(points + step * np.eye(dims)[axis], shape, align).reshape(
            grid.shape
        )
        there = torch_grid_sample(torch.tensor(input), torch.tensor(moved), **options)
        slope = (there - expected) / (moved - grid)[..., -1, axis].item()
        slope = (slope.numpy() * ct).sum(1)[..., -len(at_kinks) :]
        cases.assert_close(ct_grid[..., -len(at_kinks) :, axis], slope, 64 * EXACT)


SMALL = [(1, 5), (1, 4, 1), (1, 1, 1)]


@both_modules
@pytest.mark.parametrize("shape", SMALL, ids=str)
def test_small_images_are_torchs(shape, module):
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(1)
    for options in OPTIONS:
        align = options["align_corners"]
        # Positions in half pixels are exact for sizes 1 and 4 (False), 1 and 5 (True).
        points = np.concatenate([kinks(rng, shape, 20), rng.uniform(-9, 9, (20, len(shape)))])
        if options["mode"] == "nearest" and max(shape) == (4 if align else 5):
            points = points[-20:]  # ties are not where they are meant to be
        input, grid, ct = inputs(rng, points, shape, align)
        actual = sample_and_vjp(module, options)(input, grid, ct)
        expected = torch_results(torch, input, grid, ct, options)
        cases.assert_close(actual[:2], expected[:2], EXACT)
        smooth = slice(-20, None) if options["mode"] == "bilinear" else slice(None)
        cases.assert_close(actual[2][..., smooth, :], expected[2][..., smooth, :], EXACT)


# ------------------------------------------------------------------------------ first principles


@both_modules
def test_nearest_reflects_and_then_rounds(module):
    x = np.arange(-2.5, 6)
    for n, align, expected in (
        (4, False, [2, 0, 0, 0, 2, 2, 3, 2, 2]),  # 1.5, .5, -.5, .5, 1.5, 2.5, 3.5, 2.5, 1.5
        (5, True, [2, 2, 0, 0, 2, 2, 4, 4, 2]),  # 2.5, 1.5, .5, .5, 1.5, 2.5, 3.5, 3.5, 2.5
    ):
        grid = cases.normalized(np.stack([x, 0 * x], -1), (1, n), align)[None]
        out = module.grid_sample(
            np.arange(float(n)).reshape(1, 1, n),
            grid,
            mode="nearest",
            padding_mode="reflection",
            align_corners=align,
        )
        np.testing.assert_array_equal(out[0, 0], expected)


@both_modules
@both_dims
def test_cubic_weights_are_those_of_keys_with_three_quarters(dims, module):
    # A single 1 in the middle: the result is the kernel, which is a product over the axes.
    shape, rng = (7,) * dims, np.random.default_rng(2)
    points = rng.uniform(0, 6, (100, dims))
    grid = cases.normalized(points, shape, False).reshape(*(1,) * (dims - 1), 100, dims)
    image = np.zeros((1, *shape))
    image[(0, *(3,) * dims)] = 1
    out = module.grid_sample(image, grid, mode="bicubic")
    a, u = -0.75, abs(points - 3)
    near, far = (a + 2) * u**3 - (a + 3) * u**2 + 1, a * (u**3 - 5 * u**2 + 8 * u - 4)
    kernel = np.where(u < 1, near, np.where(u < 2, far, 0)).prod(-1)
    np.testing.assert_allclose(out.ravel(), kernel, rtol=0, atol=EXACT)


@both_modules
@both_dims
@pytest.mark.parametrize("align", [False, True])
def test_it_is_gather_in_other_coordinates(align, dims, module):
    rng, shape = np.random.default_rng(3), SHAPES[dims, align]
    points = np.concatenate([rng.uniform(-2, 2, (50, dims)) * shape[::-1], kinks(rng, shape)])
    points = points.reshape(*(1,) * (dims - 1), -1, dims)
    image = rng.standard_normal((2, *shape))
    boundaries = ("constant", "nearest", "mirror" if align else "reflect")
    for padding, boundary in zip(cases.PADDINGS, boundaries, strict=True):
        grid = module.to_normalized(points, shape, align_corners=align)
        out = module.grid_sample(image, grid, padding_mode=padding, align_corners=align)
        expected = module.gather(np.moveaxis(image, 0, -1), points, boundary=boundary)
        cases.assert_close(out, np.moveaxis(expected, -1, 0), EXACT)


@both_modules
@pytest.mark.parametrize(
    ("mode", "padding", "align", "dims"),
    [
        ("bicubic", "border", False, 2),
        ("bilinear", "reflection", True, 2),
    ],
)
def test_finite_differences_of_second_order(mode, padding, align, dims, module):
    rng, shape = np.random.default_rng(4), SHAPES[dims, align]
    points = np.floor(rng.uniform(-1, 1, (4, dims)) * shape[::-1]) + rng.uniform(0.1, 0.9, dims)
    input, grid, _ = inputs(rng, points, shape, align, channels=1)
    options = {"mode": mode, "padding_mode": padding, "align_corners": align}
    f = jax.jit(lambda i, g: module.grid_sample(i, g, forward_mode=True, **options))
    # A step of 1e-5 stays within the cell; its truncation is near 1e-9 and the rounding 1e-11 n^2.
    check_grads(f, (input, grid), order=2, eps=1e-5, rtol=1e-6, atol=1e-6)


# ----------------------------------------------------------------------------------- edges


@both_modules
@both_dims
@every_option
def test_nonfinite_positions(options, dims, module):
    align, zeros = options["align_corners"], options["padding_mode"] == "zeros"
    axes = np.eye(dims, dtype=bool)
    bad = [np.where(axes, value, 0.25) for value in (np.nan, np.inf, -np.inf)]
    outside = 0 if zeros else np.nan
    expected = np.repeat([np.nan, outside, outside], dims)
    rng = np.random.default_rng(5)
    shape = SHAPES[dims, align]
    if align:
        shape = (1, *shape[1:])  # all finite positions along this axis are pixel 0
    input, grid, ct = inputs(rng, np.zeros((3 * dims, dims)), shape, align)
    grid = np.concatenate(bad).reshape(grid.shape)
    out, ct_input, ct_grid = sample_and_vjp(module, options)(input, grid, ct)
    np.testing.assert_array_equal(out, np.broadcast_to(expected, out.shape))
    np.testing.assert_array_equal(ct_input, 0 * input)
    np.testing.assert_array_equal(
        ct_grid, np.broadcast_to(expected[:, None], ct_grid.shape) * np.ones(dims)
    )


@both_modules
@every_option
def test_huge_positions_are_ordinary(options, module):
    n, align, padding = 6, options["align_corners"], options["padding_mode"]
    image = np.random.default_rng(6).standard_normal((1, 1, n))
    for dtype in (np.float32, np.float64):
        x = np.array([1e30, -1e30, 3e29, -7e25, 1e20, -1e20], dtype)
        grid = np.stack([x, 0 * x], -1)[None]
        out = np.asarray(sample(module, options)(image, grid)[0, 0])
        if padding == "reflection":
            # One of the pixels: which, depends on the last bit of the position in pixels.
            near = np.isclose(out[:, None], image[0], rtol=EXACT)
            np.testing.assert_array_equal(near.sum(1), 1)
        elif padding == "border":
            expected = np.where(x > 0, image[0, 0, -1], image[0, 0, 0])
            np.testing.assert_allclose(out, expected, rtol=EXACT)
        else:
            np.testing.assert_array_equal(out, 0 * x)
        # Of size 1 with align_corners every finite position is pixel 0.
        out = sample(module, options)(image[..., :1], grid)[0, 0]
        if align or padding != "zeros":
            np.testing.assert_allclose(out, image[0, 0, 0] + 0 * x, rtol=EXACT)
        else:
            np.testing.assert_array_equal(out, 0 * x)


@both_modules
def test_empty_images_and_grids(module):
    for dims in (2, 3):
        grid = np.zeros((*(2,) * dims, dims))
        image = np.ones((3, *(4,) * dims))
        assert module.grid_sample(image, grid[:0]).shape == (3, 0, *(2,) * (dims - 1))
        assert module.grid_sample(image[:0], grid).shape == (0, *(2,) * dims)
        out = module.grid_sample(image[:, :0], grid)
        np.testing.assert_array_equal(out, np.zeros((3, *(2,) * dims)))


# ------------------------------------------------------------------------------ the coordinates


@both_modules
@pytest.mark.parametrize("align", [False, True])
def test_coordinates(align, module):
    shape = (4, 6)
    ends = np.array([[-1.0, -1], [1, 1], [0, 0]])
    pixels = [[0, 0], [5, 3], [2.5, 1.5]] if align else [[-0.5, -0.5], [5.5, 3.5], [2.5, 1.5]]
    to_pixels = jax.jit(lambda g: module.to_pixels(g, shape, align_corners=align))
    to_normalized = jax.jit(lambda p: module.to_normalized(p, shape, align_corners=align))
    np.testing.assert_allclose(to_pixels(ends), pixels, rtol=EXACT)
    np.testing.assert_allclose(to_normalized(np.array(pixels)), ends, rtol=EXACT, atol=EXACT)
    points = np.random.default_rng(7).uniform(-9, 9, (2, 3, 4, 2))
    np.testing.assert_allclose(to_pixels(to_normalized(points)), points, rtol=EXACT, atol=EXACT)
    # Half precision cannot hold a position: the result is float32.
    for dtype, expected in zip(cases.DTYPES, ["float32"] * 3 + ["float64"], strict=True):
        out = to_pixels(ends.astype(jnp.dtype(dtype)))
        assert out.dtype == expected
        np.testing.assert_allclose(out, pixels, rtol=1e-6)
    # In 3-D (x, y, z) is read against (D, H, W) backwards; the slope is the size of half an image.
    slopes = jax.vmap(jax.grad(lambda g, a: module.to_pixels(g, (3, 5, 9), align_corners=align)[a]))
    half = np.diag([4, 2, 1] if align else [4.5, 2.5, 1.5])
    np.testing.assert_array_equal(slopes(np.zeros((3, 3)), np.arange(3)), half)


@both_modules
def test_coordinates_along_an_axis_of_one_pixel(module):
    grid = np.array([[-1.0, 0], [0.3, 0], [1e30, 0], [np.inf, 0], [-np.inf, 0], [np.nan, 0]])
    out = module.to_pixels(grid, (5, 1), align_corners=True)
    np.testing.assert_array_equal(out[:, 0], [0, 0, 0, np.inf, -np.inf, np.nan])
    np.testing.assert_array_equal(out[:, 1], np.full(6, 2))
    out = module.to_normalized(grid[:3], (5, 1), align_corners=True)
    np.testing.assert_array_equal(out, [[0, -1]] * 3)
    out = module.to_pixels(grid[:2], (5, 1), align_corners=False)
    np.testing.assert_allclose(out, [[-0.5, 2], [0.15, 2]], rtol=EXACT)


# ----------------------------------------------------------------------- batches and dtypes


BATCHES = [
    ((2,), (2,)),
    ((), (3,)),
    ((3,), ()),
    ((2, 1), (3,)),
    ((1, 2, 1), (2, 1, 3)),
    ((0,), (1,)),
]


@both_modules
@both_dims
@pytest.mark.parametrize("batches", BATCHES, ids=str)
def test_leading_axes_broadcast(batches, dims, module):
    rng = np.random.default_rng(8)
    shape, extent = (3, 4, 5)[-dims:], (2, 3, 4)[-dims:]
    input = rng.standard_normal((*batches[0], 2, *shape))
    grid = rng.uniform(-1.5, 1.5, (*batches[1], *extent, dims))
    out = sample(module, {})(input, grid)
    batch = np.broadcast_shapes(*batches)
    assert out.shape == (*batch, 2, *extent)
    wide = (
        np.broadcast_to(a, batch + a.shape[-dims - 1 :]).reshape(-1, *a.shape[-dims - 1 :])
        for a in (input, grid)
    )
    points = zip(*wide, strict=True)
    each = [
        reference.gather(np.moveaxis(i, 0, -1), reference.to_pixels(g, shape, align_corners=False))
        for i, g in points
    ]
    for a, e in zip(out.reshape(-1, 2, *extent), each, strict=True):
        cases.assert_close(a, np.moveaxis(e, -1, 0), EXACT)


@pytest.mark.parametrize("axes", [(0, None), (None, 0), (0, 0)], ids=str)
def test_vmap_is_a_leading_axis(axes):
    rng = np.random.default_rng(9)
    input, grid = rng.standard_normal((3, 2, 4, 5)), rng.uniform(-1.5, 1.5, (3, 2, 3, 2))
    input, grid = (a if n == 0 else a[0] for a, n in zip((input, grid), axes, strict=True))

    def gradients(f):
        loss = jax.value_and_grad(lambda *a: jnp.sum(jnp.sin(f(*a))), (0, 1))
        return jax.jit(loss)(input, grid)

    options = {"padding_mode": "reflection", "mode": "bicubic"}
    expected = remembered(lambda: gradients(lambda *a: reference.grid_sample(*a, **options)))
    cases.assert_close(gradients(lambda *a: jaxwarp.grid_sample(*a, **options)), expected, EXACT)
    one = jax.vmap(lambda *a: jaxwarp.grid_sample(*a, **options), axes)
    cases.assert_close(gradients(one), expected, EXACT)
    each = jax.vmap(jax.grad(lambda *a: jnp.sum(jaxwarp.grid_sample(*a, **options)), 1), axes)
    expected = jax.vmap(jax.grad(lambda *a: jnp.sum(reference.grid_sample(*a, **options)), 1), axes)
    cases.assert_close(jax.jit(each)(input, grid), jax.jit(expected)(input, grid), EXACT)


@pytest.mark.parametrize(
    ("module", "dtype", "grid_dtype"),
    [
        *((jaxwarp, *pair) for pair in itertools.product(cases.DTYPES, repeat=2)),
        *((reference, *pair) for pair in zip(cases.DTYPES, cases.DTYPES[::-1], strict=True)),
    ],
)
def test_dtypes_mix(module, dtype, grid_dtype):
    rng = np.random.default_rng(10)
    input, ct = rng.standard_normal((2, 3, 4, 8)), rng.standard_normal((2, 3, 5, 6))
    grid = rng.uniform(-1.5, 1.5, (2, 5, 6, 2))
    arrays = [
        a.astype(jnp.dtype(t)) for a, t in zip((input, grid), (dtype, grid_dtype), strict=True)
    ]
    ct = ct.astype(arrays[0].dtype)
    actual = sample_and_vjp(module, {})(*arrays, ct)
    assert [a.dtype for a in actual] == [a.dtype for a in (arrays[0], *arrays)]
    # A half-precision grid means what it holds: it is not rounded again on its way to pixels.
    wide = (np.asarray(a, np.float64) for a in (*arrays, ct))
    expected = remembered(sample_and_vjp(reference, {}), *wide)
    for a, e in zip(actual, expected, strict=True):
        half_ulp = float(jnp.finfo(a.dtype).eps) / 2
        atol = EXACT if dtype == grid_dtype == "float64" else SINGLE
        np.testing.assert_allclose(np.asarray(a, np.float64), e, rtol=half_ulp, atol=atol)


# ---------------------------------------------------------------------------------- the package


IMAGE, GRID = np.ones((2, 3, 4, 5), np.float32), np.zeros((2, 6, 7, 2), np.float32)


@pytest.mark.parametrize(
    ("error", "argument", "expected", "received", "arrays", "options"),
    [
        (TypeError, "input", "float32", "int32", (IMAGE.astype(np.int32), GRID), {}),
        (TypeError, "grid", "float32", "int32", (IMAGE, GRID.astype(np.int32)), {}),
        (
            TypeError,
            "align_corners",
            "True or False",
            "None",
            (IMAGE, GRID),
            {"align_corners": None},
        ),
        (ValueError, "grid", "2 (x, y) or 3", "4", (IMAGE, np.zeros((2, 6, 7, 4), np.float32)), {}),
        (ValueError, "grid", "at least 3 axes", "(7, 2)", (IMAGE, GRID[0, 0]), {}),
        (ValueError, "input", "at least 3 axes", "(4, 5)", (IMAGE[0, 0], GRID), {}),
        (
            ValueError,
            "grid",
            "at least 4 axes",
            "(6, 7, 3)",
            (IMAGE, np.ones((6, 7, 3), np.float32)),
            {},
        ),
        # Channels last: nothing says so but the batch axes, which then do not fit.
        (ValueError, "input", "broadcast", "(3,)", (np.ones((3, 4, 5, 2), np.float32), GRID), {}),
        (ValueError, "mode", cases.MODES, "'linear'", (IMAGE, GRID), {"mode": "linear"}),
        (ValueError, "mode", cases.MODES, "'trilinear'", (IMAGE, GRID), {"mode": "trilinear"}),
        (
            ValueError,
            "padding_mode",
            cases.PADDINGS,
            "'wrap'",
            (IMAGE, GRID),
            {"padding_mode": "wrap"},
        ),
        (
            ValueError,
            "input",
            "empty",
            "(0, 5)",
            (IMAGE[:, :, :0], GRID),
            {"padding_mode": "border"},
        ),
    ],
)
def test_wrong_call(error, argument, expected, received, arrays, options):
    with pytest.raises(error) as raised:
        jax.eval_shape(lambda *a: jaxwarp.grid_sample(*a, **options), *arrays)
    form = r"(?P<argument>[\w, ]+): expected (?P<expected>.+), got (?P<received>.+); (?P<remedy>.+)"
    found = re.fullmatch(form, str(raised.value))
    assert found, str(raised.value)
    assert argument in found["argument"]
    for name in expected if isinstance(expected, tuple) else (expected,):
        assert name in found["expected"]
    assert received in found["received"]


@pytest.mark.parametrize("name", ["to_pixels", "to_normalized"])
def test_wrong_coordinates(name):
    convert, points = getattr(jaxwarp, name), np.zeros((7, 2), np.float32)
    with pytest.raises(TypeError, match="align_corners"):
        convert(points, (4, 5))
    with pytest.raises(ValueError, match=r"expected a last axis of 3 .*, got 2; "):
        convert(points, (4, 5, 6), align_corners=True)
    with pytest.raises(ValueError, match=r"shape: expected .*, got \(4, 5, 6, 7\); "):
        convert(points, (4, 5, 6, 7), align_corners=True)
    with pytest.raises(TypeError, match=r"expected .*, got int32; "):
        convert(points.astype(np.int32), (4, 5), align_corners=True)


@both_dims
def test_the_input_is_read_in_place_and_not_copied(dims, optimised):  # noqa: F811
    shape, extent, batch = (5, 11, 13)[-dims:], (3, 7, 9)[-dims:], 4
    rng = np.random.default_rng(11)
    input = rng.standard_normal((5, *shape)).astype(np.float32)
    grid = rng.uniform(-1, 1, (batch, *extent, dims)).astype(np.float32)
    ct = rng.standard_normal((batch, 5, *extent)).astype(np.float32)
    for mode in cases.MODES:
        # One image under many grids: as leading axes, and as vmap.
        one = functools.partial(jaxwarp.grid_sample, mode=mode, padding_mode="reflection")
        for f in (one, jax.vmap(one, (None, 0))):
            program = compiled(f, input, grid)
            assert calls(program) == {"jaxwarp_gather": 1}
            assert made(program, *input.shape) == made(program, batch, *input.shape) == 0
            both = compiled(cotangents(f, [0, 1]), ct, input, grid)
            assert calls(both) == {"jaxwarp_gather_vjp": 1}
            assert made(both, *input.shape) == 1  # its cotangent, summed over the grids
            assert made(both, batch, *input.shape) == 0
            in_grid = compiled(cotangents(f, [1]), ct, input, grid)
            assert made(in_grid, *input.shape) == 0
            for instructions in (program, both, in_grid):
                names = {name for name, _, _ in instructions}
                assert not names & {"transpose", "copy", "broadcast"}, names
                # Nothing but the kernel writes an array of the size of the result.
                assert made(instructions, *ct.shape) == (1 if instructions is program else 0)


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
def test_derivatives_of_higher_order(mode):
    rng = np.random.default_rng(12)
    input, grid = rng.standard_normal((2, 3, 4, 5)), rng.uniform(-1.5, 1.5, (6, 7, 2))
    d_input, d_grid = rng.standard_normal(input.shape), rng.standard_normal(grid.shape)
    options = {"mode": mode, "padding_mode": "border"}

    def orders(module):
        def run(*x):
            def f(*x):
                return module.grid_sample(*x, **options, forward_mode=True)

            gradient = jax.grad(lambda *x: jnp.sum(jnp.sin(f(*x))), (0, 1))
            d = (d_input, d_grid)
            product = lambda *x: sum(map(jnp.vdot, gradient(*x), d))  # noqa: E731
            return jax.jvp(f, x, d), jax.jvp(gradient, x, d), jax.grad(product, (0, 1))(*x)

        return jax.jit(run)(input, grid)

    expected = remembered(lambda: orders(reference))
    cases.assert_close(orders(jaxwarp), expected, 1e-11)  # slopes of 5/2, squared
