"""What people do with flows besides warping images: invert, compose, check and draw them.

A flow holds a displacement for every pixel, ``(*batch, H, W, 2)`` or ``(*batch, D, H, W, 3)``,
``(x, y[, z])`` in pixels; x runs along W, y along H, z along D. The flow from frame A to frame B
lies on the pixels of A: the pixel r of A is found at r + flow[r] in B.

Files of flows are read and written by OpenCV (``pip install opencv-python-headless``). Middlebury's
``.flo`` marks unknown displacements with values above 1e9; here they become NaN, which `invert`
leaves out and `to_rgb` draws in black::

    import cv2, numpy as np
    flow = cv2.readOpticalFlow("flow.flo")  # (H, W, 2), float32
    flow[(abs(flow) > 1e9).any(-1)] = np.nan
    cv2.writeOpticalFlow("flow.flo", np.asarray(flow, np.float32))

KITTI's PNG holds 16-bit integers, which OpenCV gives as (valid, y, x)::

    png = cv2.imread("flow.png", cv2.IMREAD_ANYDEPTH | cv2.IMREAD_COLOR)  # (H, W, 3), uint16
    flow = (png[..., :0:-1].astype(np.float32) - 2**15) / 64
    flow[png[..., 0] == 0] = np.nan

    valid = np.isfinite(flow).all(-1, keepdims=True)
    code = np.where(valid, np.clip(np.round(flow * 64 + 2**15), 0, 2**16 - 1), 0)
    cv2.imwrite("flow.png", np.dstack([valid, code[..., ::-1]]).astype(np.uint16))
"""

from __future__ import annotations

import math
from typing import Annotated as Float  # what jaxtyping's is to type checkers
from typing import Annotated as UInt8

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxwarp import _checks
from jaxwarp._ops import backward_warp, forward_warp

__all__ = ["compose", "consistency", "invert", "to_rgb"]


def __dir__() -> list[str]:
    return __all__


def invert(
    flow: Float[ArrayLike, "... H W dims"], *, forward_mode: bool = False
) -> Float[Array, "... H W dims"]:
    """Inverts a flow from A to B: the flow from B back to A, ``forward_warp(-flow, flow)``.

    Each displacement is reversed, moved to where it leads, and averaged with those that meet there.

    Args:
      flow: ``(*batch, H, W, 2)`` or ``(*batch, D, H, W, 3)``, displacements ``(x, y[, z])`` in
        pixels; float16, bfloat16, float32 or float64.
      forward_mode: allow `jax.jvp`, `jax.jacfwd` and `jax.linearize` too.

    Returns:
      Shape and dtype of `flow`; half precision is averaged in float32 and rounded once.

      Exact for a translation. The displacements that meet at a pixel land less than one pixel from
      it along each axis, so that the error is at most the change of the inverse over that distance;
      beside a hole it comes near, and inside a smooth flow it is far less, because both sides
      cancel. There a step ``inverse = -backward_warp(flow, inverse, boundary="nearest")`` is
      closer still.

      A pixel that no displacement reaches is a hole, a part of B that is not seen in A. It holds 0
      and passes no gradient. Holes are where ``coverage`` is 0 in
      ``inverse, coverage = forward_warp(-flow, flow, return_coverage=True)``, which is the same
      call and also takes ``fill_value``, ``min_coverage`` and ``importance``: where a foreground
      and a background meet, their average is neither, and `importance` can choose. A displacement
      with a NaN or an infinity is left out.

    Raises:
      TypeError: a flow of another dtype.
      ValueError: a shape that is not as above.

    Example:
      >>> import jax.numpy as jnp, jaxwarp
      >>> flow = jnp.full((1, 4, 2), jnp.array([1.0, 0.0]))
      >>> jaxwarp.flow.invert(flow)[0, :, 0]  # nothing reaches the first pixel
      Array([ 0., -1., -1., -1.], dtype=float32)

    Source: equation (5) of Zhiwei Xu, "Notes: CUDA Implementation of Differentiable Image Warping"
    (2021), with f = -d.
    """
    flow = _flow("flow", flow)
    return forward_warp(-flow, flow, forward_mode=forward_mode)


