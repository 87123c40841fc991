"""One family of primitives, closed under differentiation.

This file and `_plain` alone know jax.interpreters.

    gather_p   image, points[, importance, peak] -> values             (1)
    pick_p     image, points, fill -> values    the same of any dtype, by "nearest"; plain jnp
    splat_p    values, points[, importance[, peak]] -> image[, coverage ...]   (5)
    *_vjp_p    the fused adjoint of each, (2) and (6): one kernel for all cotangents asked for
    *_tangent_p  how the result moves with all operands, in one kernel: jvp; the fused adjoint is
                 its transpose, and it is that of the fused adjoint
    gather_vjp_tangent_p  the same for (2), of the points: second order

Every operand has the same number of leading batch axes, each of the common size or of size 1, which
broadcasts without a copy; vmap adds such an axis. So vmap is done before differentiation, and the
cotangent of an operand that a batch shares is one buffer, summed inside the kernel.

d/dp_a of a gather or a plain splat is the same operation with derivative order a raised by one, so
derivatives of any order stay within the family. For softmax both take a weight, exp(importance -
peak), of which the peak is a constant and the derivative in the importance is the weight itself.
"""

from collections.abc import Callable
from functools import lru_cache, partial
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.custom_derivatives import SymbolicZero
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.typing import DTypeLike

from jaxwarp import _ffi, _formulas, _plain, _sharding
from jaxwarp._sharding import BATCH, CHANNEL, COORDINATE, GRID, SPATIAL, Labels, Shard

# Dicts of operands and results are in the order of their names, as jax orders a dict.
Shape = tuple[int, ...]
Operands = dict[str, Any]  # name -> array or shape and dtype
Wants = tuple[tuple[str, Shape], ...]  # operand -> batch axes of its cotangent
MAX_BATCH = 6  # kMaxBatch of the kernels


class Sampling(NamedTuple):
    """How a position becomes corners and weights. Static, hashable."""

    method: str
    boundary: tuple[str, ...]  # along x, y[, z]
    fill_value: float
    derivative: Shape  # order along x, y[, z]
    displacement: bool  # points are a flow field: position = pixel + flow
    deterministic: bool  # the same bits in every run on a GPU; on a CPU they always are
    channels_first: bool = False  # images (C, *shape) and values (C, N)
    cubic_a: float = -0.5  # the parameter of Keys' cubic kernel

    def raised(self, axis: int) -> "Sampling":
        order = tuple(k + (a == axis) for a, k in enumerate(self.derivative))
        return self._replace(derivative=order)

    def channel_axis(self, rank: int) -> int:
        """Of an image or of values with `rank` axes behind the batch axes."""
        return -rank if self.channels_first else -1

    def with_channels(self, extent: Shape, channels: int, rank: int) -> Shape:
        """The shape of an image or of values: `extent` with batch axes, and the channels."""
        at = len(extent) + 1 + self.channel_axis(rank)
        return (*extent[:at], channels, *extent[at:])

    def linear(self) -> "Sampling":
        """The part that is linear in the image."""
        return self._replace(fill_value=0.0)


class Reduction(NamedTuple):
    """How a splat combines what reaches one target. Static, hashable."""

    reduce: str  # "sum", "average" or "softmax"
    min_coverage: float
    coverage: bool  # is the coverage a result?

    @property
    def needs_coverage(self) -> bool:
        return self.coverage or self.divides

    @property
    def divides(self) -> bool:
        return self.reduce != "sum"


PLAIN = Reduction("sum", 0.0, False)


def accumulator(dtype: DTypeLike) -> np.dtype:
    """The dtype in which sums of `dtype` are taken, and weights of points of `dtype`."""
    wide = np.dtype(dtype) in (np.float64, np.complex128)
    return np.dtype(np.float64 if wide else np.float32)


# ---------------------------------------------------------------------------- shapes


def _core(name: str, dims: int, sampling: Sampling) -> Labels:
    """The axes of an operand behind its batch axes."""
    kind = name.removeprefix("d_").removeprefix("ct_")
    spatial = tuple(f"{SPATIAL}{a}" for a in range(dims))
    grid = tuple(f"{GRID}{a}" for a in range(dims if sampling.displacement else 1))
    if kind == "points":
        return (*grid, COORDINATE)
    if kind == "importance":
        return grid
    if kind == "fill":
        return (CHANNEL,)
    if kind in ("coverage", "weight", "peak"):
        return spatial
    extent = grid if kind == "values" else spatial
    return (CHANNEL, *extent) if sampling.channels_first else (*extent, CHANNEL)


def _split(operands: Operands, sampling: Sampling) -> dict[str, tuple[Shape, Shape]]:
    """Batch axes and the axes behind them, of each operand."""
    dims = operands["points"].shape[-1]
    split = {}
    for name, x in operands.items():
        batch = len(x.shape) - len(_core(name, dims, sampling))
        split[name] = (tuple(x.shape[:batch]), tuple(x.shape[batch:]))
    return split


def _labels(arrays: Operands, sampling: Sampling) -> dict[str, Labels]:
    """The axes of operands and results, for `_sharding`."""
    split = _split(arrays, sampling)
    common = jnp.broadcast_shapes(*(batch for batch, _ in split.values()))
    dims = arrays["points"].shape[-1]
    return {
        name: tuple(f"{BATCH}{i}" if n == common[i] != 1 else None for i, n in enumerate(batch))
        + _core(name, dims, sampling)
        for name, (batch, _) in split.items()
    }


def _gather_outputs(operands: Operands, sampling: Sampling, **_: Any) -> Operands:
    split = _split(operands, sampling)
    batch = jnp.broadcast_shapes(*(b for b, _ in split.values()))
    image, grid = split["image"][1], split["points"][1][:-1]
    channels = image[sampling.channel_axis(len(image))]
    shape = sampling.with_channels((*batch, *grid), channels, len(grid) + 1)
    return {"values": jax.ShapeDtypeStruct(shape, operands["image"].dtype)}


