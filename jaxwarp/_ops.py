"""Public functions: what they mean, and the checks that people meet."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import Annotated as Float  # what jaxtyping's is to type checkers
from typing import Any, Literal, overload

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from jaxwarp import _ffi, _primitives
from jaxwarp._primitives import Reduction, Sampling

METHODS = ("nearest", "linear", "cubic")
BOUNDARIES = ("constant", "nearest", "mirror", "reflect", "wrap")
REDUCTIONS = ("sum", "average", "softmax")
VALUE_DTYPES = ("float16", "bfloat16", "float32", "float64")
POINT_DTYPES = ("float32", "float64")
AXES = {2: ("(x, y)", "(H, W)"), 3: ("(x, y, z)", "(D, H, W)")}

Method = Literal["nearest", "linear", "cubic"]
Boundary = Literal["constant", "nearest", "mirror", "reflect", "wrap"]
Reduce = Literal["sum", "average", "softmax"]

# ---------------------------------------------------------------------------- checks
# Every message states what was expected, what was received, and the remedy.


def _array(name: str, x: ArrayLike, dtypes: Sequence[str], remedy: str) -> Array:
    array = jnp.asarray(x)
    if array.dtype.name not in dtypes:
        raise TypeError(f"{name}: expected one of {', '.join(dtypes)}, got {array.dtype}; {remedy}")
    return array


def _values(name: str, x: ArrayLike) -> Array:
    return _array(name, x, VALUE_DTYPES, f"convert it, for example {name}.astype(jnp.float32)")


def _points(x: ArrayLike) -> Array:
    return _array(
        "points", x, POINT_DTYPES, "positions need at least float32: points.astype(jnp.float32)"
    )


def _choice(
    name: str, value: Any, options: Sequence[str], remedy: str = "pass one of these"
) -> None:
    if not isinstance(value, str) or value not in options:
        known = ", ".join(map(repr, options))
        raise ValueError(f"{name}: expected one of {known}, got {value!r}; {remedy}")


def _number(name: str, value: Any) -> float:
    # One object for every NaN, so that equal options hash alike and compiled code is found again.
    if isinstance(value, int | float | np.integer | np.floating):
        if isinstance(value, int) and abs(value) > sys.float_info.max:
            raise ValueError(
                f"{name}: expected a number that a float holds, got an int above "
                f"{sys.float_info.max:.2g}; pass float('inf')"
            )
        return math.nan if math.isnan(value) else float(value) + 0.0  # -0.0 equals 0.0 too
    raise TypeError(
        f"{name}: expected a Python float, got {type(value).__name__}; it is part of the compiled "
        "program and cannot be traced or differentiated"
    )


def _flag(name: str, value: Any) -> bool:
    if isinstance(value, bool | np.bool_):
        return bool(value)
    raise TypeError(f"{name}: expected True or False, got {value!r}; pass a Python bool")


def _deterministic(value: Any) -> bool:
    if value is None:
        return _ffi.flag("JAXWARP_DETERMINISTIC", False)
    return _flag("deterministic", value)


def _integers(given: Any) -> tuple[int, ...] | None:
    """None: not a sequence of them."""
    listed = isinstance(given, Sequence) or (isinstance(given, np.ndarray) and given.ndim > 0)
    numbers = tuple(given) if listed else (given,)
    whole = (isinstance(n, int | np.integer) and not isinstance(n, bool) for n in numbers)
    return tuple(map(int, numbers)) if all(whole) else None


def _orders(derivative: Sequence[int] | None, dims: int) -> tuple[int, ...]:
    if derivative is None:
        return (0,) * dims
    orders = _integers(derivative)
    if orders is None or len(orders) != dims or min(orders) < 0:
        raise ValueError(
            f"derivative: expected {dims} orders >= 0 along {AXES[dims][0]}, got {derivative!r}; "
            f"pass for example {(1,) + (0,) * (dims - 1)}"
        )
    return tuple(min(k, 4) for k in orders)  # from order 4 on every weight is 0


def _dims(name: str, size: int) -> int:
    if size not in AXES:
        raise ValueError(
            f"{name}: expected a last axis of 2 (x, y) or 3 (x, y, z), got {size}; put the "
            "coordinates of a position last, and pass a 1-D signal as one row, with y = 0"
        )
    return size


def _rank(name: str, array: Array, least: int, layout: str, channels: str = "") -> None:
    """`channels`: how one adds those, for arrays that have some."""
    if array.ndim < least:
        example = f", for example the channels with {channels}" if channels else ""
        raise ValueError(
            f"{name}: expected at least {least} axes, {layout}, got shape {array.shape}; "
            f"add the missing axes{example}"
        )


def _spatial(name: str, shape: tuple[int, ...], boundary: str) -> None:
    if boundary != "constant" and 0 in shape:
        raise ValueError(
            f"{name}: expected no empty axis with boundary {boundary!r}, got spatial shape "
            f"{shape}; "
            "only boundary 'constant' has a value for an empty image"
        )


def _broadcast(shapes: dict[str, tuple[int, ...]]) -> tuple[int, ...]:
    try:
        return jnp.broadcast_shapes(*shapes.values())
    except ValueError:
        got = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise ValueError(
            f"{', '.join(shapes)}: expected batch axes that broadcast, got {got}; "
            "each must be equal, 1 or absent"
        ) from None


def _lead(x: Array, core: int, rank: int) -> Array:
    """With leading axes of size 1, so that `rank` batch axes stand before the last `core`."""
    return x.reshape((1,) * (rank + core - x.ndim) + x.shape)


def _sampling(
    method: str,
    boundary: str,
    fill_value: Any,
    derivative: tuple[int, ...],
    displacement: bool,
    deterministic: bool | None,
) -> Sampling:
    _choice("method", method, METHODS)
    _choice("boundary", boundary, BOUNDARIES)
    fill = _number("fill_value", fill_value)
    return Sampling(method, boundary, fill, derivative, displacement, _deterministic(deterministic))


# ---------------------------------------------------------------------------- operations


def pixel_grid(shape: Sequence[int], dtype: DTypeLike = jnp.float32) -> Float[Array, "*shape dims"]:
    """Positions of the pixels of an image.

    Args:
      shape: spatial shape, ``(H, W)`` or ``(D, H, W)``.
      dtype: of the result, ``float32`` or ``float64``.

    Returns:
      ``(*shape, dims)``, the position of each pixel, ``(x, y[, z])`` in pixels; 0 is the centre of
      the first pixel. ``gather(image, pixel_grid(image.shape[:-1]))`` is ``image``.

    Raises:
      ValueError: `shape` does not have 2 or 3 sizes.
      TypeError: a `dtype` that cannot hold a position.

    Example:
      >>> import jaxwarp
      >>> jaxwarp.pixel_grid((2, 3))[1, 2]
      Array([2., 1.], dtype=float32)
    """
    sizes = _shape(shape)
    if dtype is None or jnp.dtype(dtype).name not in POINT_DTYPES:
        raise TypeError(
            f"dtype: expected one of {', '.join(POINT_DTYPES)}, got {dtype}; "
            "positions need at least float32"
        )
    axes = jnp.meshgrid(*(jnp.arange(n, dtype=dtype) for n in sizes), indexing="ij")
    return jnp.stack(axes[::-1], axis=-1)


def _shape(shape: Sequence[int]) -> tuple[int, ...]:
    sizes = _integers(shape)
    if sizes is None or len(sizes) not in AXES or min(sizes) < 0:
        raise ValueError(
            f"shape: expected spatial sizes (H, W) or (D, H, W), got {shape!r}; "
            "leave out batch axes and channels"
        )
    return sizes


def _sources(
    values: ArrayLike, points: ArrayLike, shape: Sequence[int]
) -> tuple[Array, Array, tuple[int, ...]]:
    """Values (N, C) and points (N, dims) of an image of spatial `shape`, of any leading axes."""
    values, points, sizes = _values("values", values), _points(points), _shape(shape)
    dims = len(sizes)
    if points.ndim == 0 or points.shape[-1] != dims:
        got = points.shape[-1] if points.ndim else "a scalar"
        raise ValueError(
            f"points: expected a last axis of {dims} for shape {sizes}, got {got}; "
            f"pass {AXES[dims][0]}"
        )
    if values.ndim == 0 or values.shape[:-1] != points.shape[:-1]:
        raise ValueError(
            f"values: expected shape {points.shape[:-1]} + (C,) for points of shape "
            f"{points.shape}, got {values.shape}; pass one value of C channels per point"
        )
    count = math.prod(points.shape[:-1])
    return values.reshape(count, values.shape[-1]), points.reshape(count, dims), sizes


def gather(
    image: Float[ArrayLike, "*shape C"],
    points: Float[ArrayLike, "*S dims"],
    *,
    method: Method = "linear",
    boundary: Boundary = "constant",
    fill_value: float = 0.0,
    derivative: Sequence[int] | None = None,
    forward_mode: bool = False,
    deterministic: bool | None = None,
) -> Float[Array, "*S C"]:
    """Samples an image at positions: ``out(p) = sum_j g(p, j) image(j)``.

    Args:
      image: ``(H, W, C)`` or ``(D, H, W, C)``; float16, bfloat16, float32 or float64. One image;
        batches come from `jax.vmap`, which does not copy an image that it does not map.
      points: ``(*S, 2)`` or ``(*S, 3)``, positions ``(x, y[, z])`` in pixels; float32 or float64,
        whatever the image has. x runs along W, y along H, z along D; 0 is the centre of the first
        pixel.
      method: ``"nearest"`` (ties to the even pixel, as PyTorch; jax's `map_coordinates` rounds them
        away from zero), ``"linear"`` or ``"cubic"`` (Keys, a = -0.5).
      boundary: what lies outside, corner by corner, as in `jax.scipy.ndimage.map_coordinates`:
        ``"constant"`` (`fill_value`), ``"nearest"`` (the pixel at the edge), ``"mirror"`` (turned
        at the centre of that pixel), ``"reflect"`` (at its outer edge) or ``"wrap"`` (periodic).
      fill_value: the value of every corner outside, under ``"constant"``, with the weight of that
        corner: it enters the gradient in `points`. A Python float, part of the compiled program.
      derivative: orders along ``(x, y[, z])``, for example ``(1, 0)`` for the sampled derivative of
        the interpolated image along x. ``None``: the value itself.
      forward_mode: allow `jax.jvp`, `jax.jacfwd` and `jax.linearize` too, where ``False`` allows
        reverse mode and derivatives of it. Solvers for least squares (Gauss-Newton,
        Levenberg-Marquardt) want it.
      deterministic: on a GPU, ``True`` gives sums over points (splats, gradients of the image) the
        same bits in every run, for a second pass over the points and, during the call, 12 bytes of
        memory per element of the sum (24 for float64). On a CPU they never depend on the run.
        ``None`` reads the environment variable ``JAXWARP_DETERMINISTIC``.

    Returns:
      ``(*S, C)`` in the image's dtype, summed in float32 (float64 for float64).

      A position with a NaN gives NaN. An infinite one gives `fill_value` under ``"constant"`` (0 if
      differentiated) and NaN under other boundaries; neither adds to the gradient of the image. A
      huge finite one is an ordinary position outside. A non-finite pixel reaches only the samples
      that touch it with a weight other than 0. At an integer coordinate the derivative in `points`
      is the right-hand one. Each cotangent has the dtype of its primal.

    Raises:
      TypeError: an array of another dtype; half-precision `points`; an option of another type.
      ValueError: a rank, last axis or option that is not as above; an image with an empty axis
        under a boundary other than ``"constant"``.

    Example:
      >>> import jax.numpy as jnp, jaxwarp
      >>> image = jnp.arange(6.0).reshape(2, 3, 1)
      >>> jaxwarp.gather(image, jnp.array([[0.5, 1.0]]))
      Array([[3.5]], dtype=float32)
      >>> jaxwarp.gather(image, jnp.array([[0.5, 1.0]]), derivative=(1, 0))  # along x
      Array([[1.]], dtype=float32)

    Source: equation (1) of Zhiwei Xu, "Notes: CUDA Implementation of Differentiable Image Warping"
    (2021); the gradient is (2). Cubic: Keys, "Cubic convolution interpolation for digital image
    processing" (1981).
    """
    image, points = _values("image", image), _points(points)
    if image.ndim - 1 not in AXES:
        raise ValueError(
            f"image: expected shape (H, W, C) or (D, H, W, C), got {image.shape}; "
            "add the channels with [..., None], use jax.vmap for a batch, and pass a 1-D signal as "
            "one row, signal[None, :, None], with y = 0"
        )
    dims = image.ndim - 1
    if points.ndim == 0 or points.shape[-1] != dims:
        got = points.shape[-1] if points.ndim else "a scalar"
        raise ValueError(
            f"points: expected a last axis of {dims} for a {dims}-D image, got {got}; "
            f"pass {AXES[dims][0]}"
        )
    sampling = _sampling(
        method, boundary, fill_value, _orders(derivative, dims), False, deterministic
    )
    _spatial("image", image.shape[:-1], boundary)
    flat = points.reshape(math.prod(points.shape[:-1]), dims)
    out = _primitives.gather(
        image, flat, sampling, forward_mode=_flag("forward_mode", forward_mode)
    )
    return out.reshape(*points.shape[:-1], image.shape[-1])


def splat(
    values: Float[ArrayLike, "*S C"],
    points: Float[ArrayLike, "*S dims"],
    shape: Sequence[int],
    *,
    method: Method = "linear",
    boundary: Boundary = "constant",
    derivative: Sequence[int] | None = None,
    forward_mode: bool = False,
    deterministic: bool | None = None,
) -> Float[Array, "*shape C"]:
    """Adds values into an image at positions: ``out(j) = sum_i g(p_i, j) values_i``.

    The exact adjoint of `gather` with the same options and ``fill_value=0``:
    ``<gather(image, p), v> == <image, splat(v, p, shape)>``.

    Args:
      values: ``(*S, C)``; float16, bfloat16, float32 or float64. Batches come from `jax.vmap`.
      points: ``(*S, 2)`` or ``(*S, 3)``, positions ``(x, y[, z])`` in pixels; float32 or float64.
      shape: spatial shape of the result, ``(H, W)`` or ``(D, H, W)``.
      method, derivative, forward_mode, deterministic: as in `gather`.
      boundary: the index rule of `gather`: ``"constant"`` drops what falls outside, ``"nearest"``
        piles it up at the edge, the others fold it back.

    Returns:
      ``(*shape, C)`` in the values' dtype, summed in float32 (float64 for float64). A source with a
      non-finite coordinate is dropped, and all of its gradients are 0.

    Raises:
      TypeError: an array of another dtype; half-precision `points`; an option of another type.
      ValueError: `values` and `points` that do not fit each other or `shape`; an unknown option; an
        empty `shape` under a boundary other than ``"constant"``.

    Example:
      >>> import jax.numpy as jnp, jaxwarp
      >>> jaxwarp.splat(jnp.array([[4.0]]), jnp.array([[0.25, 0.0]]), (1, 2))[..., 0]
      Array([[3., 1.]], dtype=float32)

    Source: the numerator of equation (5) of Zhiwei Xu, "Notes: CUDA Implementation of
    Differentiable Image Warping" (2021).
    """
    values, points, sizes = _sources(values, points, shape)
    orders = _orders(derivative, len(sizes))
    sampling = _sampling(method, boundary, 0.0, orders, False, deterministic)
    _spatial("shape", sizes, boundary)
    return _primitives.splat(
        values,
        points,
        None,
        sizes,
        sampling,
        forward_mode=_flag("forward_mode", forward_mode),
    )["image"]


def backward_warp(
    image: Float[ArrayLike, "... H W C"],
    flow: Float[ArrayLike, "... h w dims"],
    *,
    method: Method = "linear",
    boundary: Boundary = "constant",
    fill_value: float = 0.0,
    forward_mode: bool = False,
    deterministic: bool | None = None,
) -> Float[Array, "... h w C"]:
    """Warps an image backwards along a flow: ``out[q] = image(q + flow[q])``.

    Args:
      image: ``(*batch, H, W, C)`` or ``(*batch, D, H, W, C)``; float16, bfloat16, float32, float64.
      flow: ``(*batch, h, w, 2)`` or ``(*batch, d, h, w, 3)``, displacements ``(x, y[, z])`` in
        pixels; the same dtypes, not always the same one. Half-precision flow is added to the pixel
        in float32. Its spatial shape may be another than that of the image; q counts its pixels.
      method, boundary, fill_value, forward_mode, deterministic: as in `gather`.

    Returns:
      ``(*batch, h, w, C)`` or ``(*batch, d, h, w, C)`` in the image's dtype. The batch axes
      broadcast against each other and mean the same as `jax.vmap`; a shared operand is not copied.
      Non-finite displacements and pixels, and integer coordinates: as in `gather`.

    Raises:
      TypeError: an array of another dtype; an option of another type.
      ValueError: ranks, last axes, batch axes or options that are not as above; an image with an
        empty axis under a boundary other than ``"constant"``.

    Example:
      >>> import jax.numpy as jnp, jaxwarp
      >>> image = jnp.arange(4.0).reshape(1, 4, 1)
      >>> flow = jnp.full((1, 4, 2), jnp.array([1.0, 0.0]))
      >>> jaxwarp.backward_warp(image, flow)[0, :, 0]
      Array([1., 2., 3., 0.], dtype=float32)

    Source: equation (1) of Zhiwei Xu, "Notes: CUDA Implementation of Differentiable Image Warping"
    (2021), with p = q + flow[q]; the gradient is (2).
    """
    image, flow = _values("image", image), _values("flow", flow)
    dims = _dims("flow", flow.shape[-1] if flow.ndim else 0)
    _rank("flow", flow, dims + 1, f"(*batch, {AXES[dims][1][1:-1]}, {dims})")
    _rank("image", image, dims + 1, f"(*batch, {AXES[dims][1][1:-1]}, C)", "[..., None]")
    sampling = _sampling(method, boundary, fill_value, (0,) * dims, True, deterministic)
    _spatial("image", image.shape[-1 - dims : -1], boundary)
    core = dims + 1
    batch = _broadcast({"image": image.shape[:-core], "flow": flow.shape[:-core]})
    return _primitives.gather(
        _lead(image, core, len(batch)),
        _lead(flow, core, len(batch)),
        sampling,
        forward_mode=_flag("forward_mode", forward_mode),
    )


@overload
def forward_warp(
    values: Float[ArrayLike, "... H W C"],
    flow: Float[ArrayLike, "... H W dims"],
    *,
    reduce: Reduce = ...,
    importance: Float[ArrayLike, "... H W"] | None = ...,
    method: Method = ...,
    boundary: Boundary = ...,
    fill_value: float = ...,
    min_coverage: float = ...,
    return_coverage: Literal[False] = ...,
    forward_mode: bool = ...,
    deterministic: bool | None = ...,
) -> Float[Array, "... H W C"]: ...
@overload
def forward_warp(
    values: Float[ArrayLike, "... H W C"],
    flow: Float[ArrayLike, "... H W dims"],
    *,
    reduce: Reduce = ...,
    importance: Float[ArrayLike, "... H W"] | None = ...,
    method: Method = ...,
    boundary: Boundary = ...,
    fill_value: float = ...,
    min_coverage: float = ...,
    return_coverage: Literal[True],
    forward_mode: bool = ...,
    deterministic: bool | None = ...,
) -> tuple[Float[Array, "... H W C"], Float[Array, "... H W"]]: ...
def forward_warp(
    values: Float[ArrayLike, "... H W C"],
    flow: Float[ArrayLike, "... H W dims"],
    *,
    reduce: Reduce = "average",
    importance: Float[ArrayLike, "... H W"] | None = None,
    method: Method = "linear",
    boundary: Boundary = "constant",
    fill_value: float = 0.0,
    min_coverage: float = 0.0,
    return_coverage: bool = False,
    forward_mode: bool = False,
    deterministic: bool | None = None,
) -> Float[Array, "... H W C"] | tuple[Float[Array, "... H W C"], Float[Array, "... H W"]]:
    """Warps an image forwards along a flow: the value at pixel r moves to r + flow[r].

    With ``N_j = sum_i w_i g(p_i, j) values_i`` and ``D_j = sum_i w_i g(p_i, j)``, the result at
    pixel j is ``N_j / D_j`` (``"average"``, ``"softmax"``) or ``N_j`` (``"sum"``).

    Args:
      values: ``(*batch, H, W, C)`` or ``(*batch, D, H, W, C)``; float16, bfloat16, float32 or
        float64.
      flow: ``(*batch, H, W, 2)`` or ``(*batch, D, H, W, 3)``, displacements ``(x, y[, z])`` in
        pixels; the same dtypes, not always the same one. Half-precision flow is added to the pixel
        in float32. A value with a non-finite displacement is dropped, and its gradients are 0.
      reduce: ``"average"``, ``"softmax"`` or ``"sum"``.
      importance: ``(*batch, H, W)`` or ``(*batch, D, H, W)``, the weights w; ``None``: all 1. Must
        be >= 0 for an average. A source of importance 0 adds nothing, whatever its value.
        For ``"softmax"``, which needs it, the logits: ``w_ij = exp(importance_i - m_j)`` with m_j
        the largest of those that reach pixel j, so that logits of any size are safe; where several
        values meet, that of the largest logit wins. A logit of -inf weighs nothing.
      method: as in `gather`; only ``"sum"`` takes ``"cubic"``, whose weights go negative.
      boundary: as in `splat`.
      fill_value: the value of a hole; not for ``"sum"``.
      min_coverage: a target with a coverage of no more than this is a hole; not for ``"sum"``. A
        small number, such as 0.01, keeps gradients from exploding where a target gets a sliver of
        a value.
      return_coverage: also return the coverage.
      forward_mode, deterministic: as in `gather`.

    Returns:
      ``(*batch, H, W, C)`` or ``(*batch, D, H, W, C)`` in the values' dtype. A target that nothing
      reaches, or only weights of 0, is a hole too; holes pass no gradient, and nothing is added to
      a denominator. The batch axes broadcast and mean the same as `jax.vmap`.

      With `return_coverage` a pair ``(out, coverage)``. The coverage ``sum_i g(p_i, j)`` has shape
      ``(*batch, H, W)`` or ``(*batch, D, H, W)``, in float32 (float64 for float64 values): 0 in
      holes, about ``1 / |det(I + grad flow)|`` elsewhere.

    Raises:
      TypeError: an array of another dtype; an option of another type.
      ValueError: shapes that do not fit; an unknown option, or one that `reduce` refuses; no
        `importance` for ``"softmax"``; a `min_coverage` below 0; an empty axis under a boundary
        other than ``"constant"``.

    Example:
      >>> import jax.numpy as jnp, jaxwarp
      >>> values = jnp.array([[[1.0], [2.0], [3.0]]])
      >>> flow = jnp.full((1, 3, 2), jnp.array([1.0, 0.0]))
      >>> jaxwarp.forward_warp(values, flow, fill_value=-1.0)[0, :, 0]
      Array([-1.,  1.,  2.], dtype=float32)

    Source: equation (5) of Zhiwei Xu, "Notes: CUDA Implementation of Differentiable Image Warping"
    (2021); the gradient is (6). Softmax: Niklaus and Liu, "Softmax splatting for video frame
    interpolation" (2020).
    """
    values, flow = _values("values", values), _values("flow", flow)
    dims = _dims("flow", flow.shape[-1] if flow.ndim else 0)
    core, layout = dims + 1, AXES[dims][1][1:-1]
    _rank("flow", flow, core, f"(*batch, {layout}, {dims})")
    _rank("values", values, core, f"(*batch, {layout}, C)", "[..., None]")
    spatial = flow.shape[-core:-1]
    if values.shape[-core:-1] != spatial:
        raise ValueError(
            f"values: expected the flow's spatial shape {spatial}, got {values.shape[-core:-1]}; "
            "every value needs its displacement"
        )
    batches = {"values": values.shape[:-core], "flow": flow.shape[:-core]}
    if importance is not None:
        importance = _values("importance", importance)
        if importance.ndim < dims or importance.shape[importance.ndim - dims :] != spatial:
            raise ValueError(
                f"importance: expected shape (*batch, {layout}) with the flow's spatial shape "
                f"{spatial}, got {importance.shape}; it has no channel axis"
            )
        importance = importance.astype(_primitives.accumulator(values.dtype))
        batches["importance"] = importance.shape[: importance.ndim - dims]
    batch = _broadcast(batches)

    _choice("reduce", reduce, REDUCTIONS)
    sampling = _sampling(method, boundary, fill_value, (0,) * dims, True, deterministic)
    least = _number("min_coverage", min_coverage)
    if reduce == "sum" and (least != 0 or sampling.fill_value != 0):
        raise ValueError(
            "fill_value, min_coverage: expected the defaults with reduce='sum', got "
            f"{fill_value!r} and {min_coverage!r}; a sum has no holes, use reduce='average'"
        )
    if reduce != "sum" and method == "cubic":
        raise ValueError(
            f"method: expected 'nearest' or 'linear' with reduce={reduce!r}, got 'cubic'; its "
            "weights go negative, use reduce='sum'"
        )
    if reduce == "softmax" and importance is None:
        raise ValueError(
            "importance: expected the logits of reduce='softmax', got None; pass one number per "
            "value, for example -alpha * photometric_error, or use reduce='average'"
        )
    if not least >= 0:
        raise ValueError(f"min_coverage: expected a number >= 0, got {min_coverage!r}; 0 keeps all")
    _spatial("values", spatial, boundary)

    results = _primitives.splat(
        _lead(values, core, len(batch)),
        _lead(flow, core, len(batch)),
        None if importance is None else _lead(importance, dims, len(batch)),
        (*batch, *spatial),
        sampling,
        Reduction(reduce, least, _flag("return_coverage", return_coverage)),
        forward_mode=_flag("forward_mode", forward_mode),
    )
    return (results["image"], results["coverage"]) if return_coverage else results["image"]
