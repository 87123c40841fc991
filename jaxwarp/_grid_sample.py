"""PyTorch's `grid_sample` on the gather of this package, and its normalised coordinates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated as Float  # what jaxtyping's are to type checkers
from typing import Annotated as Shaped
from typing import Literal

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from jaxwarp import _checks, _numbers, _ops, _primitives

METHODS = {"bilinear": "linear", "nearest": "nearest", "bicubic": "cubic"}
PADDINGS = ("zeros", "border", "reflection")
CUBIC_A = -0.75  # where `gather` has Keys' -0.5


def grid_sample(
    input: Shaped[ArrayLike, "... H W"],
    grid: Float[ArrayLike, "... h w dims"],
    *,
    mode: Literal["bilinear", "nearest", "bicubic"] = "bilinear",
    padding_mode: Literal["zeros", "border", "reflection"] = "zeros",
    align_corners: bool = False,
    forward_mode: bool = False,
) -> Shaped[Array, "... h w"]:
    """Samples a channels-first image at normalised coordinates, as `torch.nn.functional` does.

    The image is read where it lies, without a transpose. What differs from PyTorch:

    - `mode`, `padding_mode` and `align_corners` are keywords, and `align_corners` is a bool.
    - Any number of leading batch axes, which broadcast: one image under many grids is not copied.
    - `input` and `grid` may have different dtypes.
    - At a kink the gradient is the right-hand derivative: PyTorch's is 0 on the border with
      ``"border"``, and the left-hand one where ``"reflection"`` has turned the axis round.
    - A NaN in the grid gives NaN. An infinite coordinate gives 0 with ``"zeros"``, else NaN.

    Args:
      input: ``(*batch, C, H, W)`` or ``(*batch, C, D, H, W)``; dtypes as in `jaxwarp.gather`, also
        bool and integers for ``"nearest"``, which hold 0 where others hold NaN.
      grid: ``(*batch, h, w, 2)`` or ``(*batch, d, h, w, 3)``, (x, y[, z]) where -1 and 1 are
        the two ends of an axis of the image; float16, bfloat16, float32 or float64. A
        half-precision grid is read exactly, but -1 to 1 in bfloat16 has steps of 1/256: pass
        float32 where you can.
      mode: ``"bilinear"`` (trilinear in 3-D), ``"nearest"`` (ties to even) or ``"bicubic"``
        (a = -0.75, tricubic in 3-D).
      padding_mode: ``"zeros"`` outside, ``"border"`` (the nearest pixel of the border) or
        ``"reflection"``, about the border's pixel centres if `align_corners`, else its edges.
      align_corners: do -1 and 1 name the centres of the first and the last pixel, or their outer
        edges? An axis of one pixel is sampled at that pixel if `align_corners`.
      forward_mode: as in `jaxwarp.gather`.

    Returns:
      ``(*batch, C, h, w)`` or ``(*batch, C, d, h, w)`` in the input's dtype, summed in float32
      (float64 for float64).

    Raises:
      TypeError: an array of another dtype; `align_corners` that is not a bool.
      ValueError: ranks, last axis, batch axes or options that are not as above; an empty axis of
        the image with a `padding_mode` other than ``"zeros"``.

    Example:
      >>> import jax.numpy as jnp, jaxwarp
      >>> image = jnp.arange(6.0).reshape(1, 1, 2, 3)
      >>> grid = jnp.array([[[[-1.0, -1.0], [0.0, 0.0], [1.0, 1.0]]]])
      >>> jaxwarp.grid_sample(image, grid, align_corners=True)[0, 0]
      Array([[0. , 2.5, 5. ]], dtype=float32)

    Source: `torch.nn.functional.grid_sample`, PyTorch 2.
    """
    _checks.choice("mode", mode, tuple(METHODS))
    input = _checks.image("input", input, METHODS[mode], "mode='nearest'")
    grid = _checks.real("grid", grid)
    dims = _checks.dims("grid", grid.shape[-1] if grid.ndim else 0)
    core, layout = dims + 1, "D, H, W" if dims == 3 else "H, W"
    _checks.rank("input", input, core, f"(*batch, C, {layout})", "[None]")
    _checks.rank("grid", grid, core, f"(*batch, {layout}, {dims})")
    _checks.choice("padding_mode", padding_mode, PADDINGS)
    align_corners = _checks.flag("align_corners", align_corners)
    batches = {"input": input.shape[:-core], "grid": grid.shape[:-core]}
    rank = len(_checks.broadcast(batches))
    spatial, extent = input.shape[-dims:], grid.shape[-core:-1]

    reflect = "mirror" if align_corners else "reflect"
    boundary = {"zeros": "constant", "border": "nearest", "reflection": reflect}[padding_mode]
    sampling = _checks.sampling(METHODS[mode], boundary, (0,) * dims, False, None)
    _checks.spatial("input", spatial, sampling.boundary)
    sampling = sampling._replace(channels_first=True)
    if mode == "bicubic":
        sampling = sampling._replace(cubic_a=CUBIC_A)

    points = to_pixels(grid, spatial, align_corners=align_corners)
    if mode == "nearest" and padding_mode == "reflection":
        points = _reflected(points, spatial, align_corners)
    points = points.reshape(*grid.shape[:-core], math.prod(extent), dims)
    out = _numbers.gather(
        _ops._lead(input, core, rank),
        _ops._lead(points, 2, rank),
        sampling,
        _checks.fill(0, input.dtype, input.shape[-core]),
        forward_mode=_checks.flag("forward_mode", forward_mode),
    )
    return out.reshape(*out.shape[:-1], *extent)


def to_pixels(
    grid: Float[ArrayLike, "*S dims"], shape: Sequence[int], *, align_corners: bool
) -> Float[Array, "*S dims"]:
    """Converts normalised positions to pixels.

    For positions, not for displacements, which have no origin: those are multiplied by ``(n - 1) /
    2`` with `align_corners` and by ``n / 2`` without, n being the sizes ``(W, H[, D])``.

    Args:
      grid: ``(*S, 2)`` or ``(*S, 3)``, (x, y[, z]) where -1 and 1 are the two ends of an axis.
      shape: spatial shape of the image, ``(H, W)`` or ``(D, H, W)``.
      align_corners: do -1 and 1 name the centres of the first and the last pixel, or their outer
        edges?

    Returns:
      Positions of the same shape in pixels, 0 being the centre of the first pixel; in the grid's
      dtype, but at least float32. With `align_corners` all of an axis of one pixel is pixel 0.

    Raises:
      TypeError: a `grid` that is not floating point; `align_corners` that is not a bool.
      ValueError: a last axis that does not fit `shape`.

    Example:
      >>> import jax.numpy as jnp, jaxwarp
      >>> jaxwarp.to_pixels(jnp.array([-1.0, 1.0]), (4, 6), align_corners=False)
      Array([-0.5,  3.5], dtype=float32)

    Source: `torch.nn.functional.grid_sample`, PyTorch 2.
    """
    grid, n = _normalised("grid", grid, shape)
    if not _checks.flag("align_corners", align_corners):
        return ((grid + 1) * n - 1) / 2
    points = (grid + 1) / 2 * (n - 1)
    return jnp.where((n == 1) & jnp.isinf(grid), grid, points)  # inf * 0


def to_normalized(
    points: Float[ArrayLike, "*S dims"], shape: Sequence[int], *, align_corners: bool
) -> Float[Array, "*S dims"]:
    """Converts pixels to normalised coordinates: the inverse of `to_pixels`.

    Args:
      points: ``(*S, 2)`` or ``(*S, 3)``, (x, y[, z]) in pixels; 0 is the centre of the first.
      shape: spatial shape of the image, ``(H, W)`` or ``(D, H, W)``.
      align_corners: do -1 and 1 name the centres of the first and the last pixel, or their outer
        edges?

    Returns:
      Normalised coordinates of the same shape; in the dtype of the points, but at least float32.
      With `align_corners` an axis of one pixel has no inverse, and gives 0.

    Raises:
      TypeError: `points` that are not floating point; `align_corners` that is not a bool.
      ValueError: a last axis that does not fit `shape`.

    Example:
      >>> import jax.numpy as jnp, jaxwarp
      >>> jaxwarp.to_normalized(jnp.array([2.5, 3.0]), (4, 6), align_corners=True)
      Array([0., 1.], dtype=float32)

    Source: `torch.nn.functional.grid_sample`, PyTorch 2.
    """
    points, n = _normalised("points", points, shape)
    if not _checks.flag("align_corners", align_corners):
        return (2 * points + 1) / np.maximum(n, 1) - 1
    return jnp.where(n <= 1, 0, 2 * points / np.maximum(n - 1, 1) - 1)


def _normalised(name: str, x: ArrayLike, shape: Sequence[int]) -> tuple[Array, np.ndarray]:
    """The coordinates, at least float32, and the sizes along (x, y[, z]) in their dtype."""
    coordinates, sizes = _checks.real(name, x), _checks.shape(shape)
    if coordinates.ndim == 0 or coordinates.shape[-1] != len(sizes):
        got = coordinates.shape[-1] if coordinates.ndim else "a scalar"
        raise ValueError(
            f"{name}: expected a last axis of {len(sizes)} for shape {sizes}, got {got}; "
            f"pass {_checks.AXES[len(sizes)][0]}"
        )
    dtype = _primitives.accumulator(coordinates.dtype)
    return coordinates.astype(dtype), np.array(sizes[::-1], dtype)


def _reflected(points: Array, shape: Sequence[int], align_corners: bool) -> Array:
    """Positions folded into the image. PyTorch rounds to the nearest pixel after this; at ties that
    is not what folding the rounded position gives."""
    n = np.array(shape[::-1], points.dtype)
    low, span = (0, n - 1) if align_corners else (-0.5, n)
    along = jnp.mod(jnp.abs(points - low), 2 * np.maximum(span, 0.5))
    along = jnp.where(along > span, 2 * span - along, along)
    return jnp.clip(along + low, 0, n - 1)