def _splat_outputs(
    operands: Operands, sampling: Sampling, shape: Shape, reduction: Reduction, **_: Any
) -> Operands:
    dtype = operands["values"].dtype
    exact = accumulator(dtype)
    image = _image_shape(operands, sampling, shape)
    outputs = {}
    if reduction.needs_coverage:
        outputs["coverage"] = jax.ShapeDtypeStruct(shape, exact)
    if reduction.divides and dtype != exact:
        outputs["exact"] = jax.ShapeDtypeStruct(image, exact)  # (6) uses the unrounded result
    outputs["image"] = jax.ShapeDtypeStruct(image, dtype)
    if reduction.reduce == "softmax":
        outputs["peak"] = jax.ShapeDtypeStruct(shape, exact)
    if reduction.divides and "importance" in operands:
        outputs["weight"] = jax.ShapeDtypeStruct(shape, exact)
    return outputs


def _image_shape(operands: Operands, sampling: Sampling, shape: Shape) -> Shape:
    """Of the image that a splat gives; `shape` is that of its planes."""
    values = _split(operands, sampling)["values"][1]
    channels = values[sampling.channel_axis(len(values))]
    return sampling.with_channels(shape, channels, operands["points"].shape[-1] + 1)


def _planes(image: Any, sampling: Sampling) -> Shape:
    """The shape of an image without its channels."""
    if not sampling.channels_first:
        return tuple(image.shape[:-1])
    at = len(image.shape) - len(sampling.derivative) - 1
    return (*image.shape[:at], *image.shape[at + 1 :])


def _vjp_outputs(operands: Operands, sampling: Sampling, wants: Wants, **_: Any) -> Operands:
    split = _split(operands, sampling)
    return {
        "ct_" + name: jax.ShapeDtypeStruct((*batch, *split[name][1]), operands[name].dtype)
        for name, batch in sorted(wants)
    }


def _gather_tangent_outputs(operands: Operands, **params: Any) -> Operands:
    return {"d_values": _gather_outputs(operands, **params)["values"]}


def _gather_vjp_tangent_outputs(operands: Operands, sampling: Sampling, wants: Wants) -> Operands:
    found = _vjp_outputs(operands, sampling, wants)
    return {"d_ct_points": found["ct_points"]}


def _splat_tangent_outputs(operands: Operands, *, reduction: Reduction, **params: Any) -> Operands:
    outputs = _splat_outputs(operands, reduction=reduction, **params)
    wanted = ("coverage", "image") if reduction.coverage else ("image",)
    return {"d_" + name: outputs[name] for name in wanted}


def _fit_batch(x: Array, batch: Shape) -> Array:
    """Sums over the batch axes that are 1 in `batch`, and repeats along those that are 1 in x."""
    axes = tuple(i for i, n in enumerate(batch) if n == 1 != x.shape[i])
    x = x.sum(axes, keepdims=True) if axes else x
    return jnp.broadcast_to(x, (*batch, *x.shape[len(batch) :]))


# ---------------------------------------------------------------------------- kernels


def _run_kernel(
    kernels: ModuleType,
    target: str,
    operands: Operands,
    outputs: Operands,
    *,
    sampling: Sampling,
    reduction: Reduction = PLAIN,
    **_: Any,
) -> Operands:
    """The kernel of a primitive, on every shard, by `kernels`: `_ffi` or `_plain`.

    A kernel takes values of any dtype; positions, weights and sums have the dtype in which it
    accumulates. So where only one of values and points is float64, the other is made so; and sums
    come back unrounded, to be rounded once.
    """
    stored = _stored(operands)
    as_given = {name: x.dtype for name, x in operands.items()}
    if np.float64 in (stored, as_given["points"]) and jnp.issubdtype(stored, jnp.floating):
        stored = np.dtype(np.float64)
        as_given = dict.fromkeys(as_given, stored)
    if "d_points" in operands:
        as_given["d_points"] = accumulator(stored)
    dtypes = _kernel_dtypes(operands, outputs, sampling, stored)

    # All conversions are made on a shard: outside, an Explicit mesh would have the results whole.
    def kernel(operands: Operands, outputs: Operands, shard: Shard) -> Operands:
        operands = {name: x.astype(as_given[name]) for name, x in operands.items()}
        exact = {
            name: jax.ShapeDtypeStruct(x.shape, dtypes[name])
            for name, x in outputs.items()
            if name != "exact"
        }
        results = _on_shard(kernels, target, operands, exact, shard, sampling, reduction)
        if "exact" in outputs:
            results["exact"] = results["image"]
        return {name: results[name].astype(x.dtype) for name, x in outputs.items()}

    labels = _labels(operands | outputs, sampling)
    name = repr((kernels.__name__, target, sampling, reduction))
    return _sharding.partitioned(kernel, operands, outputs, labels, name)


def _stored(operands: Operands) -> np.dtype:
    """The dtype of values and images."""
    return next(operands[n].dtype for n in ("values", "ct_values", "image") if n in operands)


def _kernel_dtypes(
    operands: Operands, outputs: Operands, sampling: Sampling, stored: np.dtype
) -> dict[str, DTypeLike]:
    """In which a kernel gives its results: those of one point as they are stored, sums exactly."""
    split = _split(operands | outputs, sampling)
    common = jnp.broadcast_shapes(*(batch for batch, _ in split.values()))
    per_point = {"values", "d_values"} & outputs.keys()
    if "ct_values" in outputs and split["ct_values"][0] == common:
        per_point.add("ct_values")
    return {name: stored if name in per_point else accumulator(stored) for name in outputs}


def _check_batch_axes(arrays: Operands, sampling: Sampling) -> None:
    """Neighbouring axes that the same arrays have are one to a kernel, which knows MAX_BATCH."""
    batches = [batch for batch, _ in _split(arrays, sampling).values()]
    sizes = jnp.broadcast_shapes(*batches)
    kept = [[batch[i] != 1 for batch in batches] for i, size in enumerate(sizes) if size != 1]
    apart = sum(axis != before for axis, before in zip(kept, [None, *kept], strict=False))
    if apart > MAX_BATCH:
        raise ValueError(
            f"batch axes: expected at most {MAX_BATCH} groups along which different arrays are "
            f"shared, got {apart} in shape {sizes}; give all arrays some of these axes with "
            "jnp.broadcast_to, or map them one after the other with jax.lax.map"
        )


