"""Checks of what people pass. Every message states what was expected, what was received, and the
remedy."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from jaxwarp import _ffi
from jaxwarp._primitives import Sampling

METHODS = ("nearest", "linear", "cubic")
BOUNDARIES = ("constant", "nearest", "mirror", "reflect", "wrap")
REDUCTIONS = ("sum", "average", "softmax")
FLOATS = ("float16", "bfloat16", "float32", "float64")
COMPLEX = ("complex64", "complex128")
INTEGERS = ("bool", *(f"{kind}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64)))
POINT_DTYPES = ("float32", "float64")
NUMBERS = (bool, int, float, complex, np.generic)
AXES = {2: ("(x, y)", "(H, W)"), 3: ("(x, y, z)", "(D, H, W)")}

Method = Literal["nearest", "linear", "cubic"]
Boundary = Literal["constant", "nearest", "mirror", "reflect", "wrap"]
Reduce = Literal["sum", "average", "softmax"]


def array(name: str, given: ArrayLike, dtypes: Sequence[str], remedy: str = "") -> Array:
    x = jnp.asarray(given)
    if x.dtype.name not in dtypes:
        raise TypeError(
            f"{name}: expected one of {', '.join(dtypes)}, got {x.dtype}; "
            f"{remedy}{_conversion(name, x.dtype)}"
        )
    return x


def _conversion(name: str, dtype: np.dtype) -> str:
    """The advice that fits a dtype which is not taken: nothing is lost by it."""
    if jnp.issubdtype(dtype, jnp.complexfloating):
        return f"positions and weights are real: pass {name}.real and {name}.imag as you mean them"
    bits = 8 * dtype.itemsize
    if bits <= 16:  # integers, bools, and floating-point numbers that hold no position
        return f"convert it to float32, which holds every {dtype}: {name}.astype(jnp.float32)"
    if bits == 32:
        return (
            f"convert it to float64, which holds every {dtype}: {name}.astype(jnp.float64) with "
            "jax_enable_x64"
        )
    return f"convert it where you know that no value is rounded: no float holds every {dtype}"


def image(name: str, given: ArrayLike, method: Any, nearest: str = "method='nearest'") -> Array:
    """Of a gather. `nearest`: how people ask for the method that takes integers."""
    choice("method", method, METHODS)
    x = jnp.asarray(given)
    if method == "nearest":
        return array(name, x, FLOATS + COMPLEX + INTEGERS)
    whole = x.dtype.name in INTEGERS
    remedy = f"pass {nearest}, which keeps every bit, or " if whole else ""
    return array(name, x, FLOATS + COMPLEX, remedy)


def values(name: str, given: ArrayLike) -> Array:
    """Of a splat."""
    return array(name, given, FLOATS + COMPLEX)


def real(name: str, given: ArrayLike) -> Array:
    """Flows, weights, coordinates."""
    return array(name, given, FLOATS)


def points(given: ArrayLike) -> Array:
    return array("points", given, POINT_DTYPES, "positions need at least float32: ")


def choice(
    name: str, value: Any, options: Sequence[str], remedy: str = "pass one of these"
) -> None:
    if not isinstance(value, str) or value not in options:
        known = ", ".join(map(repr, options))
        raise ValueError(f"{name}: expected one of {known}, got {value!r}; {remedy}")


def boundaries(given: Any, dims: int) -> tuple[str, ...]:
    """That of each axis, along x, y[, z]."""
    if not isinstance(given, Sequence) or isinstance(given, str):
        choice("boundary", given, BOUNDARIES)
        return (given,) * dims
    if len(given) != dims:
        raise ValueError(
            f"boundary: expected one for all axes or {dims} along {AXES[dims][0]}, got {given!r}; "
            f"pass for example {('wrap', *['nearest'] * (dims - 1))}"
        )
    for along in given:
        choice("boundary", along, BOUNDARIES)
    return tuple(given)


def number(name: str, value: Any) -> float:
    # One object for every NaN, so that equal options hash alike and compiled code is found again.
    if isinstance(value, np.generic) and value.dtype.name in (*FLOATS, *INTEGERS):
        value = value.item()
    if isinstance(value, int | float | np.floating):
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


def fill(given: Any, dtype: np.dtype, channels: int) -> float | Array:
    """A number of the compiled program, or an array () or (C,); of integers, in their dtype."""
    listed = isinstance(given, Array | np.ndarray | list | tuple)
    if not listed and not isinstance(given, NUMBERS):
        raise TypeError(
            f"fill_value: expected a number or an array, got {type(given).__name__}; pass one "
            "number, or one for each channel"
        )
    if dtype.name in INTEGERS:
        x = _whole_fill(given, dtype)
    elif not listed and not isinstance(given, complex | np.complexfloating):
        return number("fill_value", given)
    else:
        try:
            x = jnp.asarray(given)
        except (OverflowError, TypeError, ValueError) as error:
            raise TypeError(
                f"fill_value: expected a number for each channel, got {given!r}; pass an array of "
                "numbers that a float holds"
            ) from error
        if jnp.iscomplexobj(x) and not jnp.issubdtype(dtype, jnp.complexfloating):
            raise TypeError(
                f"fill_value: expected real numbers for an array of {dtype}, got {x.dtype}; make "
                "the array complex too"
            )
        array("fill_value", x, FLOATS + INTEGERS + COMPLEX)
    if x.shape not in ((), (channels,)):
        raise ValueError(
            f"fill_value: expected shape () or ({channels},), a number for each channel, got "
            f"{x.shape}; use jax.vmap for one for each element of a batch"
        )
    return x


def _whole_fill(given: Any, dtype: np.dtype) -> Array:
    """Never by way of a float, which holds no large integers."""
    parts = given if isinstance(given, list | tuple) else [given]
    if any(isinstance(part, jax.core.Tracer) for part in parts):
        traced = jnp.asarray(given)
        if not np.can_cast(traced.dtype, dtype):
            raise TypeError(
                f"fill_value: expected {dtype}, as the image, while it is traced, got "
                f"{traced.dtype}; give it that dtype before, where its value can be checked"
            )
        return traced.astype(dtype)
    numbers = given if isinstance(given, list | tuple) else np.asarray(given)
    each = np.asarray(numbers, dtype=object)
    if not all(_is_held(x, dtype) for x in each.flat):
        raise ValueError(
            f"fill_value: expected what {dtype} holds exactly, got {given!r}; pass integers within "
            "its range"
        )
    return jnp.asarray(np.array([int(x) for x in each.flat], dtype).reshape(each.shape))


def _is_held(x: Any, dtype: np.dtype) -> bool:
    if not isinstance(x, bool | int | float | np.integer | np.floating | np.bool_):
        return False
    if not math.isfinite(x) or int(x) != x:
        return False
    low, high = (0, 1) if dtype.kind == "b" else (np.iinfo(dtype).min, np.iinfo(dtype).max)
    return int(low) <= int(x) <= int(high)


def flag(name: str, value: Any) -> bool:
    if isinstance(value, bool | np.bool_):
        return bool(value)
    raise TypeError(f"{name}: expected True or False, got {value!r}; pass a Python bool")


def determinism(value: Any) -> bool:
    if value is None:
        return _ffi.flag("JAXWARP_DETERMINISTIC", False)
    return flag("deterministic", value)


def integers(given: Any) -> tuple[int, ...] | None:
    """None: not a sequence of them."""
    listed = isinstance(given, Sequence) or (isinstance(given, np.ndarray) and given.ndim > 0)
    numbers = tuple(given) if listed else (given,)
    whole = (isinstance(n, int | np.integer) and not isinstance(n, bool) for n in numbers)
    return tuple(map(int, numbers)) if all(whole) else None


def orders(derivative: Sequence[int] | None, dims: int) -> tuple[int, ...]:
    if derivative is None:
        return (0,) * dims
    orders = integers(derivative)
    if orders is None or len(orders) != dims or min(orders) < 0:
        raise ValueError(
            f"derivative: expected {dims} orders >= 0 along {AXES[dims][0]}, got {derivative!r}; "
            f"pass for example {(1,) + (0,) * (dims - 1)}"
        )
    return tuple(min(k, 4) for k in orders)  # from order 4 on every weight is 0


def dims(name: str, size: int) -> int:
    if size not in AXES:
        raise ValueError(
            f"{name}: expected a last axis of 2 (x, y) or 3 (x, y, z), got {size}; put the "
            "coordinates of a position last, and pass a 1-D signal as one row, with y = 0"
        )
    return size


def rank(name: str, array: Array, least: int, layout: str, channels: str = "") -> None:
    """`channels`: how one adds those, for arrays that have some."""
    if array.ndim < least:
        example = f", for example the channels with {channels}" if channels else ""
        raise ValueError(
            f"{name}: expected at least {least} axes, {layout}, got shape {array.shape}; "
            f"add the missing axes{example}"
        )


def spatial(name: str, shape: tuple[int, ...], boundary: tuple[str, ...]) -> None:
    for size, along in zip(shape, reversed(boundary), strict=True):
        if size == 0 and along != "constant":
            raise ValueError(
                f"{name}: expected no empty axis with boundary {along!r}, got spatial shape "
                f"{shape}; only boundary 'constant' has a value for an empty axis"
            )


def broadcast(shapes: dict[str, tuple[int, ...]]) -> tuple[int, ...]:
    try:
        return jnp.broadcast_shapes(*shapes.values())
    except ValueError:
        got = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise ValueError(
            f"{', '.join(shapes)}: expected batch axes that broadcast, got {got}; "
            "each must be equal, 1 or absent"
        ) from None


def sampling(
    method: str,
    boundary: Any,
    derivative: tuple[int, ...],
    displacement: bool,
    deterministic: bool | None,
) -> Sampling:
    """With 0 as fill."""
    choice("method", method, METHODS)
    along = boundaries(boundary, len(derivative))
    return Sampling(method, along, 0.0, derivative, displacement, determinism(deterministic))


def shape(shape: Sequence[int]) -> tuple[int, ...]:
    sizes = integers(shape)
    if sizes is None or len(sizes) not in AXES or min(sizes) < 0:
        raise ValueError(
            f"shape: expected spatial sizes (H, W) or (D, H, W), got {shape!r}; "
            "leave out batch axes and channels"
        )
    return sizes


def sources(
    given: ArrayLike, at: ArrayLike, extent: Sequence[int]
) -> tuple[Array, Array, tuple[int, ...]]:
    """Values (N, C) and points (N, dims) of an image of spatial shape `extent`, of any leading
    axes."""
    f, p, sizes = values("values", given), points(at), shape(extent)
    dims = len(sizes)
    if p.ndim == 0 or p.shape[-1] != dims:
        got = p.shape[-1] if p.ndim else "a scalar"
        raise ValueError(
            f"points: expected a last axis of {dims} for shape {sizes}, got {got}; "
            f"pass {AXES[dims][0]}"
        )
    if f.ndim == 0 or f.shape[:-1] != p.shape[:-1]:
        raise ValueError(
            f"values: expected shape {p.shape[:-1]} + (C,) for points of shape "
            f"{p.shape}, got {f.shape}; pass one value of C channels per point"
        )
    count = math.prod(p.shape[:-1])
    return f.reshape(count, f.shape[-1]), p.reshape(count, dims), sizes
