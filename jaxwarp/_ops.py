"""Public functions: what they mean."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated as Float  # what jaxtyping's are to type checkers
from typing import Annotated as Inexact
from typing import Annotated as Shaped
from typing import Literal, overload

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from jaxwarp import _checks, _formulas, _numbers, _primitives
from jaxwarp._checks import AXES, Boundary, Method, Reduce
from jaxwarp._primitives import Reduction
from jaxwarp.reference import Fill


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
    sizes = _checks.shape(shape)
    if dtype is None or jnp.dtype(dtype).name not in _checks.POINT_DTYPES:
        raise TypeError(
            f"dtype: expected one of {', '.join(_checks.POINT_DTYPES)}, got {dtype}; "
            "positions need at least float32"
        )
    return _formulas.pixel_positions(sizes, dtype)


def gather(
    image: Shaped[ArrayLike, "*shape C"],
    points: Float[ArrayLike, "*S dims"],
    *,
    method: Method = "linear",
    boundary: Boundary | Sequence[Boundary] = "constant",
    fill_value: Fill = 0.0,
    derivative: Sequence[int] | None = None,
    forward_mode: bool = False,
    deterministic: bool | None = None,
) -> Shaped[Array, "*S C"]:
    """Samples an image at positions: ``out(p) = sum_j g(p, j) image(j)``.

    Args:
      image: ``(H, W, C)`` or ``(D, H, W, C)``; float16, bfloat16, float32, float64, complex64 or
        complex128; for ``"nearest"`` also bool and integers of 8 to 64 bits, of which every bit is
        kept. One image; batches come from `jax.vmap`, which does not copy an image that it does not
        map.
      points: ``(*S, 2)`` or ``(*S, 3)``, positions ``(x, y[, z])`` in pixels; float32 or float64,
        whatever the image has. x runs along W, y along H, z along D; 0 is the centre of the first
        pixel.
      method: ``"nearest"`` (ties to the even pixel, as PyTorch; jax's `map_coordinates` rounds them
        away from zero), ``"linear"`` or ``"cubic"`` (Keys, a = -0.5).
      boundary: what lies outside, corner by corner, as in `jax.scipy.ndimage.map_coordinates`:
        ``"constant"`` (`fill_value`), ``"nearest"`` (the pixel at the edge), ``"mirror"`` (turned
        at the centre of that pixel), ``"reflect"`` (at its outer edge) or ``"wrap"`` (periodic). Or
        one for each axis, along ``(x, y[, z])``: ``("wrap", "nearest")`` for a panorama.
      fill_value: the value of every corner outside, under ``"constant"``, with the weight of that
        corner: it enters the gradient in `points`. A Python number is a part of the compiled
        program. An array, ``()`` or ``(C,)``, may be traced and has a gradient, in its own dtype.
        For integers, what their dtype holds exactly.
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
      ``(*S, C)`` in the image's dtype, summed in float32 (float64 for float64). Real and imaginary
      parts are channels of their own.

      A position with a NaN gives NaN. An infinite coordinate gives `fill_value` under
      ``"constant"`` (0 if differentiated) and NaN under another boundary of its axis; neither adds
      to the gradient of the image. A
      huge finite one is an ordinary position outside. A non-finite pixel reaches only the samples
      that touch it with a weight other than 0. At an integer coordinate the derivative in `points`
      is the right-hand one. Each cotangent has the dtype of its primal. Integers, which have no
      NaN, hold `fill_value` instead, and pass no gradient to `points`.

    Raises:
      TypeError: an array of another dtype; half-precision `points`; an option of another type.
      ValueError: a rank, last axis or option that is not as above; a derivative of integers; an
        empty axis of the image with a boundary other than ``"constant"``.

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
    image, points = _checks.image("image", image, method), _checks.points(points)
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
    orders = _checks.orders(derivative, dims)
    if any(orders) and image.dtype.name in _checks.INTEGERS:
        raise ValueError(
            f"derivative: expected none of an image of {image.dtype}, got {derivative!r}; by "
            "'nearest' it is 0 everywhere"
        )
    sampling = _checks.sampling(method, boundary, orders, False, deterministic)
    _checks.spatial("image", image.shape[:-1], sampling.boundary)
    out = _numbers.gather(
        image,
        points.reshape(math.prod(points.shape[:-1]), dims),
        sampling,
        _checks.fill(fill_value, image.dtype, image.shape[-1]),
        forward_mode=_checks.flag("forward_mode", forward_mode),
    )
    return out.reshape(*points.shape[:-1], image.shape[-1])


