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
from collections.abc import Sequence
from typing import Annotated as Float  # what jaxtyping's are to type checkers
from typing import Annotated as Inexact
from typing import Annotated as Shaped
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from jaxwarp import _formulas
from jaxwarp._formulas import (
    at_least_float32,
    boundaries_of,
    complex_of,
    displaced,
    is_finite,
    parts_of,
    ratio,
    weighted,
)

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


def pixel_grid(shape: Sequence[int], dtype: DTypeLike = jnp.float32) -> Float[Array, "*shape dims"]:
    """Positions of the pixels of an image, ``(*shape, dims)``; `shape` is (H, W) or (D, H, W)."""
    return _formulas.pixel_positions(shape, dtype)


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
        fill = parts_of(jnp.broadcast_to(fill_value, image.shape[-1:]))
        options: dict[str, Any] = {"method": method, "boundary": boundary, "derivative": derivative}
        return complex_of(gather(parts_of(image), points, fill_value=fill, **options))
    boundary = boundaries_of(boundary, points.shape[-1])
    if not jnp.issubdtype(image.dtype, jnp.floating):
        return _formulas.pick(image, points, boundary, jnp.asarray(fill_value, image.dtype))
    derivative = tuple(derivative or (0,) * points.shape[-1])
    accumulated = image.astype(at_least_float32(image))
    fill = jnp.asarray(fill_value, accumulated.dtype)
    out = _formulas.gather(accumulated, points, fill, method, boundary, derivative)
    return out.astype(image.dtype)


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
        options: dict[str, Any] = {"method": method, "boundary": boundary, "derivative": derivative}
        return complex_of(splat(parts_of(values), points, shape, **options))
    boundary = boundaries_of(boundary, points.shape[-1])
    derivative = tuple(derivative or (0,) * points.shape[-1])
    accumulated = values.astype(at_least_float32(values))
    out = _formulas.splat(accumulated, points, None, tuple(shape), method, boundary, derivative)
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
            image,
            displaced(flow),
            method=method,
            boundary=boundary,
            fill_value=fill_value,
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
            parts_of(values),
            flow,
            reduce=reduce,
            importance=importance,
            method=method,
            boundary=boundary,
            fill_value=parts_of(jnp.broadcast_to(fill_value, values.shape[-1:])),
            min_coverage=min_coverage,
            return_coverage=True,
        )
        return (complex_of(out), coverage) if return_coverage else complex_of(out)
    boundary = boundaries_of(boundary, flow.shape[-1])
    dtype, spatial = at_least_float32(values), flow.shape[-1 - flow.shape[-1] : -1]
    importance = jnp.ones(spatial) if importance is None else jnp.asarray(importance)
    s = {2: "h,w", 3: "e,h,w"}[flow.shape[-1]]

    def warp(values: Array, flow: Array, importance: Array) -> tuple[Array, Array]:
        points, no_derivative = displaced(flow), (0,) * flow.shape[-1]

        def sum_g(f: Array, logits: Array | None = None) -> Array:
            return _formulas.splat(f, points, logits, spatial, method, boundary, no_derivative)

        f, w = values.astype(dtype), importance.astype(dtype)[..., None]
        one, logits = jnp.ones_like(w), None
        if reduce == "softmax":
            w, logits = one, w
        out, coverage = sum_g(weighted(w, f), logits), sum_g(one)
        if reduce != "sum":
            total = sum_g(w, logits)
            hole = (coverage <= min_coverage) | (total == 0)
            fill = jnp.asarray(fill_value, dtype)
            out = jnp.where(hole, fill, ratio(out, jnp.where(hole, 1, total)))
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
        options: dict[str, Any] = {"boundary": boundary, "damping": damping}
        return complex_of(reconstruct(parts_of(values), points, shape, **options))
    dtype, kept = at_least_float32(values), is_finite(points)
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
    grid = grid.astype(at_least_float32(grid))
    n = np.array(shape[::-1])
    pixels = (grid + 1) / 2 * (n - 1) if align_corners else ((grid + 1) * n - 1) / 2
    return jnp.where(jnp.isfinite(grid), pixels, grid)


def to_normalized(
    points: Float[ArrayLike, "*S dims"], shape: Sequence[int], *, align_corners: bool
) -> Float[Array, "*S dims"]:
    """The inverse of `to_pixels`; 0 along an axis of size 1 with `align_corners`."""
    points = jnp.asarray(points)
    points = points.astype(at_least_float32(points))
    n = np.array(shape[::-1])
    aligned = jnp.where(n == 1, 0, 2 * points / np.maximum(n - 1, 1) - 1)
    grid = aligned if align_corners else (2 * points + 1) / n - 1
    return jnp.where(jnp.isfinite(points), grid, points)
