"""Warps of an image that is too large for one device: its rows lie on several, and each device
borrows from its neighbours the rows that a displacement can reach.

Everything else that is sharded (batch axes, points, channels) needs no function of its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated as Float  # what jaxtyping's are to type checkers
from typing import Annotated as Shaped
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxwarp import _checks, _ops
from jaxwarp.reference import Fill

__all__ = ["backward_warp"]


def __dir__() -> list[str]:
    return __all__


REACH = 2  # rows beyond a position that a method touches at most (cubic)


def backward_warp(
    image: Shaped[ArrayLike, "... H W C"],
    flow: Float[ArrayLike, "... h w dims"],
    *,
    axis_name: str,
    max_displacement: float,
    method: _checks.Method = "linear",
    boundary: _checks.Boundary | Sequence[_checks.Boundary] = "constant",
    fill_value: Fill = 0.0,
    forward_mode: bool = False,
    deterministic: bool | None = None,
) -> Shaped[Array, "... h w C"]:
    """`jaxwarp.backward_warp` inside `jax.shard_map`, for an image whose rows are sharded.

    Every device sends ``ceil(max_displacement) + 2`` rows to each of its two neighbours, and gets
    their cotangents back in the gradient. Nothing else is moved.

    Args:
      image: this device's ``(*batch, H / n, W, C)`` or ``(*batch, D / n, H, W, C)`` of n; dtypes as
        in `jaxwarp.backward_warp`.
      flow: the same rows of the flow, ``(*batch, H / n, w, 2)`` or ``(*batch, D / n, h, w, 3)``,
        displacements ``(x, y[, z])`` in pixels.
      axis_name: the mesh axis over which the rows (slices, in 3-D) are sharded.
      max_displacement: the longest displacement along the sharded axis, in pixels. A longer one, or
        a NaN, gives NaN (`fill_value` of integers) and no gradient, never another pixel. The other
        axes have no such limit.
      method, boundary, fill_value, forward_mode, deterministic: as in `jaxwarp.backward_warp`.

    Returns:
      This device's rows of the result, in the shape of the flow and the dtype of the image.

    Raises:
      TypeError: an array of another dtype, or a `max_displacement` that is not a number.
      ValueError: shapes that do not fit; a `max_displacement` that reaches beyond the neighbours.

    Example:
      >>> import jax, jax.numpy as jnp, jaxwarp
      >>> from functools import partial
      >>> from jax.sharding import PartitionSpec as P
      >>> mesh = jax.make_mesh((1,), ("rows",), (jax.sharding.AxisType.Auto,))  # or more devices
      >>> warp = partial(jaxwarp.halo.backward_warp, axis_name="rows", max_displacement=2.0)
      >>> warp = jax.shard_map(warp, mesh=mesh, in_specs=P("rows"), out_specs=P("rows"))
      >>> image, flow = jnp.arange(8.0).reshape(8, 1, 1), jnp.full((8, 1, 2), jnp.array([0, 1.5]))
      >>> jax.jit(warp)(image, flow)[:, 0, 0]
      Array([1.5, 2.5, 3.5, 4.5, 5.5, 6.5, 3.5, 0. ], dtype=float32)

    Source: equation (1) of Zhiwei Xu, "Notes: CUDA Implementation of Differentiable Image Warping"
    (2021), as in `jaxwarp.backward_warp`.
    """
    image, flow = _checks.image("image", image, method), _checks.real("flow", flow)
    dims = _checks.dims("flow", flow.shape[-1] if flow.ndim else 0)
    layout = _checks.AXES[dims][1][1:-1]
    _checks.rank("flow", flow, dims + 1, f"(*batch, {layout}, {dims})")
    _checks.rank("image", image, dims + 1, f"(*batch, {layout}, C)", "[..., None]")
    fill = jnp.asarray(_checks.fill(fill_value, image.dtype, image.shape[-1]), image.dtype)
    *_, beyond = _checks.boundaries(boundary, dims)  # that of the rows
    axis = -dims - 1  # of the rows
    rows, limit = image.shape[axis], _checks.number("max_displacement", max_displacement)
    if flow.shape[axis] != rows:
        raise ValueError(
            f"flow: expected the image's {rows} rows on this device, got {flow.shape[axis]}; shard "
            "both alike"
        )
    halo = math.ceil(limit) + REACH if 0 <= limit < rows else rows
    if halo >= rows:  # less than all rows, so that "mirror" finds its own
        raise ValueError(
            f"max_displacement: expected a number from 0 to {rows - REACH - 1} for {rows} rows on "
            f"this device, got {max_displacement!r}; use fewer devices along {axis_name!r}"
        )

    def part(start: int, stop: int) -> Array:
        return jax.lax.slice_in_dim(image, start, stop, axis=image.ndim + axis)

    devices, here = jax.lax.axis_size(axis_name), jax.lax.axis_index(axis_name)
    down = [(i, (i + 1) % devices) for i in range(devices)]
    up = [(i, (i - 1) % devices) for i in range(devices)]
    above = jax.lax.ppermute(part(rows - halo, rows), axis_name, down)
    below = jax.lax.ppermute(part(0, halo), axis_name, up)
    if beyond != "wrap":  # at both ends of the image, what the boundary says lies there
        if beyond == "constant":
            first = last = jnp.broadcast_to(fill, above.shape)
        elif beyond == "nearest":
            first = jnp.broadcast_to(part(0, 1), above.shape)
            last = jnp.broadcast_to(part(rows - 1, rows), below.shape)
        else:
            skip = 1 if beyond == "mirror" else 0
            first = jnp.flip(part(skip, halo + skip), axis)
            last = jnp.flip(part(rows - halo - skip, rows - skip), axis)
        above = jnp.where(here == 0, first, above)
        below = jnp.where(here == devices - 1, last, below)
    reached = jnp.concatenate([above, image, below], axis=axis)

    # Positions are formed at least in float32: a half-precision flow plus the halo would round.
    along = flow[..., -1].astype(jnp.promote_types(flow.dtype, jnp.float32))
    inside = jnp.abs(along) <= limit
    moved = jnp.where(inside, along, 0)
    if method == "nearest":  # ties go to the even row of the whole image, not of this part
        row = jax.lax.broadcasted_iota(along.dtype, along.shape, along.ndim - dims) + here * rows
        moved = jnp.round(row + moved) - row
    others = flow[..., :-1].astype(along.dtype)
    out = _ops.backward_warp(
        reached,
        jnp.concatenate([others, moved[..., None] + halo], axis=-1),
        method=method,
        boundary=boundary,
        fill_value=fill_value,
        forward_mode=forward_mode,
        deterministic=deterministic,
    )
    nowhere: Any = fill if image.dtype.name in _checks.INTEGERS else jnp.nan
    if jnp.iscomplexobj(image):
        nowhere = complex(jnp.nan, jnp.nan)
    return jnp.where(inside[..., None], out, nowhere)