def _on_shard(
    kernels: ModuleType,
    target: str,
    operands: Operands,
    outputs: Operands,
    shard: Shard,
    sampling: Sampling,
    reduction: Reduction,
) -> Operands:
    """What one shard computes with its part of the operands, summed over the shards."""
    points = operands["points"]
    if sampling.displacement and shard.over(GRID):
        # A flow starts at the pixel it belongs to, which is not the first one of this shard.
        origin = jnp.stack(shard.origin("points", points.shape)[::-1])
        exact = accumulator(points.dtype)
        operands = operands | {"points": points.astype(exact) + origin.astype(exact)}
    if "ct_coverage" in operands and shard.over(CHANNEL):  # one of these shards counts it
        first = jax.lax.axis_index(shard.over(CHANNEL)) == 0
        operands = operands | {"ct_coverage": jnp.where(first, operands["ct_coverage"], 0)}
    if target == "jaxwarp_splat" and reduction.divides and shard.over(GRID):
        return _splat_in_parts(kernels, operands, outputs, shard, sampling, reduction)
    dtypes = _kernel_dtypes(operands, outputs, sampling, _stored(operands))
    results = kernels.call(
        target,
        operands,
        {name: jax.ShapeDtypeStruct(x.shape, dtypes[name]) for name, x in outputs.items()},
        **sampling._asdict(),
        reduce=reduction.reduce,
        min_coverage=reduction.min_coverage,
    )
    return {n: shard.sum(n, x.astype(outputs[n].dtype)) for n, x in results.items()}


def _splat_in_parts(
    kernels: ModuleType,
    operands: Operands,
    outputs: Operands,
    shard: Shard,
    sampling: Sampling,
    reduction: Reduction,
) -> Operands:
    """(5) where several shards reach one target: sums over the shards first, then the division."""
    results = {}
    splat = partial(_on_shard, kernels, "jaxwarp_splat")
    if reduction.reduce == "softmax":
        no_values = operands | {"values": operands["values"][..., :0]}
        planes = outputs | {"image": jax.ShapeDtypeStruct((*outputs["peak"].shape, 0), np.float32)}
        alone = Shard({}, shard.labels)
        peak = splat(no_values, planes, alone, sampling, reduction)["peak"]
        results["peak"] = jax.lax.pmax(peak, shard.over(GRID))
        operands = operands | {"peak": results["peak"]}

    summed = {n: x for n, x in outputs.items() if n != "peak"}
    alone = Shard({}, shard.labels)
    sums = splat(operands, summed, alone, sampling, PLAIN)
    # One array, so that there is one reduction.
    planes = {n: x[..., None] for n, x in sums.items() if n != "image"}
    together = jnp.concatenate([sums["image"], *planes.values()], axis=-1)
    together = jax.lax.psum(together, shard.over(GRID))
    channels = sums["image"].shape[-1]
    image = together[..., :channels]
    results |= {n: together[..., channels + i] for i, n in enumerate(planes)}
    coverage = results["coverage"]
    divisor = results.get("weight", coverage)
    hole = holes(coverage, divisor, reduction)[..., None]
    image = image / jnp.where(hole, 1, divisor[..., None])
    results["image"] = jnp.where(hole, sampling.fill_value, image)
    return {name: results[name].astype(x.dtype) for name, x in outputs.items()}


# ---------------------------------------------------------------------------- primitives


def _define(
    name: str,
    outputs: Callable[..., Operands],
    plain: Callable[..., Operands] | None = None,
    has_kernel: bool = True,
) -> Primitive:
    """A primitive over named operands: what it returns, and how that is computed when compiled: by
    the kernel of that name, and where there is none by `plain`. Of what has no kernel on any
    platform nobody is warned."""
    primitive = Primitive(name)
    primitive.multiple_results = True

    @lru_cache(maxsize=4096)
    def compiled(params: tuple[tuple[str, Any], ...]) -> Callable[..., Any]:
        def apply(*arrays: Array) -> Any:
            return primitive.bind(*arrays, **dict(params))

        # As JAX marks what it makes of a primitive: jax.debug_nans looks no further than that.
        apply.__name__ = apply.__qualname__ = name
        apply._apply_primitive = True  # type: ignore[attr-defined]
        return jax.jit(apply)

    def evaluate(*arrays: Array, **params: Any) -> Any:
        with jax.disable_jit(False):  # else the program below would evaluate the primitive again
            return compiled(tuple(params.items()))(*arrays)

    def abstract(*avals: Any, names: tuple[str, ...], **params: Any) -> list[Any]:
        operands = dict(zip(names, avals, strict=True))
        results = outputs(operands, **params)
        labels = _labels(operands | results, params["sampling"])
        _check_batch_axes(operands | results, params["sampling"])
        return _sharding.result_avals(operands, results, labels)

    def lowering(compute: Callable[..., Operands], **replaced: Any) -> Callable[..., Any]:
        def lower(
            *arrays: Array, names: tuple[str, ...], sampling: Sampling, **params: Any
        ) -> list[Array]:
            operands = dict(zip(names, arrays, strict=True))
            params["sampling"] = sampling._replace(**replaced)
            results = outputs(operands, **params)
            computed = compute(operands, results, **params)
            return [computed[name] for name in results]

        return mlir.lower_fun(lower, multiple_results=True)

    def lower_plainly(ctx: Any, *arrays: Any, **params: Any) -> Any:
        platforms = ctx.platforms or ctx.module_context.platforms
        scatters = name == "jaxwarp_splat"
        _ffi.check_without_kernels(platforms, scatters and params["sampling"].deterministic)
        return plainly(ctx, *arrays, **params)

    def batch(arrays: Any, axes: Any, **params: Any) -> Any:
        size = next(x.shape[a] for x, a in zip(arrays, axes, strict=True) if a is not None)
        arrays = [
            x[None] if a is None else jnp.moveaxis(x, a, 0)
            for x, a in zip(arrays, axes, strict=True)
        ]
        if "shape" in params:
            params["shape"] = (size, *params["shape"])
        if "wants" in params:
            params["wants"] = tuple((n, (size, *b)) for n, b in params["wants"])
        results = primitive.bind(*arrays, **params)
        return results, [0] * len(results)

    _sharding.register(primitive)
    primitive.def_impl(evaluate)
    primitive.def_abstract_eval(abstract)
    plainly = lowering(plain or partial(_run_kernel, _plain, name))
    mlir.register_lowering(primitive, lower_plainly if has_kernel else plainly)
    for platform in _ffi.MODULES if has_kernel else ():
        # On a CPU sums are deterministic anyway, so the kernel is not asked for more.
        replaced = {"deterministic": False} if platform == "cpu" else {}
        kernel = lowering(partial(_run_kernel, _ffi, name), **replaced)
        mlir.register_lowering(primitive, kernel, platform=platform)
    batching.primitive_batchers[primitive] = batch
    return primitive


