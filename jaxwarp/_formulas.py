"""The mathematics of a gather and a splat in plain jnp, of one image and any shape of points.

What `jaxwarp.reference` is made of; and, where there are no kernels, the operations themselves.
Nothing here knows of kernels. Equation numbers are those of Zhiwei Xu, "Notes: CUDA Implementation
of Differentiable Image Warping" (2021). Shapes: image ``(*shape, C)``, points ``(*S, dims)`` in
pixels, ``(x, y[, z])``; `boundary` and `derivative` are tuples in the same order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike, DTypeLike

Boundaries = tuple[str, ...]  # along x, y[, z]
Taps = dict[int, tuple[float, ...]]  # tap -> coefficients of its weight


def keys(a: float) -> Taps:
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
METHODS: dict[str, tuple[Callable[[Array], Array], Taps]] = {
    "nearest": (jnp.round, {0: (1.0,)}),  # jnp.round takes ties to even
    "linear": (jnp.floor, {0: (-1.0, 1.0), 1: (1.0, 0.0)}),
    "cubic": (jnp.floor, keys(-0.5)),
    "bicubic": (jnp.floor, keys(-0.75)),
}
PERIODS: dict[str, Callable[[int], ArrayLike]] = {
    "mirror": lambda n: jnp.maximum(2 * n - 2, 1),  # n may be a symbolic size, of which max is none
    "reflect": lambda n: 2 * n,
    "wrap": lambda n: n,
}


# gather and splat form a family that is closed under differentiation: d/dp_a of a member is the
# member with derivative[a] raised by one. Said to JAX as a rule, and not left to the product rule
# of g * I(j), a NaN pixel reaches exactly the derivatives whose weight at that pixel is not 0.
# With the weights of "softmax" splat stays in it: d/dl_i multiplies f_i, and the peak m_j, on which
# the result of (5) does not depend, is a constant.


@partial(jax.custom_jvp, nondiff_argnums=(3, 4, 5))
def gather(
    image: Array,
    points: Array,
    fill_value: ArrayLike,
    method: str,
    boundary: Boundaries,
    derivative: tuple[int, ...],
) -> Array:
    out = interpolate(image, points, fill_value, method, boundary, derivative, product=weighted)
    far = 0.0 if any(derivative) else fill_value
    beyond = jnp.where(is_nowhere(points, boundary), jnp.nan, far)
    return jnp.where(is_finite(points), out, beyond)


@gather.defjvp
def gather_jvp(
    method: str,
    boundary: Boundaries,
    derivative: tuple[int, ...],
    primals: tuple[Array, Array, ArrayLike],
    tangents: tuple[Array, Array, ArrayLike],
) -> tuple[Array, Array]:
    (image, points, fill), (d_image, d_points, d_fill) = primals, tangents
    out_dot = interpolate(d_image, points, d_fill, method, boundary, derivative)
    if not any(derivative):  # infinitely far outside
        out_dot += jnp.where(is_finite(points) | is_nowhere(points, boundary), 0, d_fill)
    for a, raised in enumerate(raised_orders(derivative)):
        slope = gather(image, points, fill, method, boundary, raised)
        out_dot += slope * d_points[..., a, None].astype(image.dtype)
    return gather(image, points, fill, method, boundary, derivative), out_dot


@partial(jax.custom_jvp, nondiff_argnums=(3, 4, 5, 6))
def splat(
    values: Array,
    points: Array,
    logits: Array | None,
    shape: tuple[int, ...],
    method: str,
    boundary: Boundaries,
    derivative: tuple[int, ...],
) -> Array:
    return scatter(values, points, logits, shape, method, boundary, derivative, product=weighted)


@splat.defjvp
def splat_jvp(
    shape: tuple[int, ...],
    method: str,
    boundary: Boundaries,
    derivative: tuple[int, ...],
    primals: tuple[Array, Array, Array | None],
    tangents: tuple[Array, Array, Array | None],
) -> tuple[Array, Array]:
    (values, points, logits), (d_values, d_points, d_logits) = primals, tangents
    if d_logits is not None:
        d_values += values * d_logits
    out_dot = scatter(d_values, points, logits, shape, method, boundary, derivative)
    for a, raised in enumerate(raised_orders(derivative)):
        moved = values * d_points[..., a, None].astype(values.dtype)
        out_dot += scatter(moved, points, logits, shape, method, boundary, raised)
    return splat(values, points, logits, shape, method, boundary, derivative), out_dot


@jax.custom_jvp
def weighted(w: Array, f: Array) -> Array:
    """w * f, where a weight of 0 hides even a NaN."""
    return jnp.where(w == 0, 0, w * f)


weighted.defjvps(lambda d_w, _, w, f: d_w * f, lambda d_f, _, w, f: w * d_f)


@jax.custom_jvp
def ratio(numerator: Array, denominator: Array) -> Array:
    """N / D, differentiated as (dN - out dD) / D, as in (6): D ** 2 may be too small a number."""
    return numerator / denominator


ratio.defjvps(lambda d_n, _, n, d: d_n / d, lambda d_d, out, n, d: -out * (d_d / d))


@jax.custom_jvp
def exponential(logit: Array, peak: Array) -> Array:
    """w_ij = exp(l_i - m_j), with the exponent clipped at 0; the peak m_j has no derivative."""
    return jnp.exp(jnp.where(logit == peak, 0, jnp.minimum(logit - peak, 0)))


exponential.defjvps(lambda d_logit, w, logit, peak: w * d_logit, None)


def interpolate(
    image: Array,
    points: Array,
    fill_value: ArrayLike,
    method: str,
    boundary: Boundaries,
    derivative: tuple[int, ...],
    product: Callable[[Array, Array], Array] = jnp.multiply,
) -> Array:
    """sum_j g(p, j) I(j) of (1); 0 at a position that is not finite."""
    finite = is_finite(points)
    at = jnp.where(finite, points, 0)
    j, g = corners(at, image.shape[:-1], method, boundary, derivative)
    padded = with_ring(image, boundary, fill_value)
    out = jnp.sum(product(g.astype(image.dtype)[..., None], padded[j]), axis=-2)
    return jnp.where(finite, out, 0)


def total(
    values: Array,
    points: Array,
    logits: Array | None,
    shape: tuple[int, ...],
    method: str,
    boundary: Boundaries,
    derivative: tuple[int, ...],
) -> Array:
    """sum_i w_ij g(p_i, j) f_i of (5), without the sources at positions that are not finite.

    And without those with a logit of -inf, whose weight is 0 even where they are alone.
    """
    kept = is_finite(points)
    points = jnp.where(kept, points, 0)
    if logits is not None:
        kept &= logits != -jnp.inf
        logits = jnp.where(kept, logits, -jnp.inf)
    values = jnp.where(kept, values, 0)
    return splat(values, points, logits, shape, method, boundary, derivative)


def scatter(
    values: Array,
    points: Array,
    logits: Array | None,
    shape: tuple[int, ...],
    method: str,
    boundary: Boundaries,
    derivative: tuple[int, ...],
    product: Callable[[Array, Array], Array] = jnp.multiply,
) -> Array:
    """sum_i w_ij g(p_i, j) f_i of (5), where w is 1 or, with logits (*S, 1), that of "softmax"."""
    j, g = corners(points, shape, method, boundary, derivative)
    g = g.astype(values.dtype)
    if logits is not None:
        peak = peaks(points, logits.astype(values.dtype), shape, method, boundary)
        g = weighted(g, exponential(logits, peak[j]))
    return added(product(g[..., None], values[..., None, :]), j, shape, boundary)


def added(
    parts: Array, j: tuple[Array, ...], shape: tuple[int, ...], boundary: Boundaries
) -> Array:
    """The image of which every corner j gets its part, (*S, K, C) -> (*shape, C)."""
    empty = jnp.zeros((*shape, parts.shape[-1]), parts.dtype)
    # What falls outside is added to the ring, and cut off with it.
    return without_ring(with_ring(empty, boundary, 0).at[j].add(parts), shape, boundary)


def peaks(
    points: Array, logits: Array, shape: tuple[int, ...], method: str, boundary: Boundaries
) -> Array:
    """m_j of "softmax", in the padded image; -inf where no source has a weight."""
    j, g = corners(points, shape, method, boundary, (0,) * len(shape))
    counts = (g.astype(logits.dtype) > 0) & ~jnp.isnan(logits)
    sizes = [n + sum(ring) for n, ring in zip(shape, ring_of(boundary), strict=True)]
    peak = jnp.full(sizes, -jnp.inf, logits.dtype)
    return peak.at[j].max(jnp.where(counts, logits, -jnp.inf))


def is_finite(points: Array) -> Array:
    return jnp.isfinite(points).all(-1, keepdims=True)


def is_nowhere(points: Array, boundary: Boundaries) -> Array:
    """Is a coordinate NaN, or infinite along an axis whose boundary is not "constant"?"""
    nowhere = jnp.isnan(points).any(-1)
    for a, along in enumerate(boundary):
        if along != "constant":
            nowhere |= jnp.isinf(points[..., a])
    return nowhere[..., None]


def pick(image: Array, points: Array, boundary: Boundaries, fill_value: ArrayLike) -> Array:
    """(1) by "nearest" of an image of integers or bools: the pixel itself."""
    *shape, channels = image.shape
    if any(n == 0 for n in shape):
        return jnp.broadcast_to(fill_value, (*points.shape[:-1], channels))
    finite = is_finite(points)
    at, no_derivative = jnp.where(finite, points, 0), (0,) * len(boundary)
    j, _ = corners(at, shape, "nearest", boundary, no_derivative)
    inside, index = finite[..., 0], []
    for padded, n, (margin, _) in zip(j, shape, ring_of(boundary), strict=True):
        i = padded[..., 0] - margin
        inside &= (i >= 0) & (i < n)
        index.append(jnp.clip(i, 0, n - 1))
    return jnp.where(inside[..., None], image[tuple(index)], fill_value)


def raised_orders(derivative: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """The orders after one more derivative along x, y[, z]."""
    for a in range(len(derivative)):
        yield tuple(k + (a == b) for b, k in enumerate(derivative))


def corners(
    points: Array,
    shape: Sequence[int],
    method: str,
    boundary: Boundaries,
    derivative: Sequence[int],
) -> tuple[tuple[Array, ...], Array]:
    """The corners j of every finite point: indices into the padded image, and weights g(p, j).

    d index arrays (*S, K) and one weight array (*S, K), where K = taps ** d.
    """
    d = len(shape)
    taps = [  # one pair (indices, weights), each (*S, taps), per axis of the image: z, y, x
        axis_taps(points[..., a], shape[d - 1 - a], method, boundary[a], derivative[a])
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


def axis_taps(x: Array, n: int, method: str, boundary: str, order: int) -> tuple[Array, Array]:
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
    weight = jnp.stack([polynomial(p, t) for p in derived], axis=-1)
    return index_of(index, n, boundary), weight


def polynomial(coefficients: Sequence[float], t: Array) -> Array:
    value = jnp.zeros_like(t)
    for coefficient in coefficients:
        value = value * t + coefficient
    return value


def index_of(i: Array, n: int, boundary: str) -> Array:
    """Where integer pixel i lies along an axis of length n, counted in the padded image."""
    if boundary == "constant":
        return jnp.clip(i, -1, n) + margin_of(boundary)
    if boundary == "nearest":
        return jnp.clip(i, 0, n - 1)
    i = jnp.mod(i, PERIODS[boundary](n))
    return jnp.where(i < n, i, 2 * n - (2 if boundary == "mirror" else 1) - i)


def margin_of(boundary: str) -> int:
    return 1 if boundary == "constant" else 0


def ring_of(boundary: Boundaries) -> list[tuple[int, int]]:
    """How many pixels stand for what is outside, before and behind each axis of an image."""
    return [(margin_of(along), margin_of(along)) for along in reversed(boundary)]


def with_ring(image: Array, boundary: Boundaries, value: ArrayLike) -> Array:
    """The image with what is outside: one ring of `value` is all of it."""
    ring = [*ring_of(boundary), (0, 0)]
    inside = jnp.pad(jnp.ones((*image.shape[:-1], 1), bool), ring)
    return jnp.where(inside, jnp.pad(image, ring), value)


def without_ring(padded: Array, shape: Sequence[int], boundary: Boundaries) -> Array:
    ring = zip(shape, ring_of(boundary), strict=True)
    return padded[tuple(slice(margin, margin + n) for n, (margin, _) in ring)]


def boundaries_of(boundary: str | Sequence[str], dims: int) -> Boundaries:
    return (boundary,) * dims if isinstance(boundary, str) else tuple(boundary)


def parts_of(x: Array, axis: int = -1) -> Array:
    """Real and imaginary part of each channel side by side, along the axis of the channels: so an
    array that is sharded over its channels stays where it is."""
    shape = list(x.shape)
    shape[axis] *= 2
    return jnp.stack([x.real, x.imag], axis).reshape(shape)


def complex_of(parts: Array, axis: int = -1) -> Array:
    """The inverse of `parts_of`."""
    at = parts.ndim + axis
    pairs = parts.reshape(*parts.shape[:at], parts.shape[at] // 2, 2, *parts.shape[at + 1 :])
    real, imaginary = (jax.lax.index_in_dim(pairs, i, at + 1, keepdims=False) for i in (0, 1))
    return jax.lax.complex(real, imaginary)


def displaced(flow: Array) -> Array:
    """p = q + flow[q], formed at least in float32."""
    dtype, dims = at_least_float32(flow), flow.shape[-1]
    return pixel_positions(flow.shape[-1 - dims : -1], dtype) + flow.astype(dtype)


def at_least_float32(array: Array) -> DTypeLike:
    return jnp.promote_types(array.dtype, jnp.float32)


def pixel_positions(shape: Sequence[int], dtype: DTypeLike) -> Array:
    """(*shape, dims)"""
    axes = jnp.meshgrid(*(jnp.arange(n, dtype=dtype) for n in shape), indexing="ij")
    return jnp.stack(axes[::-1], axis=-1)