def splat(
    values: Inexact[ArrayLike, "*S C"],
    points: Float[ArrayLike, "*S dims"],
    shape: Sequence[int],
    *,
    method: Method = "linear",
    boundary: Boundary | Sequence[Boundary] = "constant",
    derivative: Sequence[int] | None = None,
    forward_mode: bool = False,
    deterministic: bool | None = None,
) -> Inexact[Array, "*shape C"]:
    """Adds values into an image at positions: ``out(j) = sum_i g(p_i, j) values_i``.

    The exact adjoint of `gather` with the same options and ``fill_value=0``:
    ``<gather(image, p), v> == <image, splat(v, p, shape)>``.

    Args:
      values: ``(*S, C)``; float16, bfloat16, float32, float64, complex64 or complex128. Batches
        come from `jax.vmap`.
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
        empty axis of `shape` with a boundary other than ``"constant"``.

    Example:
      >>> import jax.numpy as jnp, jaxwarp
      >>> jaxwarp.splat(jnp.array([[4.0]]), jnp.array([[0.25, 0.0]]), (1, 2))[..., 0]
      Array([[3., 1.]], dtype=float32)

    Source: the numerator of equation (5) of Zhiwei Xu, "Notes: CUDA Implementation of
    Differentiable Image Warping" (2021).
    """
    values, points, sizes = _checks.sources(values, points, shape)
    orders = _checks.orders(derivative, len(sizes))
    sampling = _checks.sampling(method, boundary, orders, False, deterministic)
    _checks.spatial("shape", sizes, sampling.boundary)
    return _numbers.splat(
        values,
        points,
        None,
        sizes,
        sampling,
        forward_mode=_checks.flag("forward_mode", forward_mode),
    )["image"]


