"""Gather and splat in plain jnp, where there are no kernels: called like `_ffi.call`, same results.

The formulas are those of `_formulas`; this file adds batch axes, layouts, given peaks. The
derivatives of both are compositions of them, in `_primitives`.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.extend.core import Primitive
from jax.interpreters import mlir
from jax.sharding import AbstractMesh

from jaxwarp import _formulas

Shape = tuple[int, ...]
Operands = dict[str, Any]
OF_POINTS = {"values", "points", "importance"}  # the others belong to the image
CUBICS = {-0.5: "cubic", -0.75: "bicubic"}  # the reference's names of Keys' kernels


# As a kernel does behind a custom call, jnp stands behind a primitive: on a mesh with Explicit axes
# the types of arrays say how they are sharded, which is not for the formulas of one shard.
plain_p = Primitive("jaxwarp_plain")
plain_p.multiple_results = True


def call(
    target: str, inputs: dict[str, Array], outputs: dict[str, jax.ShapeDtypeStruct], **options: Any
) -> dict[str, Array]:
    """Computes the target of that name; operands and results have names."""
    results = plain_p.bind(
        *inputs.values(),
        target=target,
        names=tuple(inputs),
        outputs=tuple((name, x.shape, np.dtype(x.dtype)) for name, x in outputs.items()),
        options=tuple(options.items()),
    )
    return dict(zip(outputs, results, strict=True))


def _abstract(*avals: Any, outputs: Any, **_: Any) -> list[Any]:
    return [jax.core.ShapedArray(shape, dtype) for _, shape, dtype in outputs]


def _lower(
    ctx: Any, *arrays: Any, target: str, names: tuple[str, ...], outputs: Any, options: Any
) -> Any:
    described = {name: jax.ShapeDtypeStruct(shape, dtype) for name, shape, dtype in outputs}

    def compute(*arrays: Array) -> list[Array]:
        with jax.sharding.use_abstract_mesh(AbstractMesh((), ())):
            inputs = dict(zip(names, arrays, strict=True))
            return list(_compute(target, inputs, described, **dict(options)).values())

    bare = [jax.core.ShapedArray(x.shape, x.dtype) for x in ctx.avals_in]
    results = [jax.core.ShapedArray(x.shape, x.dtype) for x in described.values()]
    ctx = ctx.replace(avals_in=bare, avals_out=results)
    return mlir.lower_fun(compute, multiple_results=True)(ctx, *arrays)


plain_p.def_abstract_eval(_abstract)
mlir.register_lowering(plain_p, _lower)


def _compute(
    target: str,
    inputs: dict[str, Array],
    outputs: dict[str, jax.ShapeDtypeStruct],
    *,
    method: str,
    boundary: tuple[str, ...],
    fill_value: float,
    derivative: Shape,
    displacement: bool,
    deterministic: bool,
    channels_first: bool,
    cubic_a: float,
    reduce: str = "sum",
    min_coverage: float = 0.0,
) -> dict[str, Array]:
    points = inputs["points"]
    dims = len(derivative)
    grid = points.shape[-1 - dims : -1] if displacement else points.shape[-2:-1]
    rank = points.ndim - len(grid) - 1  # of the batch axes
    operands = inputs | {"points": _formulas.displaced(points) if displacement else points}
    for name in {"image", "values"} & operands.keys() if channels_first else ():
        operands[name] = jnp.moveaxis(operands[name], rank, -1)
    for name in OF_POINTS & operands.keys():  # the axes of the grid become one
        x = operands[name]
        rest = x.shape[rank + len(grid) :]
        operands[name] = x.reshape(*x.shape[:rank], math.prod(grid), *rest)

    sampling: dict[str, Any] = {
        "method": CUBICS[cubic_a] if method == "cubic" else method,
        "boundary": boundary,
        "derivative": derivative,
    }
    if target == "jaxwarp_pick":
        one = partial(_pick, boundary=boundary)
    elif target == "jaxwarp_gather":
        one = partial(_gather, fill_value=fill_value, **sampling)
    else:
        image = outputs["image"].shape
        spatial = image[rank + 1 :] if channels_first else image[rank:-1]
        one = partial(
            _splat,
            shape=spatial,
            fill_value=fill_value,
            reduce=reduce,
            min_coverage=min_coverage,
            **sampling,
        )
    of_result = outputs["image" if target == "jaxwarp_splat" else "values"]
    results = _over_batch(one, of_result.shape[:rank], operands)
    for name in {"image", "values"} & results.keys() if channels_first else ():
        results[name] = jnp.moveaxis(results[name], -1, rank)
    return {n: results[n].reshape(out.shape).astype(out.dtype) for n, out in outputs.items()}


def _over_batch(
    function: Callable[[Operands], Operands], batch: Shape, operands: Operands
) -> Operands:
    """`function` of each element of the batch axes, where operands of size 1 are shared.

    `batch` is that of the results: an axis that is 1 there and longer in operands is summed over,
    by making it a part of the axis of the points.
    """
    if not batch:
        return function(operands)
    (size,) = jnp.broadcast_shapes(*(x.shape[:1] for x in operands.values()))
    if batch[0] == 1 != size:
        last = len(batch) - 1

        def joined(x: Array) -> Array:
            x = jnp.moveaxis(jnp.broadcast_to(x, (size, *x.shape[1:])), 0, last)
            return x.reshape(*x.shape[:last], size * x.shape[last + 1], *x.shape[last + 2 :])

        operands = {n: joined(x)[None] if n in OF_POINTS else x for n, x in operands.items()}
    shared = {n for n, x in operands.items() if x.shape[0] == 1}
    given = {n: x[0] if n in shared else x for n, x in operands.items()}
    inner = partial(_over_batch, function, batch[1:])
    if len(shared) == len(given):
        return {n: jnp.broadcast_to(x, (batch[0], *x.shape)) for n, x in inner(given).items()}
    return jax.vmap(inner, ({n: None if n in shared else 0 for n in given},))(given)


def _gather(
    operands: Operands,
    *,
    method: str,
    boundary: tuple[str, ...],
    derivative: Shape,
    fill_value: float,
) -> Operands:
    """(1), with the weight exp(importance - peak) where there is one."""
    image, points = operands["image"], operands["points"]
    image = image.astype(_formulas.at_least_float32(image))
    if "peak" not in operands:
        values = _formulas.gather(image, points, fill_value, method, boundary, derivative)
        return {"values": values}
    finite, dims = _formulas.is_finite(points), len(derivative)
    j, t = _formulas.corners(jnp.where(finite, points, 0), image.shape[:-1], method, boundary)
    g = _formulas.weights(t, method, derivative).astype(image.dtype)
    weight = _softmax_weight(operands, g, j, boundary)
    pixels = _formulas.with_ring(image, boundary, fill_value)[j]
    values = _formulas.over_corners(_formulas.weighted(weight[..., None], pixels), dims)
    return {"values": jnp.where(finite, values, jnp.nan)}


def _pick(operands: Operands, *, boundary: tuple[str, ...]) -> Operands:
    image, points, fill = (operands[name] for name in ("image", "points", "fill"))
    return {"values": _formulas.pick(image, points, boundary, fill)}


def _splat(
    operands: Operands,
    *,
    shape: Shape,
    method: str,
    boundary: tuple[str, ...],
    derivative: Shape,
    fill_value: float,
    reduce: str,
    min_coverage: float,
) -> Operands:
    """(5), and the planes that its derivatives need."""
    values, points = operands["values"], operands["points"]
    importance = operands.get("importance")
    values = values.astype(_formulas.at_least_float32(values))

    finite, dims = _formulas.is_finite(points), len(shape)
    j, t = _formulas.corners(jnp.where(finite, points, 0), shape, method, boundary)
    g = _formulas.weights(t, method, derivative).astype(values.dtype)
    g = jnp.where(_formulas.at_corners(finite, dims)[..., 0], g, 0)

    def total(g: Array, f: Array) -> Array:
        parts = _formulas.weighted(g[..., None], _formulas.at_corners(f, dims))
        return _formulas.added(parts, j, shape, boundary)

    one = jnp.ones((points.shape[0], 1), values.dtype)
    results = {"coverage": total(g, one)[..., 0]}
    divisor = results["coverage"]
    if reduce == "softmax" or "peak" in operands:
        if "peak" not in operands:
            logits = jnp.where(finite, operands["importance"][:, None], -jnp.inf)
            peak = _formulas.peaks(logits, j, t, shape, method, boundary)
            results["peak"] = _formulas.without_ring(peak, shape, boundary)
        w = _softmax_weight(results | operands, g, j, boundary)
        image, divisor = total(w, values), total(w, one)[..., 0]
    elif importance is not None:
        w = importance[:, None].astype(values.dtype)
        image, divisor = total(g, _formulas.weighted(w, values)), total(g, w)[..., 0]
    else:
        image = total(g, values)
    if reduce != "sum":
        hole = ((results["coverage"] <= min_coverage) | (divisor == 0))[..., None]
        image = jnp.where(hole, fill_value, image / jnp.where(hole, 1, divisor[..., None]))
    return results | {"image": image, "weight": divisor}


def _softmax_weight(
    operands: Operands, g: Array, j: tuple[Array, ...], boundary: tuple[str, ...]
) -> Array:
    """g exp(importance - peak) at the corners j; 0 outside, and for a logit of -inf."""
    logits = operands["importance"][:, None]
    peak = _formulas.with_ring(operands["peak"][..., None], boundary, jnp.inf)[..., 0]
    weight = _formulas.splat_weights(g, logits, peak[j])
    return jnp.where(_formulas.at_corners(logits, len(boundary))[..., 0] == -jnp.inf, 0, weight)
