"""The definition of every operation of jaxwarp in plain jnp; also the oracle of its tests.

Same names and signatures as the package, with none of its kernels. Equation numbers are those of
Zhiwei Xu, "Notes: CUDA Implementation of Differentiable Image Warping" (2021).

Positions and displacements are in pixels, their last axis is (x, y) or (x, y, z), and 0 is the
centre of the first pixel. Images are channels-last, (H, W, C) or (D, H, W, C); `grid_sample`
alone has PyTorch's normalised positions and channels first. Shapes: ``shape`` is the spatial shape
of an image, ``S`` any shape of points, ``dims`` is 2 or 3.
`forward_mode` and `deterministic` are accepted and change nothing here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Annotated as Float  # what jaxtyping's are to type checkers
from typing import Annotated as Inexact
from typing import Annotated as Shaped

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike, DTypeLike

__all__ = [
    "backward_warp",
    "forward_warp",
    "gather",
    "grid_sample",
    "pixel_grid",
    "reconstruct",
    "splat",
    "to_normalized",
    "to_pixels",
]


def __dir__() -> list[str]:
    return __all__


Fill = ArrayLike  # (), or (C,) for each channel
_Boundaries = tuple[str, ...]  # along x, y[, z]
_Taps = dict[int, tuple[float, ...]]  # tap -> coefficients of its weight


def _keys(a: float) -> _Taps:
    """The cubic kernel of Keys with parameter a, as an entry of METHODS."""
    return {
        -1: (a, -2 * a, a, 0.0),
        0: (a + 2, -a - 3, 0.0, 1.0),
        1: (-a - 2, 2 * a + 3, -a, 0.0),
        2: (-a, a, 0.0, 0.0),
    }


# method -> (rounding that gives the base pixel, {tap: its weight as a polynomial in t}), with
# t = x - base and the highest power first. floor makes t in [0, 1): every derivative is that of the
# right-hand cell. "bicubic" is the mode of `grid_sample`, in 3-D too.
METHODS: dict[str, tuple[Callable[[Array], Array], _Taps]] = {
    "nearest": (jnp.round, {0: (1.0,)}),  # jnp.round takes ties to even
    "linear": (jnp.floor, {0: (-1.0, 1.0), 1: (1.0, 0.0)}),
    "cubic": (jnp.floor, _keys(-0.5)),
    "bicubic": (jnp.floor, _keys(-0.75)),
}
PERIODS: dict[str, Callable[[int], ArrayLike]] = {
    "mirror": lambda n: jnp.maximum(2 * n - 2, 1),  # n may be a symbolic size, of which max is none
    "reflect": lambda n: 2 * n,
    "wrap": lambda n: n,
}


def pixel_grid(shape: Sequence[int], dtype: DTypeLike = jnp.float32) -> Float[Array, "*shape dims"]:
    """Positions of the pixels of an image, ``(*shape, dims)``; `shape` is (H, W) or (D, H, W)."""
    axes = jnp.meshgrid(*(jnp.arange(n, dtype=dtype) for n in shape), indexing="ij")
    return jnp.stack(axes[::-1], axis=-1)


def gather(
    image: Shaped[ArrayLike, "*shape C"],
    points: Float[ArrayLike, "*S dims"],
    *,
    method: str = "linear",
    boundary: str | Sequence[str] = "constant",
    fill_value: Fill = 0.0,
    derivative: Sequence[int] | None = None,
    forward_mode: bool = False,
    deterministic: bool | None = None,
) -> Shaped[Array, "*S C"]:
    """Samples `image` ``(*shape, C)`` at `points` ``(*S, dims)``: (1), out(p) = sum_j g(p, j) I(j).

    `boundary` is one for all axes or (x, y[, z]), `fill_value` one for all channels or ``(C,)``.
    `derivative` = (k_x, k_y[, k_z]) differentiates the weight g that many times along each axis.
    Returns ``(*S, C)`` in the image's dtype. A NaN coordinate gives NaN, and so does an infinite
    one along an axis whose boundary is not "constant"; others give `fill_value`, 0 if it is
    differentiated. By "nearest" of integers and bools, which have no NaN, `fill_value` stands for
    it.
    """
    image, points = jnp.asarray(image), jnp.asarray(points)
    if jnp.iscomplexobj(image):
        parts, fill = _parts(image), _parts(jnp.broadcast_to(fill_value, image.shape[-1:]))
        options = {"method": method, "boundary": boundary, "derivative": derivative}
        return _joined(gather(parts, points, fill_value=fill, **options))
    boundary = _boundaries(boundary, points.shape[-1])
    if not jnp.issubdtype(image.dtype, jnp.floating):
        return _pick(image, points, boundary, fill_value)
    derivative = tuple(derivative or (0,) * points.shape[-1])
    accumulated = image.astype(_at_least_float32(image))
    fill = jnp.asarray(fill_value, accumulated.dtype)
    return _gather(accumulated, points, fill, method, boundary, derivative).astype(image.dtype)


def splat(
    values: Inexact[ArrayLike, "*S C"],
    points: Float[ArrayLike, "*S dims"],
    shape: Sequence[int],
    *,
    method: str = "linear",
    boundary: str | Sequence[str] = "constant",
    derivative: Sequence[int] | None = None,
    forward_mode: bool = False,
    deterministic: bool | None = None,
) -> Inexact[Array, "*shape C"]:
    """Adds `values` ``(*S, C)`` into an image at `points` ``(*S, dims)``: sum_i g(p_i, j) f_i.

    N_j of (5), and the adjoint of `gather` with ``fill_value=0``. Returns ``(*shape, C)`` in the
    values' dtype. A source with a non-finite coordinate is dropped.
    """
    values, points = jnp.asarray(values), jnp.asarray(points)
    if jnp.iscomplexobj(values):
        options = {"method": method, "boundary": boundary, "derivative": derivative}
        return _joined(splat(_parts(values), points, shape, **options))
    boundary = _boundaries(boundary, points.shape[-1])
    derivative = tuple(derivative or (0,) * points.shape[-1])
    accumulated = values.astype(_at_least_float32(values))
    out = _sum(accumulated, points, None, tuple(shape), method, boundary, derivative)
    return out.astype(values.dtype)


def backward_warp(
    image: Shaped[ArrayLike, "... H W C"],
    flow: Float[ArrayLike, "... h w dims"],
    *,
    method: str = "linear",
    boundary: str | Sequence[str] = "constant",
    fill_value: Fill = 0.0,
    forward_mode: bool = False,
    deterministic: bool | None = None,
) -> Shaped[Array, "... h w C"]:
    """out[q] = image(q + flow[q]): equation (1) with p = q + flow[q].

    image: ``(*batch, *shape, C)``. flow: ``(*batch, *S, dims)`` pixels. Returns
    ``(*batch, *S, C)``; the leading axes broadcast against each other and mean the same as
    `jax.vmap`.
    """
    image, flow = jnp.asarray(image), jnp.asarray(flow)
    signature = {2: "(h,w,c),(i,j,d)->(i,j,c)", 3: "(e,h,w,c),(k,i,j,d)->(k,i,j,c)"}

    def one(image: Array, flow: Array) -> Array:
        return gather(
            image, _displaced(flow), method=method, boundary=boundary, fill_value=fill_value
        )

    return jnp.vectorize(one, signature=signature[flow.shape[-1]])(image, flow)


def forward_warp(
    values: Inexact[ArrayLike, "... H W C"],
    flow: Float[ArrayLike, "... H W dims"],
    *,
    reduce: str = "average",
    importance: Float[ArrayLike, "... H W"] | None = None,
    method: str = "linear",
    boundary: str | Sequence[str] = "constant",
    fill_value: Fill = 0.0,
    min_coverage: float = 0.0,
    return_coverage: bool = False,
    forward_mode: bool = False,
    deterministic: bool | None = None,
) -> Inexact[Array, "... H W C"] | tuple[Inexact[Array, "... H W C"], Float[Array, "... H W"]]:
    """Move the value at pixel r to r + flow[r]: equation (5), with f = values and w = importance::

        "sum":     out_j = N_j,        N_j = sum_i w_i g(p_i, j) f_i
        "average": out_j = N_j / D_j,  D_j = sum_i w_i g(p_i, j)
        "softmax": the same with w_ij = exp(l_i - m_j), l = importance, m_j the maximum of l_i
                   over the sources with g(p_i, j) > 0; at others the exponent is clipped at 0

    A target with coverage_j = sum_i g(p_i, j) <= `min_coverage`, or with D_j = 0, is a hole: it
    holds `fill_value` and passes no gradient.

    values: ``(*batch, *shape, C)``. flow: ``(*batch, *shape, dims)`` pixels. importance:
    ``(*batch, *shape)``, 1 where None ("softmax" needs it). Returns ``(*batch, *shape, C)`` in the
    values' dtype, with `return_coverage` also the coverage, ``(*batch, *shape)``, in the dtype of
    the accumulation. The leading axes broadcast.
    """
    values, flow = jnp.asarray(values), jnp.asarray(flow)
    if jnp.iscomplexobj(values):
        out, coverage = forward_warp(
            _parts(values),
            flow,
            reduce=reduce,
            importance=importance,
            method=method,
            boundary=boundary,
            fill_value=_parts(jnp.broadcast_to(fill_value, values.shape[-1:])),
            min_coverage=min_coverage,
            return_coverage=True,
        )
        return (_joined(out), coverage) if return_coverage else _joined(out)
    boundary = _boundaries(boundary, flow.shape[-1])
    dtype, spatial = _at_least_float32(values), flow.shape[-1 - flow.shape[-1] : -1]
    importance = jnp.ones(spatial) if importance is None else jnp.asarray(importance)
    s = {2: "h,w", 3: "e,h,w"}[flow.shape[-1]]

    def warp(values: Array, flow: Array, importance: Array) -> tuple[Array, Array]:
        points, no_derivative = _displaced(flow), (0,) * flow.shape[-1]

        def sum_g(f: Array, logits: Array | None = None) -> Array:
            return _sum(f, points, logits, spatial, method, boundary, no_derivative)

        f, w = values.astype(dtype), importance.astype(dtype)[..., None]
        one, logits = jnp.ones_like(w), None
        if reduce == "softmax":
            w, logits = one, w
        out, coverage = sum_g(_weighted(w, f), logits), sum_g(one)
        if reduce != "sum":
            total = sum_g(w, logits)
            hole = (coverage <= min_coverage) | (total == 0)
            fill = jnp.asarray(fill_value, dtype)
            out = jnp.where(hole, fill, _ratio(out, jnp.where(hole, 1, total)))
        return out.astype(values.dtype), coverage[..., 0]

    signature = f"({s},c),({s},d),({s})->({s},c),({s})"
    out, coverage = jnp.vectorize(warp, signature=signature)(values, flow, importance)
    return (out, coverage) if return_coverage else out


def grid_sample(
    input: Shaped[ArrayLike, "... H W"],
    grid: Float[ArrayLike, "... h w dims"],
    *,
    mode: str = "bilinear",
    padding_mode: str = "zeros",
    align_corners: bool = False,
    forward_mode: bool = False,
) -> Shaped[Array, "... h w"]:
    """PyTorch's `grid_sample`: (1) with channels first and positions between -1 and 1.

    input: ``(*batch, C, *shape)``. grid: ``(*batch, *S, dims)``, see `to_pixels`; S has as many
    axes as shape. Returns ``(*batch, C, *S)`` in the input's dtype; the leading axes broadcast.
    """
    input, grid = jnp.asarray(input), jnp.asarray(grid)
    signature = {2: "(c,h,w),(i,j,d)->(c,i,j)", 3: "(c,e,h,w),(k,i,j,d)->(c,k,i,j)"}
    method = {"nearest": "nearest", "bilinear": "linear", "bicubic": "bicubic"}[mode]
    reflection = "mirror" if align_corners else "reflect"  # about pixel centres, or pixel edges
    boundary = {"zeros": "constant", "border": "nearest", "reflection": reflection}[padding_mode]

    def one(image: Array, grid: Array) -> Array:
        shape = image.shape[1:]
        points = to_pixels(grid, shape, align_corners=align_corners)
        within = boundary
        if (method, boundary) == ("nearest", "reflect"):
            # The coordinate is reflected, and only then rounded: 2 n - 1 - x is a tie where x is
            # one, but the even neighbour of the one is the odd neighbour of the other.
            n = np.array(shape[::-1])
            points = jnp.mod(points, 2 * n)
            points = jnp.where(points <= n - 0.5, points, 2 * n - 1 - points)
            within = "nearest"
        out = gather(jnp.moveaxis(image, 0, -1), points, method=method, boundary=within)
        return jnp.moveaxis(out, -1, 0)

    return jnp.vectorize(one, signature=signature[grid.shape[-1]])(input, grid)


def reconstruct(
    values: Inexact[ArrayLike, "*S C"],
    points: Float[ArrayLike, "*S dims"],
    shape: Sequence[int],
    *,
    boundary: str | Sequence[str] = "constant",
    damping: float = 0.0,
    tol: float = 1e-5,
    max_steps: int = 100,
) -> Inexact[Array, "*shape C"]:
    """The image ``(*shape, C)`` with samples `values` ``(*S, C)`` at ``(*S, dims)``: equation (3).

    In the least-squares sense: the least ``|G x - f|^2 + damping |x|^2``, where row i of the matrix
    G holds the weights g(p_i, j) of (1); without damping, of all such x the one with the least
    ``sum_j D_j x_j^2``, where D_j is the coverage of (5), and 0 in holes. A source with a
    non-finite coordinate is dropped. Solved to the last digit, whatever `tol` and `max_steps`.
    """
    values, points = jnp.asarray(values), jnp.asarray(points)
    if jnp.iscomplexobj(values):
        options = {"boundary": boundary, "damping": damping}
        return _joined(reconstruct(_parts(values), points, shape, **options))
    dtype, kept = _at_least_float32(values), _finite(points)
    count, n = math.prod(points.shape[:-1]), math.prod(shape)
    basis = jnp.eye(n, dtype=dtype).reshape(*shape, n)  # channel j is the image that is 1 at j
    G = jnp.where(kept, gather(basis, jnp.where(kept, points, 0), boundary=boundary), 0)
    f = jnp.where(kept, values, 0).astype(dtype)
    G, f = G.reshape(count, n), f.reshape(count, values.shape[-1])
    if damping > 0:
        x = jnp.linalg.solve(G.T @ G + damping * jnp.eye(n, dtype=dtype), G.T @ f)
    else:
        D = G.sum(axis=0)
        scale = jnp.where(D > 0, 1 / jnp.sqrt(jnp.where(D > 0, D, 1)), 0)
        x = scale[:, None] * (jnp.linalg.pinv(G * scale) @ f)
    return x.reshape(*shape, values.shape[-1]).astype(values.dtype)


def to_pixels(
    grid: Float[ArrayLike, "*S dims"], shape: Sequence[int], *, align_corners: bool
) -> Float[Array, "*S dims"]:
    """Pixels from normalised positions, both ``(*S, dims)``, for an image of spatial `shape`.

    -1 and 1 are the centres of the first and of the last pixel with `align_corners`, and the outer
    edges of these pixels without. An axis of size 1 has all finite positions at 0 with
    `align_corners`.
    """
    grid = jnp.asarray(grid)
    grid = grid.astype(_at_least_float32(grid))
    n = np.array(shape[::-1])
    pixels = (grid + 1) / 2 * (n - 1) if align_corners else ((grid + 1) * n - 1) / 2
    return jnp.where(jnp.isfinite(grid), pixels, grid)


def to_normalized(
    points: Float[ArrayLike, "*S dims"], shape: Sequence[int], *, align_corners: bool
) -> Float[Array, "*S dims"]:
    """The inverse of `to_pixels`; 0 along an axis of size 1 with `align_corners`."""
    points = jnp.asarray(points)
    points = points.astype(_at_least_float32(points))
    n = np.array(shape[::-1])
    aligned = jnp.where(n == 1, 0, 2 * points / np.maximum(n - 1, 1) - 1)
    grid = aligned if align_corners else (2 * points + 1) / n - 1
    return jnp.where(jnp.isfinite(points), grid, points)


# gather and splat form a family that is closed under differentiation: d/dp_a of a member is the
# member with derivative[a] raised by one. Said to JAX as a rule, and not left to the product rule
# of g * I(j), a NaN pixel reaches exactly the derivatives whose weight at that pixel is not 0.
# With the weights of "softmax" splat stays in it: d/dl_i multiplies f_i, and the peak m_j, on which
# the result of (5) does not depend, is a constant.


@partial(jax.custom_jvp, nondiff_argnums=(3, 4, 5))
def _gather(
    image: Array,
    points: Array,
    fill_value: ArrayLike,
    method: str,
    boundary: _Boundaries,
    derivative: tuple[int, ...],
) -> Array:
    out = _interpolate(image, points, fill_value, method, boundary, derivative, product=_weighted)
    beyond = 0.0 if any(derivative) else fill_value
    return jnp.where(_finite(points), out, jnp.where(_nowhere(points, boundary), jnp.nan, beyond))


@_gather.defjvp
def _gather_jvp(
    method: str,
    boundary: _Boundaries,
    derivative: tuple[int, ...],
    primals: tuple[Array, Array, ArrayLike],
    tangents: tuple[Array, Array, ArrayLike],
) -> tuple[Array, Array]:
    (image, points, fill), (d_image, d_points, d_fill) = primals, tangents
    out_dot = _interpolate(d_image, points, d_fill, method, boundary, derivative)
    if not any(derivative):  # infinitely far outside
        out_dot += jnp.where(_finite(points) | _nowhere(points, boundary), 0, d_fill)
    for a, raised in enumerate(_raised(derivative)):
        slope = _gather(image, points, fill, method, boundary, raised)
        out_dot += slope * d_points[..., a, None].astype(image.dtype)
    return _gather(image, points, fill, method, boundary, derivative), out_dot


@partial(jax.custom_jvp, nondiff_argnums=(3, 4, 5, 6))
def _splat(
    values: Array,
    points: Array,
    logits: Array | None,
    shape: tuple[int, ...],
    method: str,
    boundary: _Boundaries,
    derivative: tuple[int, ...],
) -> Array:
    return _scatter(values, points, logits, shape, method, boundary, derivative, product=_weighted)


@_splat.defjvp
def _splat_jvp(
    shape: tuple[int, ...],
    method: str,
    boundary: _Boundaries,
    derivative: tuple[int, ...],
    primals: tuple[Array, Array, Array | None],
    tangents: tuple[Array, Array, Array | None],
) -> tuple[Array, Array]:
    (values, points, logits), (d_values, d_points, d_logits) = primals, tangents
    if d_logits is not None:
        d_values += values * d_logits
    out_dot = _scatter(d_values, points, logits, shape, method, boundary, derivative)
    for a, raised in enumerate(_raised(derivative)):
        moved = values * d_points[..., a, None].astype(values.dtype)
        out_dot += _scatter(moved, points, logits, shape, method, boundary, raised)
    return _splat(values, points, logits, shape, method, boundary, derivative), out_dot


@jax.custom_jvp
def _weighted(w: Array, f: Array) -> Array:
    """w * f, where a weight of 0 hides even a NaN."""
    return jnp.where(w == 0, 0, w * f)


_weighted.defjvps(lambda d_w, _, w, f: d_w * f, lambda d_f, _, w, f: w * d_f)


@jax.custom_jvp
def _ratio(numerator: Array, denominator: Array) -> Array:
    """N / D, differentiated as (dN - out dD) / D, as in (6): D ** 2 may be too small a number."""
    return numerator / denominator


_ratio.defjvps(lambda d_n, _, n, d: d_n / d, lambda d_d, out, n, d: -out * (d_d / d))


@jax.custom_jvp
def _exponential(logit: Array, peak: Array) -> Array:
    """w_ij = exp(l_i - m_j), with the exponent clipped at 0; the peak m_j has no derivative."""
    return jnp.exp(jnp.where(logit == peak, 0, jnp.minimum(logit - peak, 0)))


_exponential.defjvps(lambda d_logit, w, logit, peak: w * d_logit, None)


def _interpolate(
    image: Array,
    points: Array,
    fill_value: ArrayLike,
    method: str,
    boundary: _Boundaries,
    derivative: tuple[int, ...],
    product: Callable[[Array, Array], Array] = jnp.multiply,
) -> Array:
    """sum_j g(p, j) I(j) of (1); 0 at a position that is not finite."""
    finite = _finite(points)
    at = jnp.where(finite, points, 0)
    j, g = _corners(at, image.shape[:-1], method, boundary, derivative)
    padded = _padded(image, boundary, fill_value)
    out = jnp.sum(product(g.astype(image.dtype)[..., None], padded[j]), axis=-2)
    return jnp.where(finite, out, 0)


def _sum(
    values: Array,
    points: Array,
    logits: Array | None,
    shape: tuple[int, ...],
    method: str,
    boundary: _Boundaries,
    derivative: tuple[int, ...],
) -> Array:
    """sum_i w_ij g(p_i, j) f_i of (5), without the sources at positions that are not finite.

    And without those with a logit of -inf, whose weight is 0 even where they are alone.
    """
    kept = _finite(points)
    points = jnp.where(kept, points, 0)
    if logits is not None:
        kept &= logits != -jnp.inf
        logits = jnp.where(kept, logits, -jnp.inf)
    values = jnp.where(kept, values, 0)
    return _splat(values, points, logits, shape, method, boundary, derivative)


def _scatter(
    values: Array,
    points: Array,
    logits: Array | None,
    shape: tuple[int, ...],
    method: str,
    boundary: _Boundaries,
    derivative: tuple[int, ...],
    product: Callable[[Array, Array], Array] = jnp.multiply,
) -> Array:
    """sum_i w_ij g(p_i, j) f_i of (5), where w is 1 or, with logits (*S, 1), that of "softmax"."""
    j, g = _corners(points, shape, method, boundary, derivative)
    g = g.astype(values.dtype)
    if logits is not None:
        peak = _peak(points, logits.astype(values.dtype), shape, method, boundary)
        g = _weighted(g, _exponential(logits, peak[j]))
    return _added(product(g[..., None], values[..., None, :]), j, shape, boundary)


def _added(
    parts: Array, j: tuple[Array, ...], shape: tuple[int, ...], boundary: _Boundaries
) -> Array:
    """The image of which every corner j gets its part, (*S, K, C) -> (*shape, C)."""
    empty = jnp.zeros((*shape, parts.shape[-1]), parts.dtype)
    # What falls outside is added to the ring, and cut off with it.
    return _inside(_padded(empty, boundary, 0).at[j].add(parts), shape, boundary)


def _peak(
    points: Array, logits: Array, shape: tuple[int, ...], method: str, boundary: _Boundaries
) -> Array:
    """m_j of "softmax", in the padded image; -inf where no source has a weight."""
    j, g = _corners(points, shape, method, boundary, (0,) * len(shape))
    counts = (g.astype(logits.dtype) > 0) & ~jnp.isnan(logits)
    sizes = [n + sum(ring) for n, ring in zip(shape, _ring(boundary), strict=True)]
    peak = jnp.full(sizes, -jnp.inf, logits.dtype)
    return peak.at[j].max(jnp.where(counts, logits, -jnp.inf))


def _finite(points: Array) -> Array:
    return jnp.isfinite(points).all(-1, keepdims=True)


def _nowhere(points: Array, boundary: _Boundaries) -> Array:
    """Is a coordinate NaN, or infinite along an axis whose boundary is not "constant"?"""
    nowhere = jnp.isnan(points).any(-1)
    for a, along in enumerate(boundary):
        if along != "constant":
            nowhere |= jnp.isinf(points[..., a])
    return nowhere[..., None]


def _pick(image: Array, points: Array, boundary: _Boundaries, fill_value: ArrayLike) -> Array:
    """(1) by "nearest" of an image of integers or bools: the pixel itself."""
    finite = _finite(points)
    no_derivative = (0,) * len(boundary)
    at = jnp.where(finite, points, 0)
    j, _ = _corners(at, image.shape[:-1], "nearest", boundary, no_derivative)
    fill = jnp.asarray(fill_value, image.dtype)
    return jnp.where(finite, _padded(image, boundary, fill)[j][..., 0, :], fill)


def _raised(derivative: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """The orders after one more derivative along x, y[, z]."""
    for a in range(len(derivative)):
        yield tuple(k + (a == b) for b, k in enumerate(derivative))


def _corners(
    points: Array,
    shape: Sequence[int],
    method: str,
    boundary: _Boundaries,
    derivative: Sequence[int],
) -> tuple[tuple[Array, ...], Array]:
    """The corners j of every finite point: indices into the padded image, and weights g(p, j).

    d index arrays (*S, K) and one weight array (*S, K), where K = taps ** d.
    """
    d = len(shape)
    taps = [  # one pair (indices, weights), each (*S, taps), per axis of the image: z, y, x
        _taps(points[..., a], shape[d - 1 - a], method, boundary[a], derivative[a])
        for a in reversed(range(d))
    ]
    box = (len(METHODS[method][1]),) * d

    def along(axis: int, of_taps: Array) -> Array:
        """The same for all corners that have the same tap along this axis: (*S, K)."""
        others = [a for a in range(-d, 0) if a + d != axis]
        in_box = jnp.broadcast_to(jnp.expand_dims(of_taps, others), (*points.shape[:-1], *box))
        return in_box.reshape(*points.shape[:-1], math.prod(box))

    index = tuple(along(axis, indices) for axis, (indices, _) in enumerate(taps))
    weights = jnp.stack([along(axis, weights) for axis, (_, weights) in enumerate(taps)])
    return index, jnp.prod(weights, axis=0)


def _taps(x: Array, n: int, method: str, boundary: str, order: int) -> tuple[Array, Array]:
    """Indices and weights, each (*S, taps), of what x touches along one axis of length n."""
    rounding, polynomials = METHODS[method]
    base = rounding(x)
    t = x - base
    # Brought near before it becomes an integer, so that 1e30 is an ordinary position: by whole
    # periods, or to where every tap is still outside.
    periodic = boundary in PERIODS
    base = jnp.mod(base, PERIODS[boundary](n)) if periodic else jnp.clip(base, -3, n + 2)
    base = base.astype(int)
    index = jnp.stack([base + tap for tap in polynomials], axis=-1)
    derived = (np.polyder(p, order).tolist() for p in polynomials.values())
    weight = jnp.stack([_polynomial(p, t) for p in derived], axis=-1)
    return _index(index, n, boundary), weight


def _polynomial(coefficients: Sequence[float], t: Array) -> Array:
    value = jnp.zeros_like(t)
    for coefficient in coefficients:
        value = value * t + coefficient
    return value


def _index(i: Array, n: int, boundary: str) -> Array:
    """Where integer pixel i lies along an axis of length n, counted in the padded image."""
    if boundary == "constant":
        return jnp.clip(i, -1, n) + _margin(boundary)
    if boundary == "nearest":
        return jnp.clip(i, 0, n - 1)
    i = jnp.mod(i, PERIODS[boundary](n))
    return jnp.where(i < n, i, 2 * n - (2 if boundary == "mirror" else 1) - i)


def _margin(boundary: str) -> int:
    return 1 if boundary == "constant" else 0


def _ring(boundary: _Boundaries) -> list[tuple[int, int]]:
    """How many pixels stand for what is outside, before and behind each axis of an image."""
    return [(_margin(along), _margin(along)) for along in reversed(boundary)]


def _padded(image: Array, boundary: _Boundaries, value: ArrayLike) -> Array:
    """The image with what is outside: one ring of `value` is all of it."""
    ring = [*_ring(boundary), (0, 0)]
    inside = jnp.pad(jnp.ones((*image.shape[:-1], 1), bool), ring)
    return jnp.where(inside, jnp.pad(image, ring), value)


def _inside(padded: Array, shape: Sequence[int], boundary: _Boundaries) -> Array:
    ring = zip(shape, _ring(boundary), strict=True)
    return padded[tuple(slice(margin, margin + n) for n, (margin, _) in ring)]


def _boundaries(boundary: str | Sequence[str], dims: int) -> _Boundaries:
    return (boundary,) * dims if isinstance(boundary, str) else tuple(boundary)


def _parts(x: Array) -> Array:
    """Real and imaginary parts as channels."""
    return jnp.concatenate([jnp.real(x), jnp.imag(x)], axis=-1)


def _joined(parts: Array) -> Array:
    real, imaginary = jnp.split(parts, 2, axis=-1)
    return jax.lax.complex(real, imaginary)


def _displaced(flow: Array) -> Array:
    """p = q + flow[q], formed at least in float32."""
    dtype, dims = _at_least_float32(flow), flow.shape[-1]
    return pixel_grid(flow.shape[-1 - dims : -1], dtype) + flow.astype(dtype)


def _at_least_float32(array: Array) -> DTypeLike:
    return jnp.promote_types(array.dtype, jnp.float32)
