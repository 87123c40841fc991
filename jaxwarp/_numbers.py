"""Complex numbers, integers, and arrays as fill: by the primitives, which know real floating-point
numbers and one number as fill."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxwarp import _formulas, _primitives
from jaxwarp._formulas import complex_of, parts_of
from jaxwarp._primitives import PLAIN, Operands, Reduction, Sampling, Shape

Fill = float | Array  # a part of the program; or an array, () or (C,)


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
        each = jnp.broadcast_to(fill, (1,) * (image.ndim - dims - 1) + (image.shape[of_image],))
        return _primitives.pick(image, points, each, sampling)
    if "constant" not in sampling.boundary:
        fill = 0.0  # nothing lies outside
    if isinstance(fill, float):
        sampling = sampling._replace(fill_value=fill)
        return _primitives.gather(image, points, sampling, forward_mode=forward_mode)
    exact = image.astype(_primitives.accumulator(image.dtype))  # the sum is rounded once
    inside = _primitives.gather(exact, points, sampling, forward_mode=forward_mode)

    # The weights outside add up to a sample of an image of zeros with 1 around it.
    shape = image.shape[-dims - 1 : -1]
    zeros = jnp.zeros((*(1,) * (image.ndim - dims - 1), *shape, 1), exact.dtype)
    around = sampling._replace(fill_value=1.0)
    share = _primitives.gather(zeros, points, around, forward_mode=forward_mode)
    share = jnp.where(jnp.isnan(share), 0, share)  # as the sample is already
    if sampling.method == "nearest":
        share = jax.lax.stop_gradient(share)  # so that an infinite fill is not multiplied by 0
    at = points.astype(jnp.promote_types(points.dtype, exact.dtype))  # as the kernels form it
    touches = _touches_outside(at, shape, sampling)  # else even an infinite fill does nothing
    outside = jnp.where(touches[..., None], fill.astype(exact.dtype), 0)
    return (inside + _formulas.weighted(share, outside)).astype(image.dtype)


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
    planes: Operands = {"weight": results["coverage"]} | results
    hole = _primitives.holes(planes["coverage"], planes["weight"], reduction)
    image = jnp.where(hole[..., None], fill.astype(values.dtype), results["image"])
    return results | {"image": image}


def _touches_outside(points: Array, shape: Shape, sampling: Sampling) -> Array:
    """May a corner of a point lie outside an image of spatial `shape`? (*B, *S)"""
    if sampling.displacement:
        points = _formulas.displaced(points)
    _, taps = _formulas.METHODS[sampling.method]
    before, behind = -min(taps), max(1, *taps)  # "nearest" is one of two pixels
    inside = jnp.ones(points.shape[:-1], bool)
    for a, boundary in enumerate(sampling.boundary):
        if boundary == "constant":
            at = points[..., a]
            inside &= (at >= before) & (at < shape[-1 - a] - behind)
    return ~inside


def _parts_of_fill(fill: Fill, channels: int) -> Fill:
    if isinstance(fill, float) and fill == 0:
        return fill
    return parts_of(jnp.broadcast_to(fill, (channels,)))