def _bind(
    primitive: Primitive, outputs: Callable[..., Operands], operands: Operands, **params: Any
) -> Operands:
    operands = _sharding.same_varying(dict(sorted(operands.items())))
    results = primitive.bind(*operands.values(), names=tuple(operands), **params)
    return dict(zip(outputs(operands, **params), results, strict=True))


def gather(
    image: Array,
    points: Array,
    sampling: Sampling,
    softmax: Operands | None = None,
    *,
    forward_mode: bool = True,
) -> Array:
    """(*B, *shape, C), (*B, *S, d) -> (*B, *S, C)

    `softmax`: "importance" and "peak" of the weight exp(importance - peak), where there is one.
    """
    operands = {"image": image, "points": points, **(softmax or {})}
    return _bind(gather_p, _gather_outputs, operands, sampling=sampling, forward_mode=forward_mode)[
        "values"
    ]


def pick(image: Array, points: Array, fill: Array, sampling: Sampling) -> Array:
    """(*B, *shape, C), (*B, *S, d), (*B, C) -> (*B, *S, C)

    A gather by "nearest" of an image of any dtype. It has no derivative.
    """
    operands = {"image": image, "points": points, "fill": fill}
    return _bind(pick_p, _gather_outputs, operands, sampling=sampling)["values"]


def splat(
    values: Array,
    points: Array,
    importance: Array | None,
    shape: Shape,
    sampling: Sampling,
    reduction: Reduction = PLAIN,
    softmax: Operands | None = None,
    *,
    forward_mode: bool = True,
) -> Operands:
    """(*B, *S, C), (*B, *S, d)[, (*B, *S)] -> image `shape` + (C,)[, coverage `shape` ...]

    `shape` includes the batch axes; where one is 1 that others have longer, the result is a sum.
    `softmax`: as in `gather`, for a plain sum.
    """
    operands = {"values": values, "points": points, **(softmax or {})}
    if importance is not None:
        operands["importance"] = importance
    params = {"sampling": sampling, "shape": shape, "reduction": reduction}
    return _bind(splat_p, _splat_outputs, operands, **params, forward_mode=forward_mode)


# ---------------------------------------------------------------------------- compositions
# What the fused primitives compute, in members of the family that can be differentiated again.


def _softmax(operands: Operands) -> Operands:
    """The operands of the weight exp(importance - peak), where there is one."""
    return {n: operands[n] for n in ("importance", "peak") if "peak" in operands}


def _over_channels(scalars: Array, sampling: Sampling) -> Array:
    """What multiplies values (*B, *S, C), made of scalars (*B, *S)."""
    axis = -2 if sampling.channels_first else -1  # channels-first, S is one axis
    return jnp.expand_dims(scalars, axis)


def _gather_tangent(
    operands: Operands, outputs: Operands, *, sampling: Sampling, **_: Any
) -> Operands:
    image, points, softmax = operands["image"], operands["points"], _softmax(operands)
    dtype = accumulator(image.dtype)
    parts = []
    if "d_points" in operands:
        parts += [
            gather(image.astype(dtype), points, sampling.raised(a), softmax)
            * _over_channels(operands["d_points"][..., a], sampling).astype(dtype)
            for a in range(points.shape[-1])
        ]
    if "d_image" in operands:
        parts.append(gather(operands["d_image"].astype(dtype), points, sampling.linear(), softmax))
    if "d_importance" in operands:
        d_weight = _over_channels(operands["d_importance"], sampling)
        parts.append(gather(image.astype(dtype), points, sampling, softmax) * d_weight)
    return {"d_values": sum(parts[1:], parts[0]).astype(image.dtype)}


def _gather_vjp(
    operands: Operands, outputs: Operands, *, sampling: Sampling, wants: Wants
) -> Operands:
    image, points, ct_values = (operands[name] for name in ("image", "points", "ct_values"))
    softmax = _softmax(operands)
    results = {}
    for name, batch in wants:
        if name == "image":
            core = _split(operands, sampling)["image"][1]
            shape = (*batch, *(core[1:] if sampling.channels_first else core[:-1]))
            ct = splat(ct_values, points, None, shape, sampling.linear(), softmax=softmax)["image"]
        elif name == "points":
            ct = _fit_batch(_points_vjp(image, points, ct_values, sampling, softmax), batch)
        else:
            ct = _fit_batch(_sampled_dot(image, points, ct_values, sampling, softmax), batch)
        results["ct_" + name] = ct
    return {name: results[name].astype(out.dtype) for name, out in outputs.items()}


def _gather_vjp_tangent(
    operands: Operands, outputs: Operands, *, sampling: Sampling, wants: Wants
) -> Operands:
    """(2) of the points, with one factor moved at a time, summed over what a batch shares."""
    at = {n: operands[n] for n in ("image", "points", "ct_values")}
    ((name, batch),) = wants
    common = jnp.broadcast_shapes(*(b for b, _ in _split(operands, sampling).values()))

    def pull(moved: Operands, sampling: Sampling = sampling) -> Array:
        params: dict[str, Any] = {"sampling": sampling, "wants": ((name, common),)}
        return _bind(gather_vjp_p, _vjp_outputs, at | moved, **params)["ct_points"]

    parts = []
    if "d_image" in operands:
        parts.append(pull({"image": operands["d_image"]}, sampling.linear()))
    if "d_ct_values" in operands:
        parts.append(pull({"ct_values": operands["d_ct_values"]}))
    if "d_points" in operands:
        parts += [
            pull({}, sampling.raised(a)) * operands["d_points"][..., a : a + 1]
            for a in range(at["points"].shape[-1])
        ]
    return {"d_ct_points": _fit_batch(sum(parts[1:], parts[0]), batch)}


