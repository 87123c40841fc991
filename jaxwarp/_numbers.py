"""Complex numbers, integers, and arrays as fill: by the primitives, which know real floating-point
numbers and one number as fill."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.custom_derivatives import SymbolicZero

from jaxwarp import _formulas, _primitives
from jaxwarp._formulas import apart, complex_of, parts_of, side_by_side
from jaxwarp._primitives import PLAIN, Operands, Reduction, Sampling, Shape

Fill = float | Array  # a part of the program; or an array, () or (C,)
PIECE = 16  # bits of an integer that go into one channel: so many are exact in float32


def gather(
    image: Array, points: Array, sampling: Sampling, fill: Fill, *, forward_mode: bool
) -> Array:
    """`_primitives.gather` of an image of any dtype; of an integer one the fill has its dtype."""
    dims = points.shape[-1]
    of_image = sampling.channel_axis(dims + 1)
    of_values = sampling.channel_axis(dims + 1 if sampling.displacement else 2)
    if jnp.iscomplexobj(image):
        fill = _parts_of_fill(fill, image.shape[of_image])
        parts = parts_of(image, of_image)
        out = gather(parts, points, sampling, fill, forward_mode=forward_mode)
        return complex_of(out, of_values)
    if not jnp.issubdtype(image.dtype, jnp.floating):
        # Nothing moves as the points do, so neither mode of differentiation is asked for more.
        points = jax.lax.stop_gradient(points)
        pieces = _pieces(image)
        sampling = sampling._replace(fill_value=-1.0)  # which no piece is
        out = _primitives.gather(side_by_side(pieces, of_image), points, sampling)
        found = apart(out, len(pieces), of_values)
        return jnp.where(found[0] >= 0, _whole(found, image.dtype), fill)
    if "constant" not in sampling.boundary:
        fill = 0.0  # nothing lies outside
    if isinstance(fill, float):
        sampling = sampling._replace(fill_value=fill)
        return _primitives.gather(image, points, sampling, forward_mode=forward_mode)
    exact = image.astype(_primitives.accumulator(image.dtype))  # the sum is rounded once
    inside = _primitives.gather(exact, points, sampling, forward_mode=forward_mode)
    points = points.astype(jnp.promote_types(points.dtype, exact.dtype))
    outside = _outside(points, fill.astype(exact.dtype), image.shape[-dims - 1 : -1], sampling)
    return (inside + outside).astype(image.dtype)


def splat(
    values: Array,
    points: Array,
    importance: Array | None,
    shape: Shape,
    sampling: Sampling,
    reduction: Reduction = PLAIN,
    fill: Fill = 0.0,
    *,
    forward_mode: bool,
) -> Operands:
    """`_primitives.splat` of values of any dtype but integers."""
    rest: dict[str, Any] = {"reduction": reduction, "forward_mode": forward_mode}
    if jnp.iscomplexobj(values):
        fill = _parts_of_fill(fill, values.shape[-1])
        results = splat(parts_of(values), points, importance, shape, sampling, fill=fill, **rest)
        return results | {"image": complex_of(results["image"])}
    if isinstance(fill, float):
        sampling = sampling._replace(fill_value=fill)
        return _primitives.splat(values, points, importance, shape, sampling, **rest)
    results = _primitives.splat(values, points, importance, shape, sampling, **rest)
    coverage = results["coverage"]
    divisor = results.get("weight", coverage)
    hole = _primitives.holes(coverage, divisor, reduction)
    image = jnp.where(hole[..., None], fill.astype(values.dtype), results["image"])
    return results | {"image": image}


@partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def _outside(points: Array, fill: Array, shape: Shape, sampling: Sampling) -> Array:
    """What the corners outside an image of spatial `shape` add to each sample, (*B, *S, C)."""
    share = _share_outside(points, shape, sampling).astype(fill.dtype)
    return _formulas.weighted(share[..., None], fill)


@partial(_outside.defjvp, symbolic_zeros=True)
def _outside_jvp(shape: Shape, sampling: Sampling, primals: Any, tangents: Any) -> Any:
    """As of the whole family, d/dp_a raises the order of the weights along a."""
    (points, fill), (d_points, d_fill) = primals, tangents
    out = _outside(points, fill, shape, sampling)
    d_out = jnp.zeros_like(out)
    if not isinstance(d_fill, SymbolicZero):
        d_out += _share_outside(points, shape, sampling).astype(fill.dtype)[..., None] * d_fill
    if not isinstance(d_points, SymbolicZero):
        for a in range(points.shape[-1]):
            slope = _outside(points, fill, shape, sampling.raised(a))
            d_out += slope * d_points[..., a, None].astype(fill.dtype)
    return out, d_out


def _share_outside(points: Array, shape: Shape, sampling: Sampling) -> Array:
    """Of every point, the sum of its weights outside, (*B, *S).

    Weights are products along the axes, so this takes no corners: all weights along some axes add
    up to `inside` and `outside`, and one axis more makes four products of them.
    """
    if sampling.displacement:
        points = _formulas.displaced(points)
    finite = _formulas.is_finite(points)
    at = jnp.where(finite, points, 0)
    inside, outside = jnp.ones_like(at[..., 0]), jnp.zeros_like(at[..., 0])
    for a, (boundary, order) in enumerate(zip(sampling.boundary, sampling.derivative, strict=True)):
        n = shape[-1 - a]
        index, weight = _formulas.axis_taps(at[..., a], n, sampling.method, boundary, order)
        beyond = ((index < 1) | (index > n)) & (boundary == "constant")
        along = jnp.where(beyond, 0, weight).sum(-1)
        past = jnp.where(beyond, weight, 0).sum(-1)
        outside = outside * (along + past) + inside * past
        inside = inside * along
    # Infinitely far outside all of the weights are, and nowhere none, where the sample is NaN.
    nowhere = _formulas.is_nowhere(points, sampling.boundary)[..., 0]
    far = jnp.where(nowhere | any(sampling.derivative), 0, 1)
    return jnp.where(finite[..., 0], outside, far)


def _parts_of_fill(fill: Fill, channels: int) -> Fill:
    if isinstance(fill, float) and fill == 0:
        return fill
    return parts_of(jnp.broadcast_to(fill, (channels,)))


def _pieces(image: Array) -> list[Array]:
    """An image of integers or bools as images of float32: of PIECE bits each, not negative."""
    if image.dtype.kind == "b":
        return [image.astype(jnp.float32)]
    unsigned, shifts = _layout(image.dtype)
    words = jax.lax.bitcast_convert_type(image, unsigned)
    return [((words >> shift) & (2**PIECE - 1)).astype(jnp.float32) for shift in shifts]


def _whole(pieces: list[Array], dtype: np.dtype) -> Array:
    """The inverse of `_pieces`; of pieces below 0, or NaN, some number."""
    if dtype.kind == "b":
        return pieces[0] > 0
    unsigned, shifts = _layout(dtype)
    words = [
        jnp.where(piece > 0, piece, 0).astype(unsigned) << shift
        for piece, shift in zip(pieces, shifts, strict=True)
    ]
    return jax.lax.bitcast_convert_type(sum(words[1:], words[0]), dtype)


def _layout(dtype: np.dtype) -> tuple[np.dtype, range]:
    bits = 8 * dtype.itemsize
    return np.dtype(f"uint{bits}"), range(0, bits, PIECE)