def backward_warp(
    image: Shaped[ArrayLike, "... H W C"],
    flow: Float[ArrayLike, "... h w dims"],
    *,
    method: Method = "linear",
    boundary: Boundary | Sequence[Boundary] = "constant",
    fill_value: Fill = 0.0,
    forward_mode: bool = False,
    deterministic: bool | None = None,
) -> Shaped[Array, "... h w C"]:
    """Warps an image backwards along a flow: ``out[q] = image(q + flow[q])``.

    Args:
      image: ``(*batch, H, W, C)`` or ``(*batch, D, H, W, C)``; dtypes as in `gather`.
      flow: ``(*batch, h, w, 2)`` or ``(*batch, d, h, w, 3)``, displacements ``(x, y[, z])`` in
        pixels; float16, bfloat16, float32 or float64, whatever the image has. Half-precision flow
        is added to the pixel in float32. Its spatial shape may be another than that of the image;
        q counts its pixels.
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
    image, flow = _checks.image("image", image, method), _checks.real("flow", flow)
    dims = _checks.dims("flow", flow.shape[-1] if flow.ndim else 0)
    _checks.rank("flow", flow, dims + 1, f"(*batch, {AXES[dims][1][1:-1]}, {dims})")
    _checks.rank("image", image, dims + 1, f"(*batch, {AXES[dims][1][1:-1]}, C)", "[..., None]")
    sampling = _checks.sampling(method, boundary, (0,) * dims, True, deterministic)
    _checks.spatial("image", image.shape[-1 - dims : -1], sampling.boundary)
    core = dims + 1
    batch = _checks.broadcast({"image": image.shape[:-core], "flow": flow.shape[:-core]})
    return _numbers.gather(
        _lead(image, core, len(batch)),
        _lead(flow, core, len(batch)),
        sampling,
        _checks.fill(fill_value, image.dtype, image.shape[-1]),
        forward_mode=_checks.flag("forward_mode", forward_mode),
    )


@overload
def forward_warp(
    values: Inexact[ArrayLike, "... H W C"],
    flow: Float[ArrayLike, "... H W dims"],
    *,
    reduce: Reduce = ...,
    importance: Float[ArrayLike, "... H W"] | None = ...,
    method: Method = ...,
    boundary: Boundary | Sequence[Boundary] = ...,
    fill_value: Fill = ...,
    min_coverage: float = ...,
    return_coverage: Literal[False] = ...,
    forward_mode: bool = ...,
    deterministic: bool | None = ...,
) -> Inexact[Array, "... H W C"]: ...
@overload
def forward_warp(
    values: Inexact[ArrayLike, "... H W C"],
    flow: Float[ArrayLike, "... H W dims"],
    *,
    reduce: Reduce = ...,
    importance: Float[ArrayLike, "... H W"] | None = ...,
    method: Method = ...,
    boundary: Boundary | Sequence[Boundary] = ...,
    fill_value: Fill = ...,
    min_coverage: float = ...,
    return_coverage: Literal[True],
    forward_mode: bool = ...,
    deterministic: bool | None = ...,
) -> tuple[Inexact[Array, "... H W C"], Float[Array, "... H W"]]: ...
def forward_warp(
    values: Inexact[ArrayLike, "... H W C"],
    flow: Float[ArrayLike, "... H W dims"],
    *,
    reduce: Reduce = "average",
    importance: Float[ArrayLike, "... H W"] | None = None,
    method: Method = "linear",
    boundary: Boundary | Sequence[Boundary] = "constant",
    fill_value: Fill = 0.0,
    min_coverage: float = 0.0,
    return_coverage: bool = False,
    forward_mode: bool = False,
    deterministic: bool | None = None,
) -> Inexact[Array, "... H W C"] | tuple[Inexact[Array, "... H W C"], Float[Array, "... H W"]]:
    """Warps an image forwards along a flow: the value at pixel r moves to r + flow[r].

    With ``N_j = sum_i w_i g(p_i, j) values_i`` and ``D_j = sum_i w_i g(p_i, j)``, the result at
    pixel j is ``N_j / D_j`` (``"average"``, ``"softmax"``) or ``N_j`` (``"sum"``).

    Args:
      values: ``(*batch, H, W, C)`` or ``(*batch, D, H, W, C)``; dtypes as in `splat`.
      flow: ``(*batch, H, W, 2)`` or ``(*batch, D, H, W, 3)``, displacements ``(x, y[, z])`` in
        pixels; float16, bfloat16, float32 or float64, whatever the values have. Half-precision flow
        is added to the pixel in float32. A value with a non-finite displacement is dropped, and its
        gradients are 0.
      reduce: ``"average"``, ``"softmax"`` or ``"sum"``.
      importance: ``(*batch, H, W)`` or ``(*batch, D, H, W)``, the weights w; ``None``: all 1. Must
        be >= 0 for an average. A source of importance 0 adds nothing, whatever its value.
        For ``"softmax"``, which needs it, the logits: ``w_ij = exp(importance_i - m_j)`` with m_j
        the largest of those that reach pixel j, so that logits of any size are safe; where several
        values meet, that of the largest logit wins. A logit of -inf weighs nothing.
      method: as in `gather`; only ``"sum"`` takes ``"cubic"``, whose weights go negative.
      boundary: as in `splat`.
      fill_value: the value of a hole, a number or an array as in `gather`; not for ``"sum"``. An
        array gets the cotangents of the holes.
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
    values, flow = _checks.values("values", values), _checks.real("flow", flow)
    dims = _checks.dims("flow", flow.shape[-1] if flow.ndim else 0)
    core, layout = dims + 1, AXES[dims][1][1:-1]
    _checks.rank("flow", flow, core, f"(*batch, {layout}, {dims})")
    _checks.rank("values", values, core, f"(*batch, {layout}, C)", "[..., None]")
    spatial = flow.shape[-core:-1]
    if values.shape[-core:-1] != spatial:
        raise ValueError(
            f"values: expected the flow's spatial shape {spatial}, got {values.shape[-core:-1]}; "
            "every value needs its displacement"
        )
    batches = {"values": values.shape[:-core], "flow": flow.shape[:-core]}
    if importance is not None:
        importance = _checks.real("importance", importance)
        if importance.ndim < dims or importance.shape[importance.ndim - dims :] != spatial:
            raise ValueError(
                f"importance: expected shape (*batch, {layout}) with the flow's spatial shape "
                f"{spatial}, got {importance.shape}; it has no channel axis"
            )
        importance = importance.astype(_primitives.accumulator(values.dtype))
        batches["importance"] = importance.shape[: importance.ndim - dims]
    batch = _checks.broadcast(batches)

    _checks.choice("reduce", reduce, _checks.REDUCTIONS)
    sampling = _checks.sampling(method, boundary, (0,) * dims, True, deterministic)
    fill = _checks.fill(fill_value, values.dtype, values.shape[-1])
    least = _checks.number("min_coverage", min_coverage)
    if reduce == "sum" and (least != 0 or not isinstance(fill, float) or fill != 0):
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
    _checks.spatial("values", spatial, sampling.boundary)

    results = _numbers.splat(
        _lead(values, core, len(batch)),
        _lead(flow, core, len(batch)),
        None if importance is None else _lead(importance, dims, len(batch)),
        (*batch, *spatial),
        sampling,
        Reduction(reduce, least, _checks.flag("return_coverage", return_coverage)),
        fill,
        forward_mode=_checks.flag("forward_mode", forward_mode),
    )
    return (results["image"], results["coverage"]) if return_coverage else results["image"]


def _lead(x: Array, core: int, rank: int) -> Array:
    """With leading axes of size 1, so that `rank` batch axes stand before the last `core`."""
    return x.reshape((1,) * (rank + core - x.ndim) + x.shape)