def _sampled_dot(
    image: Array, points: Array, values: Array, sampling: Sampling, softmax: Operands
) -> Array:
    """sum_j (I(j) . values) g(p, j), (*B, *S)"""
    dtype = accumulator(image.dtype)
    sampled = gather(image.astype(dtype), points, sampling, softmax)
    return (values.astype(dtype) * sampled).sum(-2 if sampling.channels_first else -1)


def _points_vjp(
    image: Array, points: Array, values: Array, sampling: Sampling, softmax: Operands
) -> Array:
    """sum_j (I(j) . values) dg(p, j)/dp, of (2)"""
    axes = range(points.shape[-1])
    dots = [_sampled_dot(image, points, values, sampling.raised(a), softmax) for a in axes]
    return jnp.stack(dots, axis=-1)


def _is_plain(operands: Operands, reduction: Reduction = PLAIN, **_: Any) -> bool:
    """Is the operation, with its importance as it is, linear in the values or the image?"""
    return reduction == PLAIN and ("importance" not in operands or "peak" in operands)


def _weighted(values: Array, importance: Array | None) -> Array:
    """w f, in the dtype of the accumulation; a weight of 0 hides even a NaN."""
    values = values.astype(accumulator(values.dtype))
    if importance is None:
        return values
    return _product(importance[..., None], values)


@jax.custom_jvp
def _product(weight: Array, values: Array) -> Array:
    """w f, of which the derivative in the weight is f even where a weight of 0 hides it."""
    return weight * jnp.where((weight == 0) & ~jnp.isfinite(values), 0, values)


@partial(_product.defjvp, symbolic_zeros=True)
def _product_jvp(primals: tuple[Array, Array], tangents: tuple[Any, Any]) -> tuple[Array, Array]:
    (weight, values), (d_weight, d_values) = primals, tangents
    parts = [] if isinstance(d_values, SymbolicZero) else [weight * d_values]
    if not isinstance(d_weight, SymbolicZero):  # whose product with a NaN is none
        parts.append(d_weight * values)
    out = _product(weight, values)
    return out, sum(parts[1:], parts[0]) if parts else jnp.zeros_like(out)


def holes(coverage: Array, divisor: Array, reduction: Reduction) -> Array:
    return (coverage <= reduction.min_coverage) | (divisor == 0)


def _splat_composed(
    operands: Operands, *, sampling: Sampling, shape: Shape, reduction: Reduction
) -> Operands:
    """(5) as numerator over denominator."""
    values, points, softmax = operands["values"], operands["points"], _softmax(operands)
    importance = None if softmax else operands.get("importance")

    def total(f: Array, softmax: Operands | None = softmax) -> Array:
        return splat(f, points, None, shape, sampling, softmax=softmax)["image"]

    f = _weighted(values, importance)
    one = jnp.ones((*f.shape[:-1], 1), f.dtype)
    image, coverage = total(f), total(one, None)
    if reduction.divides:
        divisor = total(_weighted(one, importance)) if "importance" in operands else coverage
        hole = holes(coverage, divisor, reduction)
        ratio = _formulas.ratio(image, jnp.where(hole, 1, divisor))
        image = jnp.where(hole, sampling.fill_value, ratio)
    return {"image": image.astype(values.dtype), "coverage": coverage[..., 0]}


def _splat_tangent(
    operands: Operands,
    outputs: Operands,
    *,
    sampling: Sampling,
    shape: Shape,
    reduction: Reduction,
    **_: Any,
) -> Operands:
    values, points, softmax = operands["values"], operands["points"], _softmax(operands)
    importance = None if softmax else operands.get("importance")
    f = _weighted(values, importance)
    dtype = f.dtype

    def total(f: Array, sampling: Sampling = sampling, softmax: Operands | None = softmax) -> Array:
        return splat(f, points, None, shape, sampling, softmax=softmax)["image"]

    def total_tangent(f: Array, d_f: Array | None, softmax: Operands = softmax) -> Array:
        """Of sum_i g(p_i, j) w_ij f_i, where f moves by d_f, and the points and logits move too."""
        moved = [] if d_f is None else [d_f.astype(dtype)]
        if softmax and "d_importance" in operands:
            moved.append(f * _over_channels(operands["d_importance"], sampling))
        parts = [total(sum(moved[1:], moved[0]), sampling, softmax)] if moved else []
        if "d_points" in operands:
            for a in range(points.shape[-1]):
                along = _over_channels(operands["d_points"][..., a], sampling).astype(dtype)
                parts.append(total(f * along, sampling.raised(a), softmax))
        if not parts:
            return jnp.zeros(_image_shape({"values": f, "points": points}, sampling, shape), dtype)
        return sum(parts[1:], parts[0])

    d_f: Array | None = None
    d_weight: Array | None = None
    if "d_values" in operands:
        d_f = _weighted(operands["d_values"], importance)
    if "d_importance" in operands and not softmax:
        d_weight = operands["d_importance"][..., None]
        moved = d_weight * values.astype(dtype)
        d_f = moved if d_f is None else d_f + moved
    results = {"d_image": total_tangent(f, d_f)}
    if reduction.needs_coverage:
        one = jnp.ones((*f.shape[:-1], 1), dtype)
        d_coverage = total_tangent(one, None, {})
        results["d_coverage"] = d_coverage[..., 0]
    if reduction.divides:
        coverage = divisor = total(one, softmax=None)
        d_divisor = d_coverage
        if "importance" in operands:
            weight = _weighted(one, importance)
            divisor, d_divisor = total(weight), total_tangent(weight, d_weight)
        hole = holes(coverage, divisor, reduction)
        divisor = jnp.where(hole, 1, divisor)
        change = (results["d_image"] - total(f) / divisor * d_divisor) / divisor
        results["d_image"] = jnp.where(hole, 0, change)
    return {name: results[name].astype(out.dtype) for name, out in outputs.items()}