def compose(
    first: Float[ArrayLike, "... H W dims"],
    second: Float[ArrayLike, "... h w dims"],
    *,
    forward_mode: bool = False,
) -> Float[Array, "... H W dims"]:
    """Composes flows from A to B and from B to C into that from A to C.

    ``first + backward_warp(second, first, boundary="nearest")``: outside B the second flow is that
    of B's edge. Warping with the result is warping with one after the other, but for the
    interpolation: ``backward_warp(C, compose(first, second))`` is close to
    ``backward_warp(backward_warp(C, second), first)``.

    Args:
      first: ``(*batch, H, W, 2)`` or ``(*batch, D, H, W, 3)``, displacements ``(x, y[, z])`` in
        pixels; float16, bfloat16, float32 or float64.
      second: ``(*batch, h, w, 2)`` or ``(*batch, d, h, w, 3)``, likewise. B may have another size
        than A.
      forward_mode: allow `jax.jvp`, `jax.jacfwd` and `jax.linearize` too.

    Returns:
      ``(*batch, H, W, 2)`` or ``(*batch, D, H, W, 3)``, in the dtype that the two promote to; half
      precision is composed in float32 and rounded once. The batch axes broadcast against each other
      and mean the same as `jax.vmap`. Exact where `second` varies linearly from pixel to pixel, as
      an affine flow does. A displacement with a NaN or an infinity in `first` gives NaN.

    Raises:
      TypeError: a flow of another dtype.
      ValueError: shapes that are not as above or do not fit each other; an empty `second` where
        `first` is not empty.

    Example:
      >>> import jax.numpy as jnp, jaxwarp
      >>> first = jnp.full((1, 3, 2), jnp.array([1.0, 0.0]))
      >>> second = jnp.zeros((1, 3, 2)).at[0, :, 0].set(jnp.array([10.0, 20.0, 30.0]))
      >>> jaxwarp.flow.compose(first, second)[0, :, 0]
      Array([21., 31., 31.], dtype=float32)

    Source: the gather is equation (1) of Zhiwei Xu, "Notes: CUDA Implementation of Differentiable
    Image Warping" (2021).
    """
    first, second = _flow("first", first), _flow("second", second)
    total = _compose("first", first, "second", second, forward_mode)
    return total.astype(jnp.promote_types(first.dtype, second.dtype))


def consistency(
    forward: Float[ArrayLike, "... H W dims"],
    backward: Float[ArrayLike, "... h w dims"],
    *,
    forward_mode: bool = False,
) -> Float[Array, "... H W"]:
    """How far from its start each pixel ends after the round trip from A to B and back, in pixels.

    The Euclidean norm of ``compose(forward, backward)``. It is small where the two flows agree, and
    large where one is wrong, where a pixel is hidden in the other frame, and, meaningless, where
    `forward` leads outside B.

    Args:
      forward: ``(*batch, H, W, 2)`` or ``(*batch, D, H, W, 3)``, displacements ``(x, y[, z])`` in
        pixels; float16, bfloat16, float32 or float64.
      backward: the flow from B to A, likewise. B may have another size than A.
      forward_mode: allow `jax.jvp`, `jax.jacfwd` and `jax.linearize` too.

    Returns:
      ``(*batch, H, W)`` or ``(*batch, D, H, W)``, in the dtype that the two promote to, computed at
      least in float32: the two flows nearly cancel, and half precision would round what is left.
      The batch axes broadcast. Where the residual is exactly 0, so are its derivatives, although
      the norm has a kink there. A displacement with a NaN or an infinity in `forward` gives NaN.

    Raises:
      TypeError: a flow of another dtype.
      ValueError: shapes that are not as above or do not fit each other; an empty `backward` where
        `forward` is not empty.

    Example:
      >>> import jax.numpy as jnp, jaxwarp
      >>> forward = jnp.full((1, 3, 2), jnp.array([3.0, 4.0]))
      >>> jaxwarp.flow.consistency(forward, -forward)
      Array([[0., 0., 0.]], dtype=float32)
      >>> jaxwarp.flow.consistency(forward, 0 * forward)
      Array([[5., 5., 5.]], dtype=float32)

    Source: the forward-backward check of Sundaram, Brox, Keutzer, "Dense point trajectories by
    GPU-accelerated large displacement optical flow" (2010), without its threshold.
    """
    forward, backward = _flow("forward", forward), _flow("backward", backward)
    residual = _compose("forward", forward, "backward", backward, forward_mode)
    square = jnp.sum(residual * residual, axis=-1)
    # sqrt has no derivative at 0: there it is given 1 instead, and its result is left out.
    norm = jnp.where(square == 0, 0, jnp.sqrt(jnp.where(square == 0, 1, square)))
    return norm.astype(jnp.promote_types(forward.dtype, backward.dtype))


