"""The shapes in the annotations are true. jaxtyping, which the package itself does not need, reads
them and checks calls of every public function."""

import pydoc
import re
import types
import typing
from functools import partial

import cases
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

import jaxwarp
from jaxwarp import flow, halo, reference

DTYPES = {n: getattr(jaxtyping, n) for n in ("Float", "Inexact", "Shaped", "UInt8")}
FUNCTIONS = [getattr(jaxwarp, name) for name in reference.__all__]
FUNCTIONS += [getattr(module, name) for module in (flow, halo) for name in module.__all__]
# An image and another: of the same rows, or slices in 3-D, as the halo needs them.
SHAPES = {2: ((5, 6), (5, 7)), 3: ((3, 5, 6), (3, 4, 7))}


def calls(dims, batched):
    """[(function, shapes of its arrays, its other arguments)]; batch axes that broadcast."""
    shape, other = SHAPES[dims]
    a, b, ab = ((2, 1), (3,), (2, 3)) if batched else ((), (), ())
    S = (*ab, 8) if batched else ()
    points, image = {"points": (*S, dims)}, {"image": (*a, *shape, 9)}
    values, field = {"values": (*S, 9)}, {"flow": (*b, *other, dims)}
    moved = {"values": (*a, *shape, 9), "flow": (*b, *shape, dims)}
    weights = {"importance": (2, *[1] * batched, *shape)} if batched else {"importance": shape}
    sampled = {"input": (*a, 9, *shape), "grid": field["flow"]}
    sizes, normalised = {"shape": shape}, {"shape": shape, "align_corners": True}
    to_second, to_first = (*a, *shape, dims), (*b, *other, dims)
    rows = {"axis_name": "rows", "max_displacement": 0.0}
    return [
        (jaxwarp.gather, {"image": (*shape, 9)} | points, {}),
        (jaxwarp.splat, values | points, sizes),
        (jaxwarp.reconstruct, values | points, sizes),
        (jaxwarp.backward_warp, image | field, {}),
        (jaxwarp.forward_warp, moved, {}),
        (jaxwarp.forward_warp, moved | weights, {"return_coverage": True}),
        (jaxwarp.grid_sample, sampled, {}),
        (jaxwarp.pixel_grid, {}, sizes),
        (jaxwarp.to_pixels, {"grid": (*S, dims)}, normalised),
        (jaxwarp.to_normalized, points, normalised),
        (halo.backward_warp, image | field, rows),
        (flow.invert, {"flow": to_second}, {}),
        (flow.compose, {"first": to_second, "second": to_first}, {}),
        (flow.consistency, {"forward": to_second, "backward": to_first}, {}),
        (flow.to_rgb, {"flow": (*a, *shape[-2:], 2)}, {}),
    ]


def annotated(function):
    """Argument or "return" -> annotation, as it stands in the source; those of arrays."""
    return {name: text for name, text in function.__annotations__.items() if "Array" in text}


def matches(value, hint):
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return any(matches(value, member) for member in typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        parts = typing.get_args(hint)
        return isinstance(value, tuple) and all(map(matches, value, parts))
    return isinstance(value, hint)


def checked(function, hints, more, arrays):
    with jaxtyping.jaxtyped("context"):  # a name means one size throughout the call
        for name, array in arrays.items():
            assert matches(array, hints[name]), (function, name, array.shape)
        out = function(**arrays, **more)
        assert matches(out, hints["return"]), (function, out)
        if arrays:  # they name the last axis
            first = out[0] if isinstance(out, tuple) else out
            assert not matches(first[..., :-1], hints["return"]), function


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("batched", [False, True], ids=["one", "batch"])
@pytest.mark.parametrize("dims", [2, 3])
def test_calls_are_as_annotated(dims, batched, dtype):
    table = calls(dims, batched)
    assert {function for function, _, _ in table} == set(FUNCTIONS)
    for function, shapes, more in table:
        hints = typing.get_type_hints(function, localns=DTYPES)
        wide = jnp.promote_types(dtype, jnp.float32)
        arrays = {n: np.zeros(s, wide if n == "points" else dtype) for n, s in shapes.items()}
        for name, array in arrays.items():
            assert matches(array, hints[name]), (function, name)  # of NumPy too
            takes_integers = matches(array.astype(int), hints[name])
            assert takes_integers == (name in ("image", "input")), (function, name)
            takes_complex = matches(array.astype(complex), hints[name])
            assert takes_complex == (name in ("image", "input", "values")), (function, name)
            assert not matches(0.0, hints[name]), (function, name)
        call = partial(checked, function, hints, more)
        if function is halo.backward_warp:  # on one device
            call = jax.vmap(call, axis_name="rows", axis_size=1, in_axes=None)
        jax.eval_shape(call, arrays)


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f"{f.__module__}.{f.__name__}")
def test_every_array_has_a_shape(function):
    assert "return" in annotated(function)
    for text in annotated(function).values():
        assert text.count("Array") == len(re.findall(r"\w\[Array(?:Like)?, '", text)), text
    for overload in typing.get_overloads(function):  # what a type checker sees
        returned = annotated(overload)["return"]
        assert returned in annotated(function)["return"]
        assert annotated(overload) == annotated(function) | {"return": returned}


@pytest.mark.parametrize("name", reference.__all__)
def test_reference_is_annotated_likewise(name):
    assert annotated(getattr(reference, name)) == annotated(getattr(jaxwarp, name))


def test_help_shows_shapes():
    text = pydoc.render_doc(jaxwarp.gather, renderer=pydoc.plaintext)
    assert "Shaped[ArrayLike, '*shape C']" in text
    assert "Float[ArrayLike, '*S dims']" in text