def _splat_vjp(
    operands: Operands, outputs: Operands, *, sampling: Sampling, wants: Wants, reduction: Reduction
) -> Operands:
    # (6) in the numerator/denominator form, by JAX's chain rule; explicit for a plain sum, where
    # the chain rule starts.
    split = _split(operands, sampling)
    names = ("values", "points", "importance", "peak")
    primals = {n: operands[n] for n in names if n in operands}
    ct_image = operands["ct_image"]
    results = {}
    if _is_plain(primals, reduction) and "ct_coverage" not in operands:
        # Where a gather gives NaN, a splat drops the source, and one with a logit of -inf too.
        values, linear, softmax = primals["values"], sampling.linear(), _softmax(primals)
        kept = jnp.isfinite(primals["points"]).all(-1)
        points = jnp.where(kept[..., None], primals["points"], 0)
        if softmax:
            kept &= softmax["importance"] != -jnp.inf
        for name, batch in wants:
            if name == "values":
                full = gather(ct_image, points, linear, softmax)
                full = jnp.where(_over_channels(kept, sampling), full, 0)
            elif name == "points":
                full = _points_vjp(ct_image, points, values, linear, softmax)
                full = jnp.where(kept[..., None], full, 0)
            else:
                full = _sampled_dot(ct_image, points, values, linear, softmax)
                full = jnp.where(kept, full, 0)
            results["ct_" + name] = _fit_batch(full, batch)
    else:
        moved = {n: jnp.broadcast_to(primals[n], (*batch, *split[n][1])) for n, batch in wants}
        batches = (*(batch for batch, _ in split.values()), *(batch for _, batch in wants))
        shape = (*jnp.broadcast_shapes(*batches), *split["ct_image"][1][:-1])

        def compose(moved: Operands) -> Operands:
            return _splat_composed(
                primals | moved, sampling=sampling, shape=shape, reduction=reduction
            )

        composed, pull = jax.vjp(compose, moved)
        given = jax.tree.map(jnp.zeros_like, composed) | {"image": ct_image}
        if "ct_coverage" in operands:
            given["coverage"] = operands["ct_coverage"]
        (cts,) = pull({n: jnp.broadcast_to(ct, composed[n].shape) for n, ct in given.items()})
        results = {"ct_" + name: ct for name, ct in cts.items()}
    return {name: results[name].astype(out.dtype) for name, out in outputs.items()}


# ---------------------------------------------------------------------------- the family

gather_p = _define("jaxwarp_gather", _gather_outputs)
pick_p = _define("jaxwarp_pick", _gather_outputs, has_kernel=False)
gather_vjp_p = _define("jaxwarp_gather_vjp", _vjp_outputs, _gather_vjp)
gather_vjp_tangent_p = _define(
    "jaxwarp_gather_vjp_tangent", _gather_vjp_tangent_outputs, _gather_vjp_tangent
)
gather_tangent_p = _define("jaxwarp_gather_tangent", _gather_tangent_outputs, _gather_tangent)
splat_p = _define("jaxwarp_splat", _splat_outputs)
splat_vjp_p = _define("jaxwarp_splat_vjp", _vjp_outputs, _splat_vjp)
splat_tangent_p = _define("jaxwarp_splat_tangent", _splat_tangent_outputs, _splat_tangent)

# ---------------------------------------------------------------------------- differentiation


def _pull_gather(
    operands: Operands, results: Operands, cts: Operands, wants: Wants, *, sampling: Sampling
) -> Operands:
    """The cotangents asked for, of a gather: equation (2)."""
    if "values" not in cts:
        return {}
    operands = operands | {"ct_values": cts["values"]}
    # Of the image alone, the adjoint is a splat; the kernel has no weights.
    if "points" not in dict(wants) or "peak" in operands:
        return _gather_vjp(
            operands, _vjp_outputs(operands, sampling, wants), sampling=sampling, wants=wants
        )
    return _bind(gather_vjp_p, _vjp_outputs, operands, sampling=sampling, wants=wants)


def _pull_splat(
    operands: Operands,
    results: Operands,
    cts: Operands,
    wants: Wants,
    *,
    sampling: Sampling,
    shape: Shape,
    reduction: Reduction,
) -> Operands:
    """The cotangents asked for, of a splat: equation (6)."""
    if not cts:
        return {}
    params: dict[str, Any] = {"sampling": sampling, "wants": wants, "reduction": reduction}
    zeros = partial(jnp.zeros, _image_shape(operands, sampling, shape), operands["values"].dtype)
    given = operands | {"ct_image": cts["image"] if "image" in cts else zeros()}
    if reduction == PLAIN and "peak" in operands:
        return _splat_vjp(given, _vjp_outputs(given, sampling, wants), **params)
    if reduction.divides:
        if results is None:
            results = splat(
                operands["values"],
                operands["points"],
                operands.get("importance"),
                shape,
                sampling,
                reduction,
            )
        given |= _splat_residual(results)
    if "coverage" in cts:
        given["ct_coverage"] = cts["coverage"]
    return _bind(splat_vjp_p, _vjp_outputs, given, **params)


def _splat_residual(results: Operands) -> Operands:
    """What tangent and adjoint of a splat that divides need of its results."""
    kept = {n: x for n, x in results.items() if n in ("coverage", "peak", "weight")}
    return kept | {"image": results.get("exact", results["image"])}


@jax.tree_util.register_static
class _Static(tuple[str, ...]):
    """Names that pass through a residual."""


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _with_vjp(op: "_Op", params: tuple[tuple[str, Any], ...], operands: Operands) -> Operands:
    """The operation, connected to its hand-written VJP kernel."""
    return _bind(op.primitive, op.outputs, operands, **dict(params), forward_mode=True)


def _with_vjp_fwd(op: "_Op", params: tuple[tuple[str, Any], ...], operands: Operands) -> Any:
    wanted = _Static(name for name, x in operands.items() if x.perturbed)
    values = {name: x.value for name, x in operands.items()}
    results = _bind(op.primitive, op.outputs, values, **dict(params), forward_mode=True)
    return results, (values, results, wanted)


def _with_vjp_bwd(
    op: "_Op", params: tuple[tuple[str, Any], ...], residuals: Any, cts: Operands
) -> Any:
    operands, results, wanted = residuals
    kept = {
        n: ct for n, ct in cts.items() if n in op.differentiable and type(ct) is not SymbolicZero
    }
    split = _split(operands, dict(params)["sampling"])
    wants = tuple((n, split[n][0]) for n in wanted)
    found = op.pull(operands, results, kept, wants, **dict(params))
    return ({name: found.get("ct_" + name) for name in operands},)