def to_rgb(
    flow: Float[ArrayLike, "*batch H W 2"], *, max_length: float | None = None
) -> UInt8[Array, "*batch H W 3"]:
    """Draws a flow: the hue is the direction, the saturation is the length.

    The hue turns evenly with the direction, clockwise on the screen (y points down), on the wheel
    of HSV with value 1:

    ======================  ==========  ===============
    direction               (x, y)      colour
    ======================  ==========  ===============
    right                   (1, 0)      red
    60 degrees down         (1, 1.73)   yellow
    down                    (0, 1)      between yellow and green
    left                    (-1, 0)     cyan
    up                      (0, -1)     between blue and magenta
    no displacement         (0, 0)      white
    not finite              (NaN, 0)    black
    ======================  ==========  ===============

    Args:
      flow: ``(*batch, H, W, 2)``, displacements ``(x, y)`` in pixels; float16, bfloat16, float32 or
        float64.
      max_length: length in pixels at which the colour is full; longer displacements get the full
        colour too. ``None``: the longest finite one of each image of the batch, so that images are
        not comparable. It is a Python float, also under `jax.jit`.

    Returns:
      uint8 ``(*batch, H, W, 3)``, red, green, blue. A displacement without a finite length is
      black. A flow that is 0 everywhere is white.

    Raises:
      TypeError: a flow of another dtype; a `max_length` that is not a number.
      ValueError: a shape that is not as above, such as that of a 3-D flow; a `max_length` that is
        not finite and > 0.

    Example:
      >>> import jax.numpy as jnp, jaxwarp
      >>> flow = jnp.array([[[2.0, 0.0], [1.0, 0.0], [0.0, 0.0], [-2.0, 0.0]]])
      >>> jaxwarp.flow.to_rgb(flow)[0].tolist()
      [[255, 0, 0], [255, 128, 128], [255, 255, 255], [0, 255, 255]]

    Source: the custom of Baker et al., "A database and evaluation methodology for optical flow"
    (2011): white at rest, red to the right, and on through yellow as the direction turns down.
    Their wheel gives more room to some hues, and they darken what is longer than the maximum.
    """
    flow = _flow("flow", flow, dims=(2,))
    if max_length is not None:
        max_length = _checks.number("max_length", max_length)
        if not 0 < max_length < math.inf:
            raise ValueError(
                f"max_length: expected a finite number > 0, got {max_length!r}; "
                "None takes the longest displacement of each image"
            )
    flow = flow.astype(jnp.promote_types(flow.dtype, jnp.float32))
    x, y = flow[..., 0], flow[..., 1]
    length = jnp.hypot(x, y)
    known = jnp.isfinite(length)
    if max_length is None:
        full = jnp.max(length, axis=(-2, -1), keepdims=True, initial=0, where=known)
    else:
        full = jnp.asarray(max_length, length.dtype)
    # A length of 0 is white even where the maximum is 0 too.
    saturation = jnp.where(length == 0, 0, jnp.minimum(length / full, 1))[..., None]
    # HSV to RGB with value 1. A full turn of the hue is 6 steps, with red, green and blue at 0, 2
    # and 4. Each is whole up to 1 step away, and lacks the saturation from 2 steps away.
    hue = jnp.atan2(y, x)[..., None] * (3 / math.pi)
    steps = jnp.abs(jnp.mod(hue - jnp.array([0, 2, 4], hue.dtype) + 3, 6) - 3)
    rgb = 1 - saturation * jnp.clip(steps - 1, 0, 1)
    return jnp.round(255 * jnp.where(known[..., None], rgb, 0)).astype(jnp.uint8)


def _flow(name: str, x: ArrayLike, dims: tuple[int, ...] = (2, 3)) -> Array:
    flow = _checks.real(name, x)
    size = flow.shape[-1] if flow.ndim else 0
    if size not in dims or flow.ndim <= size:
        layouts = {2: "(*batch, H, W, 2)", 3: "(*batch, D, H, W, 3)"}
        remedy = f"every pixel needs (x, y[, z]), last: jnp.moveaxis({name}, 0, -1) moves it there"
        if dims == (2,) and flow.ndim > size == 3:
            remedy = f"of a 3-D flow draw two components: {name}[..., :2]"
        raise ValueError(
            f"{name}: expected shape {' or '.join(layouts[d] for d in dims)}, "
            f"got {flow.shape}; {remedy}"
        )
    return flow


def _compose(
    first_name: str, first: Array, second_name: str, second: Array, forward_mode: bool
) -> Array:
    """first + second(q + first[q]), not yet rounded to half precision."""
    dims = first.shape[-1]
    if second.shape[-1] != dims:
        raise ValueError(
            f"{second_name}: expected a last axis of {dims}, as {first_name} has, got "
            f"{second.shape[-1]}; both flows must be 2-D or both 3-D"
        )
    core = dims + 1
    batch = _checks.broadcast({first_name: first.shape[:-core], second_name: second.shape[:-core]})
    dtype = jnp.promote_types(jnp.promote_types(first.dtype, second.dtype), jnp.float32)
    first, second = first.astype(dtype), second.astype(dtype)
    if 0 in first.shape[-core:]:
        return jnp.broadcast_to(first, (*batch, *first.shape[-core:]))
    if 0 in second.shape[-core:]:
        raise ValueError(
            f"{second_name}: expected no empty axis for {first_name} of shape {first.shape}, got "
            f"{second.shape}; an empty flow has no displacement to add"
        )
    return first + backward_warp(second, first, boundary="nearest", forward_mode=forward_mode)
