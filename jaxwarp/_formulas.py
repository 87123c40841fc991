"""The mathematics of a gather and a splat in plain jnp, of one image and any shape of points.

What `jaxwarp.reference` is made of; and, where there are no kernels, the operations themselves.
Nothing here knows of kernels. Equation numbers are those of Zhiwei Xu, "Notes: CUDA Implementation
of Differentiable Image Warping" (2021). Shapes: image ``(*shape, C)``, points ``(*S, dims)`` in
pixels, ``(x, y[, z])``; `boundary` and `derivative` are tuples in the same order.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from functools import partial, reduce

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


# sampled() and shares() form a family that is closed under differentiation: d/dt_a of a member is
# the member with derivative[a] raised by one. Said to JAX as a rule, and not left to the product
# rule of g * I(j), a NaN pixel reaches exactly the derivatives whose weight at that pixel is not 0.
# With the weights of "softmax" shares() stays in it: d/dl_i multiplies f_i.


@partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def sampled(pixels: Array, t: Array, method: str, derivative: tuple[int, ...]) -> Array:
    """sum_j g(p, j) I(j) of (1), from the pixels (*S, *box, C) at the corners: (*S, C)."""
    g = weights(t, method, derivative).astype(pixels.dtype)
    return over_corners(weighted(g[..., None], pixels), len(derivative))


@sampled.defjvp
def sampled_jvp(
    method: str,
    derivative: tuple[int, ...],
    primals: tuple[Array, Array],
    tangents: tuple[Array, Array],
) -> tuple[Array, Array]:
    (pixels, t), (d_pixels, d_t) = primals, tangents
    g = weights(t, method, derivative).astype(pixels.dtype)
    out_dot = over_corners(g[..., None] * d_pixels, len(derivative))
    for d_along, raised in zip(along_axes(d_t), raised_orders(derivative), strict=True):
        out_dot += sampled(pixels, t, method, raised) * d_along[..., None].astype(pixels.dtype)
    return sampled(pixels, t, method, derivative), out_dot


@partial(jax.custom_jvp, nondiff_argnums=(4, 5))
def shares(
    values: Array,
    logits: Array | None,
    peak: Array | None,
    t: Array,
    method: str,
    derivative: tuple[int, ...],
) -> Array:
    """w_ij g(p_i, j) f_i of (5), for each corner: (*S, *box, C).

    w is 1 or, with logits (*S, 1) and their peaks at the corners (*S, *box), that of "softmax".
    """
    w = splat_weights(weights(t, method, derivative).astype(values.dtype), logits, peak)
    return weighted(w[..., None], at_corners(values, len(derivative)))


@shares.defjvp
def shares_jvp(
    method: str,
    derivative: tuple[int, ...],
    primals: tuple[Array, Array | None, Array | None, Array],
    tangents: tuple[Array, Array | None, Array | None, Array],
) -> tuple[Array, Array]:
    (values, logits, peak, t), (d_values, d_logits, _, d_t) = primals, tangents

    # An infinite value is a factor of every corner: its cotangent's slopes are added up before it
    # comes in, as in the kernels.
    def moved(values: Array, order: tuple[int, ...]) -> Array:
        w = splat_weights(weights(t, method, order).astype(values.dtype), logits, peak)
        return w[..., None] * at_corners(values, len(order))

    if d_logits is not None:
        d_values += values * d_logits
    out_dot = moved(d_values, derivative)
    for d_along, raised in zip(along_axes(d_t), raised_orders(derivative), strict=True):
        out_dot += moved(values * d_along[..., None].astype(values.dtype), raised)
    return shares(values, logits, peak, t, method, derivative), out_dot


def splat_weights(g: Array, logits: Array | None, peak: Array | None) -> Array:
    """w_ij g(p_i, j) of (5), for logits and peak see `shares`."""
    if logits is None or peak is None:
        return g
    dims = g.ndim - logits.ndim + 1
    return weighted(g, exponential(at_corners(logits, dims)[..., 0], peak))


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


def gather(
    image: Array,
    points: Array,
    fill_value: ArrayLike,
    method: str,
    boundary: Boundaries,
    derivative: tuple[int, ...],
) -> Array:
    """(1); the fill infinitely far outside, and NaN where the position is none."""
    finite, nowhere = is_finite(points), is_nowhere(points, boundary)
    j, t = corners(jnp.where(finite, points, 0), image.shape[:-1], method, boundary)
    out = sampled(with_ring(image, boundary, fill_value)[j], t, method, derivative)
    # The sine of what is not finite is NaN, and so is each of its derivatives.
    nan = jnp.sin(jnp.where(nowhere, points, 0).sum(-1, keepdims=True)).astype(out.dtype)
    far = 0.0 if any(derivative) else fill_value
    return jnp.where(finite, out, jnp.where(nowhere, nan, far))


def splat(
    values: Array,
    points: Array,
    logits: Array | None,
    shape: tuple[int, ...],
    method: str,
    boundary: Boundaries,
    derivative: tuple[int, ...],
) -> Array:
    """sum_i w_ij g(p_i, j) f_i of (5), where w is 1 or, with logits (*S, 1), that of "softmax".

    Without the sources at positions that are not finite, and without those with a logit of -inf,
    whose weight is 0 even where they are alone.
    """
    kept = is_finite(points)
    if logits is not None:
        kept &= logits != -jnp.inf
    j, t = corners(jnp.where(kept, points, 0), shape, method, boundary)
    peak = None
    if logits is not None:
        logits = jnp.where(kept, logits, -jnp.inf).astype(values.dtype)
        peak = peaks(logits, j, t, shape, method, boundary)[j]
    parts = shares(jnp.where(kept, values, 0), logits, peak, t, method, derivative)
    return added(parts, j, shape, boundary)


def added(
    parts: Array, j: tuple[Array, ...], shape: tuple[int, ...], boundary: Boundaries
) -> Array:
    """The image of which every corner j gets its part, (*S, *box, C) -> (*shape, C)."""
    empty = jnp.zeros((*shape, parts.shape[-1]), parts.dtype)
    # What falls outside is added to the ring, and cut off with it.
    return without_ring(with_ring(empty, boundary, 0).at[j].add(parts), shape, boundary)


def peaks(
    logits: Array,
    j: tuple[Array, ...],
    t: Array,
    shape: tuple[int, ...],
    method: str,
    boundary: Boundaries,
) -> Array:
    """m_j of "softmax", in the padded image; -inf where no source has a weight.

    Constants, since the result of (5) does not depend on them.
    """
    logits, t = jax.lax.stop_gradient((at_corners(logits, len(shape))[..., 0], t))
    g = weights(t, method, (0,) * len(shape)).astype(logits.dtype)
    counts = (g > 0) & ~jnp.isnan(logits)
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
    j, _ = corners(jnp.where(finite, points, 0), shape, "nearest", boundary)
    inside, index = finite[..., 0], []
    for padded, n, (margin, _) in zip(j, shape, ring_of(boundary), strict=True):
        i = padded.reshape(inside.shape) - margin  # of the one corner
        inside &= (i >= 0) & (i < n)
        index.append(jnp.clip(i, 0, n - 1))
    return jnp.where(inside[..., None], image[tuple(index)], fill_value)


def raised_orders(derivative: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """The orders after one more derivative along x, y[, z]."""
    for a in range(len(derivative)):
        yield tuple(k + (a == b) for b, k in enumerate(derivative))


# The corners of a point form a box with the axes of an image, [z,] y, x, each as long as the taps.


def corners(
    points: Array, shape: Sequence[int], method: str, boundary: Boundaries
) -> tuple[tuple[Array, ...], Array]:
    """The corners j of every finite point, as indices into the padded image, and t = x - base.

    There is an array of indices for each axis of the image; they broadcast to (*S, *box). t is
    (*S, dims).
    """
    rounding, taps = METHODS[method]
    base = rounding(jax.lax.stop_gradient(points))
    index = []
    for a, (along, x) in enumerate(zip(boundary, along_axes(base), strict=True)):
        n = shape[len(shape) - 1 - a]
        # Brought near before it becomes an integer, so that 1e30 is an ordinary position: by whole
        # periods, or to where every tap is still outside.
        near = jnp.mod(x, PERIODS[along](n)) if along in PERIODS else jnp.clip(x, -3, n + 2)
        i = index_of(near.astype(int)[..., None] + np.array(list(taps)), n, along)
        index.append(in_box(i, a, len(shape)))
    return tuple(reversed(index)), points - base


def weights(t: Array, method: str, derivative: tuple[int, ...]) -> Array:
    """The weights g(p, j) of the corners, (*S, *box), differentiated along each axis."""
    _, taps = METHODS[method]
    factors = []
    for a, (order, x) in enumerate(zip(derivative, along_axes(t), strict=True)):
        derived = np.array([np.polyder(p, order) for p in taps.values()])  # (taps, powers)
        along = jnp.zeros((*x.shape, len(taps)), t.dtype)
        for coefficients in derived.T.astype(t.dtype):
            along = along * x[..., None] + coefficients
        factors.append(in_box(along, a, len(derivative)))
    return reduce(operator.mul, reversed(factors))


def along_axes(points: Array) -> list[Array]:
    """The coordinates x, y[, z], each (*S,)."""
    last = points.ndim - 1
    return [
        jax.lax.index_in_dim(points, a, last, keepdims=False) for a in range(points.shape[last])
    ]


def in_box(of_taps: Array, axis: int, dims: int) -> Array:
    """What corners with the same tap along that axis share: (*S, taps) -> (*S, *box)."""
    return jnp.expand_dims(of_taps, [i for i in range(-dims, 0) if i != -1 - axis])


def at_corners(of_points: Array, dims: int) -> Array:
    """What is the same for all corners of a point: (*S, C) -> (*S, *box, C)."""
    return jnp.expand_dims(of_points, tuple(range(-1 - dims, -1)))


def over_corners(parts: Array, dims: int) -> Array:
    """The sum over the corners of a point: (*S, *box, C) -> (*S, C)."""
    return jnp.sum(parts, axis=tuple(range(-1 - dims, -1)))


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