_with_vjp.defvjp(_with_vjp_fwd, _with_vjp_bwd, symbolic_zeros=True)


class _Op(NamedTuple):
    primitive: Primitive
    outputs: Callable[..., Operands]
    linear_in: str
    differentiable: tuple[str, ...]  # of the results; the others only serve `pull`
    pull: Callable[..., Operands]
    tangent: Primitive
    tangent_outputs: Callable[..., Operands]

    def push(self, operands: Operands, results: Operands, d: Operands, **params: Any) -> Operands:
        """The tangents of `differentiable`, by name, as the operands move by `d`."""
        if d.keys() == {self.linear_in} and _is_plain(operands, **params):
            linear = params | {"sampling": params["sampling"].linear()}
            return _bind(self.primitive, self.outputs, operands | d, **linear, forward_mode=True)
        named = operands | {"d_" + n: t for n, t in d.items()}
        if params.get("reduction", PLAIN).divides:
            named |= _splat_residual(results)
        found = _bind(self.tangent, self.tangent_outputs, named, **params)
        return {n.removeprefix("d_"): x for n, x in found.items()}


GATHER = _Op(
    gather_p,
    _gather_outputs,
    "image",
    ("values",),
    _pull_gather,
    gather_tangent_p,
    _gather_tangent_outputs,
)
SPLAT = _Op(
    splat_p,
    _splat_outputs,
    "values",
    ("image", "coverage"),
    _pull_splat,
    splat_tangent_p,
    _splat_tangent_outputs,
)


def _op_jvp(
    op: _Op,
    primals: Any,
    tangents: Any,
    *,
    names: tuple[str, ...],
    forward_mode: bool,
    **params: Any,
) -> Any:
    operands = dict(zip(names, primals, strict=True))
    d = _nonzero(names, tangents)
    d.pop("peak", None)
    if not forward_mode:
        key, at = tuple(params.items()), {n: operands[n] for n in d}
        try:
            results, d_results = jax.jvp(lambda at: _with_vjp(op, key, operands | at), (at,), (d,))
        except TypeError as error:
            if "forward-mode" not in str(error):
                raise
            raise TypeError(
                "forward_mode: expected True under forward-mode differentiation (jvp, jacfwd, "
                "linearize), got False; pass forward_mode=True to the jaxwarp function"
            ) from error
        return list(results.values()), list(d_results.values())

    results = _bind(op.primitive, op.outputs, operands, **params, forward_mode=True)
    d_results = op.push(operands, results, d, **params) if d else {}
    zeros = {n: ad.Zero(jax.typeof(x).to_tangent_aval()) for n, x in results.items()}
    return list(results.values()), list((zeros | d_results).values())


def _nonzero(names: Any, tangents: Any) -> Operands:
    return {n: t for n, t in zip(names, tangents, strict=True) if type(t) is not ad.Zero}


def _op_transpose(
    op: _Op, cts: Any, *arrays: Any, names: tuple[str, ...], forward_mode: bool, **params: Any
) -> list[Any]:
    """Of the operation in its linear operand, whose value the adjoint then does not need."""
    operands = dict(zip(names, arrays, strict=True))
    (name,) = (n for n, x in operands.items() if ad.is_undefined_primal(x))
    if name != op.linear_in:
        raise NotImplementedError(
            f"{op.primitive}: transposed in {name}, in which it is not linear"
        )
    aval = operands[name].aval
    operands[name] = jnp.zeros(aval.shape, aval.dtype)
    kept = _nonzero(op.outputs(operands, **params), cts)
    wants = ((name, _split(operands, params["sampling"])[name][0]),)
    found = op.pull(operands, None, kept, wants, **params)
    return [found.get("ct_" + n, ad.Zero(aval)) if n == name else None for n in names]


def _tangent_transpose(
    op: _Op, cts: Any, *arrays: Any, names: tuple[str, ...], **params: Any
) -> list[Any]:
    """The transpose of the tangent map is the fused adjoint."""
    linear = {n: x.aval for n, x in zip(names, arrays, strict=True) if ad.is_undefined_primal(x)}
    known = {n: x for n, x in zip(names, arrays, strict=True) if n not in linear}
    primals = {n: x for n, x in known.items() if not n.startswith("d_")}
    split = _split(known | linear, params["sampling"])
    wants = tuple((n.removeprefix("d_"), split[n][0]) for n in linear)
    results = op.tangent_outputs(known | linear, **params)
    kept = _nonzero((n.removeprefix("d_") for n in results), cts)
    found = op.pull(primals, primals, kept, wants, **params)
    return [
        found.get("ct_" + n.removeprefix("d_"), ad.Zero(linear[n])) if n in linear else None
        for n in names
    ]


def _composed_jvp(
    primitive: Primitive,
    outputs: Callable[..., Operands],
    composed: Callable[..., Operands],
    primals: Any,
    tangents: Any,
    *,
    names: tuple[str, ...],
    **params: Any,
) -> Any:
    """Of a fused primitive, through its composition. What it keeps of the forward pass of a splat
    ("image", "coverage", "weight") is a function of its other operands: the composition computes it
    again, so its tangents are not used. A peak is a constant."""
    operands = dict(zip(names, primals, strict=True))
    d = _nonzero(names, tangents)
    of_splat = primitive in (splat_tangent_p, splat_vjp_p)
    constant = ("peak", "image", "coverage", "weight") if of_splat else ("peak",)
    d = {n: t for n, t in d.items() if n not in constant}
    results = _bind(primitive, outputs, operands, **params)
    at = {n: operands[n] for n in d}
    _, d_results = jax.jvp(lambda at: composed(operands | at, results, **params), (at,), (d,))
    return list(results.values()), list(d_results.values())


def _gather_vjp_jvp(
    primals: Any, tangents: Any, *, names: tuple[str, ...], sampling: Sampling, wants: Wants
) -> Any:
    """Of (2): how the splat of the image's cotangent moves, and how that of the points does."""
    operands = dict(zip(names, primals, strict=True))
    d = _nonzero(names, tangents)
    results = _bind(gather_vjp_p, _vjp_outputs, operands, sampling=sampling, wants=wants)
    d_results = {}
    of_splat = {"values": "ct_values", "points": "points"}
    moved = {n: d[of] for n, of in of_splat.items() if of in d}
    if "ct_image" in results and moved:
        shape = _planes(results["ct_image"], sampling)
        primal = {n: operands[of] for n, of in of_splat.items()}
        params = {"sampling": sampling.linear(), "shape": shape, "reduction": PLAIN}
        d_results["ct_image"] = SPLAT.push(primal, {}, moved, **params)["image"]
    if "ct_points" in results and d:
        named = operands | {"d_" + n: t for n, t in d.items()}
        of_points = tuple((n, batch) for n, batch in wants if n == "points")
        found = _bind(
            gather_vjp_tangent_p,
            _gather_vjp_tangent_outputs,
            named,
            sampling=sampling,
            wants=of_points,
        )
        d_results["ct_points"] = found["d_ct_points"]
    zeros = {n: ad.Zero(jax.typeof(x).to_tangent_aval()) for n, x in results.items()}
    return list(results.values()), list((zeros | d_results).values())


def _gather_vjp_tangent_transpose(
    cts: Any, *arrays: Any, names: tuple[str, ...], sampling: Sampling, wants: Wants
) -> list[Any]:
    """In the points it is its own transpose, as a matrix of second derivatives is."""
    linear = {n: x.aval for n, x in zip(names, arrays, strict=True) if ad.is_undefined_primal(x)}
    at = {n: x for n, x in zip(names, arrays, strict=True) if not n.startswith("d_")}
    split = _split(at | linear, sampling)
    (ct,) = cts
    found: Operands = {}
    if type(ct) is not ad.Zero:
        moved = {"points": ct}
        if "d_image" in linear:
            primal = {"values": at["ct_values"], "points": at["points"]}
            given = {"sampling": sampling.linear(), "reduction": PLAIN}
            shape = _planes(linear["d_image"], sampling)
            found["d_image"] = SPLAT.push(primal, {}, moved, shape=shape, **given)["image"]
        if "d_ct_values" in linear:
            primal = {n: at[n] for n in ("image", "points")}
            found["d_ct_values"] = GATHER.push(primal, {}, moved, sampling=sampling)["values"]
        if "d_points" in linear:
            found["d_points"] = _bind(
                gather_vjp_tangent_p,
                _gather_vjp_tangent_outputs,
                at | {"d_points": ct},
                sampling=sampling,
                wants=(("points", split["d_points"][0]),),
            )["d_ct_points"]
    fitted = {n: _fit_batch(x, split[n][0]) for n, x in found.items()}
    return [fitted.get(n, ad.Zero(linear[n])) if n in linear else None for n in names]


def _adjoint_transpose(
    op: _Op,
    cts: Any,
    *arrays: Any,
    names: tuple[str, ...],
    sampling: Sampling,
    reduction: Reduction = PLAIN,
    **params: Any,
) -> list[Any]:
    """Of a fused adjoint. In its cotangents it is the tangent of the operation."""
    linear = {n: x.aval for n, x in zip(names, arrays, strict=True) if ad.is_undefined_primal(x)}
    known = {n: x for n, x in zip(names, arrays, strict=True) if n not in linear}
    results = _vjp_outputs(known | linear, sampling=sampling, **params)
    d = {n.removeprefix("ct_"): ct for n, ct in _nonzero(results, cts).items()}
    found: Operands = {}
    if all(n.startswith("ct_") for n in linear):
        given: dict[str, Any] = {"sampling": sampling}
        if op is SPLAT:
            given["shape"] = _planes((known | linear)["ct_image"], sampling)
            given["reduction"] = reduction._replace(coverage="ct_coverage" in linear)
        primals = {n: x for n, x in known.items() if not n.startswith("ct_")}
        found = op.push(primals, primals, d, **given) if d else {}
        found = {"ct_" + n: x for n, x in found.items()}
    elif op is GATHER:  # in the image, of which only ct_points is a function
        primals = {"values": known["ct_values"], "points": known["points"]}
        given = {"sampling": sampling.linear(), "reduction": PLAIN}
        shape = _planes(linear["image"], sampling)
        moved = {n: ct for n, ct in d.items() if n == "points"}
        if moved:
            found = {"image": SPLAT.push(primals, {}, moved, shape=shape, **given)["image"]}
    else:  # in values or importance: through the composition
        shapes = {n: jax.ShapeDtypeStruct(x.shape, x.dtype) for n, x in linear.items()}

        def of_linear(at: Operands) -> Operands:
            ordered = {n: (known | at)[n] for n in names}
            return _splat_vjp(ordered, results, sampling=sampling, reduction=reduction, **params)

        given = dict(zip(results, map(ad.instantiate_zeros, cts), strict=True))
        (found,) = jax.linear_transpose(of_linear, shapes)(given)
    split = _split(known | linear, sampling)
    fitted = {n: _fit_batch(x, split[n][0]) for n, x in found.items() if n in linear}
    return [fitted.get(n, ad.Zero(linear[n])) if n in linear else None for n in names]


for _op in (GATHER, SPLAT):
    ad.primitive_jvps[_op.primitive] = partial(_op_jvp, _op)
    ad.primitive_transposes[_op.primitive] = partial(_op_transpose, _op)
    ad.primitive_transposes[_op.tangent] = partial(_tangent_transpose, _op)
for _fused in (
    (gather_tangent_p, _gather_tangent_outputs, _gather_tangent),
    (gather_vjp_tangent_p, _gather_vjp_tangent_outputs, _gather_vjp_tangent),
    (splat_tangent_p, _splat_tangent_outputs, _splat_tangent),
    (splat_vjp_p, _vjp_outputs, _splat_vjp),
):
    ad.primitive_jvps[_fused[0]] = partial(_composed_jvp, *_fused)
ad.primitive_jvps[gather_vjp_p] = _gather_vjp_jvp
ad.primitive_transposes[gather_vjp_tangent_p] = _gather_vjp_tangent_transpose
ad.primitive_transposes[gather_vjp_p] = partial(_adjoint_transpose, GATHER)
ad.primitive_transposes[splat_vjp_p] = partial(_adjoint_transpose, SPLAT)
