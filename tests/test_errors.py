"""Wrong input raises while tracing; the text states what was expected, received, and the remedy."""

import re

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxwarp

F = np.float32
IMAGE, VOLUME = np.ones((5, 6, 3), F), np.ones((3, 4, 5, 2), F)
POINTS, VALUES = np.zeros((7, 2), F), np.ones((7, 3), F)
FLOW = np.zeros((5, 6, 2), F)
EMPTY = np.ones((0, 6, 3), F)
PIXELS = np.ones((5, 6, 3), np.uint8)


def case(error, argument, expected, received, call, *arrays, **options):
    """One wrong call. `expected` and `received` must appear in the message, at their places."""
    label = f"{call.__name__}-{argument}-{received}"
    return pytest.param(error, argument, expected, received, call, arrays, options, id=label)


def of_every_warp(error, argument, expected, received, **options):
    """A wrong option that all four operations share."""
    yield case(error, argument, expected, received, jaxwarp.gather, IMAGE, POINTS, **options)
    yield case(error, argument, expected, received, splat, VALUES, POINTS, **options)
    yield case(error, argument, expected, received, jaxwarp.backward_warp, IMAGE, FLOW, **options)
    yield case(error, argument, expected, received, jaxwarp.forward_warp, IMAGE, FLOW, **options)


def splat(values, points, shape=(5, 6), **options):
    return jaxwarp.splat(values, points, shape, **options)


def reconstruct(values, points, shape=(5, 6), **options):
    return jaxwarp.reconstruct(values, points, shape, **options)


def weighted(importance, **options):
    return jaxwarp.forward_warp(IMAGE, FLOW, importance=importance, **options)


METHODS = "'nearest', 'linear', 'cubic'"
BOUNDARIES = "'constant', 'nearest', 'mirror', 'reflect', 'wrap'"
FLOATS = "float16, bfloat16, float32, float64"
gather, backward, forward = jaxwarp.gather, jaxwarp.backward_warp, jaxwarp.forward_warp
sample = jaxwarp.grid_sample

WRONG = [
    # dtypes
    case(TypeError, "image", FLOATS, "int32", gather, IMAGE.astype("int32"), POINTS),
    case(TypeError, "image", FLOATS, "uint8", backward, IMAGE.astype("uint8"), FLOW),
    case(TypeError, "image", FLOATS, "bool", gather, IMAGE > 0, POINTS),
    case(TypeError, "input", FLOATS, "uint8", sample, IMAGE.astype("uint8"), FLOW),
    case(TypeError, "values", FLOATS, "int32", splat, VALUES.astype("int32"), POINTS),
    case(TypeError, "values", FLOATS, "int32", forward, IMAGE.astype("int32"), FLOW),
    case(TypeError, "points", "float32", "int32", gather, IMAGE, POINTS.astype("int32")),
    case(TypeError, "points", "float32", "float16", gather, IMAGE, POINTS.astype("float16")),
    case(TypeError, "points", "float32", "bfloat16", gather, IMAGE, POINTS.astype(jnp.bfloat16)),
    case(TypeError, "points", "float32", "float16", splat, VALUES, POINTS.astype("float16")),
    case(TypeError, "flow", FLOATS, "int32", backward, IMAGE, FLOW.astype("int32")),
    case(TypeError, "flow", FLOATS, "complex64", forward, IMAGE, FLOW.astype("complex64")),
    case(TypeError, "importance", FLOATS, "int32", weighted, np.ones((5, 6), int).astype("int32")),
    # ranks and shapes
    case(ValueError, "image", "(H, W, C)", "(5, 6)", gather, IMAGE[..., 0], POINTS),
    case(ValueError, "image", "(H, W, C)", "(1, 3, 4, 5, 2)", gather, VOLUME[None], POINTS),
    case(ValueError, "points", "2 for a 2-D image", "3", gather, IMAGE, np.zeros((7, 3), F)),
    case(ValueError, "points", "3 for a 3-D image", "2", gather, VOLUME, POINTS),
    case(ValueError, "points", "2", "a scalar", gather, IMAGE, F(1)),
    case(ValueError, "points", "2", "3", splat, VALUES, np.zeros((7, 3), F)),
    case(ValueError, "points", "3", "2", splat, VALUES, POINTS, (3, 4, 5)),
    case(ValueError, "values", "(7,) + (C,)", "(6, 3)", splat, VALUES[:6], POINTS),
    case(ValueError, "values", "(7,) + (C,)", "(7,)", splat, VALUES[:, 0], POINTS),
    case(ValueError, "shape", "(H, W)", "(5,)", splat, VALUES, POINTS, (5,)),
    case(ValueError, "shape", "(H, W)", "(5, 6, 7, 8)", splat, VALUES, POINTS, (5, 6, 7, 8)),
    case(ValueError, "shape", "(H, W)", "(5, -1)", splat, VALUES, POINTS, (5, -1)),
    case(ValueError, "shape", "(H, W)", "(5, 6.5)", splat, VALUES, POINTS, (5, 6.5)),
    case(ValueError, "shape", "(H, W)", "5", splat, VALUES, POINTS, 5),
    case(ValueError, "shape", "(H, W)", "(5, True)", splat, VALUES, POINTS, (5, True)),
    case(ValueError, "flow", "2 (x, y) or 3", "4", backward, IMAGE, np.zeros((5, 6, 4), F)),
    case(ValueError, "flow", "2 (x, y) or 3", "1", forward, IMAGE, np.zeros((5, 6, 1), F)),
    case(ValueError, "flow", "at least 3 axes", "(6, 2)", backward, IMAGE, FLOW[0]),
    case(ValueError, "image", "at least 3 axes", "(5, 6)", backward, IMAGE[..., 0], FLOW),
    case(
        ValueError,
        "image",
        "at least 4 axes",
        "(5, 6, 3)",
        backward,
        IMAGE,
        np.zeros((2, 5, 6, 3), F),
    ),
    case(ValueError, "input", "(*batch, C, H, W)", "(5, 6)", sample, IMAGE[..., 0], FLOW),
    case(ValueError, "values", "spatial shape (5, 6)", "(4, 6)", forward, IMAGE[:4], FLOW),
    case(ValueError, "values", "at least 3 axes", "(5, 6)", forward, IMAGE[..., 0], FLOW),
    case(ValueError, "importance", "(5, 6)", "(6, 5)", weighted, np.ones((6, 5), F)),
    case(ValueError, "importance", "(5, 6)", "(5, 6, 1)", weighted, np.ones((5, 6, 1), F)),
    case(ValueError, "importance", "(5, 6)", "()", weighted, F(1)),
    case(
        ValueError,
        "image, flow",
        "broadcast",
        "image (2,), flow (3,)",
        backward,
        np.ones((2, 5, 6, 3), F),
        np.zeros((3, 5, 6, 2), F),
    ),
    case(
        ValueError,
        "values, flow",
        "broadcast",
        "values (2, 1), flow (3, 4)",
        forward,
        np.ones((2, 1, 5, 6, 3), F),
        np.zeros((3, 4, 5, 6, 2), F),
    ),
    case(
        ValueError,
        "batch axes",
        "at most 6 groups",
        "8 in shape",
        backward,
        np.ones((2, 1) * 4 + (2, 3, 1), F),
        np.zeros((1, 2) * 4 + (2, 3, 2), F),
    ),
    # an image of nothing
    case(ValueError, "image", "no empty axis", "(0, 6)", gather, EMPTY, POINTS, boundary="wrap"),
    case(ValueError, "image", "no empty axis", "(0, 6)", backward, EMPTY, FLOW, boundary="nearest"),
    case(
        ValueError,
        "shape",
        "no empty axis",
        "(0, 6)",
        splat,
        VALUES,
        POINTS,
        (0, 6),
        boundary="mirror",
    ),
    case(
        ValueError,
        "values",
        "no empty axis",
        "(0, 6)",
        forward,
        EMPTY,
        FLOW[:0],
        boundary="reflect",
    ),
    # reconstruct shares the checks of splat
    case(TypeError, "values", FLOATS, "int32", reconstruct, VALUES.astype("int32"), POINTS),
    case(TypeError, "points", "float32", "float16", reconstruct, VALUES, POINTS.astype("float16")),
    case(ValueError, "points", "3", "2", reconstruct, VALUES, POINTS, (3, 4, 5)),
    case(ValueError, "values", "(7,) + (C,)", "(6, 3)", reconstruct, VALUES[:6], POINTS),
    case(ValueError, "shape", "(H, W)", "(5,)", reconstruct, VALUES, POINTS, (5,)),
    case(
        ValueError,
        "shape",
        "no empty axis",
        "(0, 6)",
        reconstruct,
        VALUES,
        POINTS,
        (0, 6),
        boundary="wrap",
    ),
    case(ValueError, "boundary", BOUNDARIES, "'?'", reconstruct, VALUES, POINTS, boundary="?"),
    case(TypeError, "damping", "float", "str", reconstruct, VALUES, POINTS, damping="0"),
    case(ValueError, "damping", ">= 0", "-1", reconstruct, VALUES, POINTS, damping=-1),
    case(ValueError, "damping", "finite", "inf", reconstruct, VALUES, POINTS, damping=np.inf),
    case(ValueError, "damping", ">= 0", "nan", reconstruct, VALUES, POINTS, damping=np.nan),
    case(TypeError, "tol", "float", "NoneType", reconstruct, VALUES, POINTS, tol=None),
    case(ValueError, "tol", ">= 0", "-0.1", reconstruct, VALUES, POINTS, tol=-0.1),
    case(ValueError, "tol", ">= 0", "nan", reconstruct, VALUES, POINTS, tol=np.nan),
    case(TypeError, "max_steps", "int", "float", reconstruct, VALUES, POINTS, max_steps=10.0),
    case(ValueError, "max_steps", "at least 1", "0", reconstruct, VALUES, POINTS, max_steps=0),
    # options
    *of_every_warp(ValueError, "method", METHODS, "'bilinear'", method="bilinear"),
    *of_every_warp(ValueError, "method", METHODS, "None", method=None),
    *of_every_warp(ValueError, "method", METHODS, "array", method=np.array(["linear", "cubic"])),
    *of_every_warp(ValueError, "boundary", BOUNDARIES, "'zeros'", boundary="zeros"),
    *of_every_warp(TypeError, "forward_mode", "True or False", "1", forward_mode=1),
    *of_every_warp(TypeError, "deterministic", "True or False", "'yes'", deterministic="yes"),
    *of_every_warp(ValueError, "boundary", BOUNDARIES, "'?'", boundary=("wrap", "?")),
    *of_every_warp(ValueError, "boundary", "2 along (x, y)", "('wrap',)", boundary=("wrap",)),
    case(
        ValueError,
        "image",
        "axis with boundary 'wrap'",
        "(0, 6)",
        gather,
        EMPTY,
        POINTS,
        boundary=("constant", "wrap"),
    ),
    case(TypeError, "fill_value", "a number or", "str", gather, IMAGE, POINTS, fill_value="0"),
    case(TypeError, "fill_value", "number", "NoneType", backward, IMAGE, FLOW, fill_value=None),
    case(ValueError, "fill_value", "(3,)", "(2,)", forward, IMAGE, FLOW, fill_value=(0, 0)),
    case(ValueError, "fill_value", "(3,)", "(1, 3)", backward, IMAGE, FLOW, fill_value=[[0, 1, 2]]),
    case(TypeError, "fill_value", "real", "complex", gather, IMAGE, POINTS, fill_value=1j),
    case(
        TypeError,
        "fill_value",
        "real",
        "complex64",
        forward,
        IMAGE,
        FLOW,
        fill_value=np.ones(3, "complex64"),
    ),
    *(
        case(
            ValueError,
            "fill_value",
            "uint8 holds exactly",
            repr(fill),
            gather,
            PIXELS,
            POINTS,
            fill_value=fill,
            method="nearest",
        )
        for fill in (256, -1, 0.5, np.nan, 2**70, 1j, [0, 1, 256], np.array([-1, 0, 1]), ["zero"])
    ),
    *(
        case(
            TypeError,
            "fill_value",
            "a number for each",
            repr(fill),
            gather,
            IMAGE,
            POINTS,
            fill_value=fill,
        )
        for fill in (["zero"], [1, [2, 3]], [10**400])
    ),
    case(
        ValueError,
        "derivative",
        "none of an image of uint8",
        "(1, 0)",
        gather,
        PIXELS,
        POINTS,
        method="nearest",
        derivative=(1, 0),
    ),
    case(ValueError, "fill_value", "float", "1.8e+308", gather, IMAGE, POINTS, fill_value=10**400),
    case(TypeError, "min_coverage", "float", "str", forward, IMAGE, FLOW, min_coverage="0"),
    case(ValueError, "min_coverage", "0", "-1", forward, IMAGE, FLOW, min_coverage=-1),
    case(ValueError, "min_coverage", "0", "nan", forward, IMAGE, FLOW, min_coverage=np.nan),
    case(ValueError, "derivative", "2 orders", "(1,)", gather, IMAGE, POINTS, derivative=(1,)),
    case(
        ValueError, "derivative", "orders", "array", gather, IMAGE, POINTS, derivative=np.array(1)
    ),
    case(
        ValueError,
        "derivative",
        "2 orders",
        "(0, 0, 1)",
        splat,
        VALUES,
        POINTS,
        derivative=(0, 0, 1),
    ),
    case(
        ValueError, "derivative", "2 orders", "(0, -1)", gather, IMAGE, POINTS, derivative=(0, -1)
    ),
    case(
        ValueError, "derivative", "2 orders", "(0.5, 0)", gather, IMAGE, POINTS, derivative=(0.5, 0)
    ),
    case(
        ValueError, "derivative", "3 orders", "1", gather, VOLUME, np.zeros((7, 3), F), derivative=1
    ),
    case(ValueError, "importance", "the logits", "None", forward, IMAGE, FLOW, reduce="softmax"),
    case(ValueError, "reduce", "'average', 'soft", "'mean'", forward, IMAGE, FLOW, reduce="mean"),
    case(
        ValueError,
        "method",
        "reduce='softmax'",
        "'cubic'",
        forward,
        IMAGE,
        FLOW,
        reduce="softmax",
        importance=IMAGE[..., 0],
        method="cubic",
    ),
    case(ValueError, "method", "reduce='average'", "'cubic'", forward, IMAGE, FLOW, method="cubic"),
    *(
        case(
            ValueError,
            "fill_value",
            "reduce='sum'",
            repr(fill),
            forward,
            IMAGE,
            FLOW,
            reduce="sum",
            fill_value=fill,
        )
        for fill in (2.0, np.zeros(3))
    ),
    case(
        ValueError,
        "min_coverage",
        "reduce='sum'",
        "0.5",
        forward,
        IMAGE,
        FLOW,
        reduce="sum",
        min_coverage=0.5,
    ),
]


@pytest.mark.parametrize(
    ("error", "argument", "expected", "received", "call", "arrays", "options"), WRONG
)
def test_wrong_call(error, argument, expected, received, call, arrays, options):
    shapes, static = [], list(arrays)
    traced = [i for i, a in enumerate(arrays) if isinstance(a, np.ndarray | np.generic)]
    shapes = [jax.ShapeDtypeStruct(arrays[i].shape, arrays[i].dtype) for i in traced]

    def function(*given):
        for i, x in zip(traced, given, strict=True):
            static[i] = x
        return call(*static, **options)

    # Tracing alone: no kernel has run when the message appears.
    with pytest.raises(error) as raised:
        jax.eval_shape(function, *shapes)
    message = str(raised.value)
    form = r"(?P<argument>[\w, ]+): expected (?P<expected>.+), got (?P<received>.+); (?P<remedy>.+)"
    found = re.fullmatch(form, message)
    assert found, message
    assert argument in found["argument"]
    assert expected in found["expected"]
    assert received in found["received"]
    assert len(found["remedy"]) > 5
    # Called with values, it says the same.
    with pytest.raises(error, match=re.escape(message)):
        call(*arrays, **options)


@pytest.mark.parametrize("transform", [jax.jvp, jax.jacfwd], ids=lambda f: f.__name__)
def test_forward_mode_is_named(transform):
    def warp(flow):
        return jaxwarp.backward_warp(IMAGE, flow)

    with pytest.raises(TypeError, match=r"expected True .* pass forward_mode=True"):
        transform(warp, (FLOW,), (FLOW,)) if transform is jax.jvp else transform(warp)(FLOW)


@pytest.mark.parametrize(
    "call",
    [
        lambda: jaxwarp.gather(VALUES, POINTS),
        lambda: jaxwarp.backward_warp(VALUES, POINTS[:, :1]),
        lambda: jaxwarp.grid_sample(VALUES, POINTS[:, :1]),
    ],
)
def test_one_dimension_has_a_way(call):
    with pytest.raises(ValueError, match=r"1-D signal as one row"):
        call()


def test_static_options_cannot_be_traced():
    for option in ("damping", "tol", "max_steps"):

        def find(value, option=option):
            return reconstruct(VALUES, POINTS, **{option: value})

        with pytest.raises(TypeError, match=f"{option}: expected a Python .*, got .*; .*"):
            jax.jit(find)(1)

    def warp(value):
        return jaxwarp.forward_warp(IMAGE, FLOW, min_coverage=value)

    with pytest.raises(TypeError, match=r"min_coverage: expected a Python float, got .*; .*"):
        jax.jit(warp)(0.5)


def test_a_traced_fill_of_integers_has_their_dtype():
    def warp(fill):
        return gather(PIXELS, POINTS, method="nearest", fill_value=fill)

    for fill in (np.int32(3), jnp.zeros(3, "int32")):
        with pytest.raises(TypeError, match=r"fill_value: expected uint8, .*, got int32; .*"):
            jax.jit(warp)(fill)
        np.testing.assert_array_equal(warp(fill), PIXELS[0, 0] * np.ones((7, 1), np.uint8))
    jax.jit(warp)(np.uint8(3))


@pytest.mark.parametrize("dtype", [*cases.INTEGERS, "int4", "float8_e4m3fn"])
def test_no_error_advises_a_conversion_that_loses_bits(dtype):
    dtype = jnp.dtype(dtype)
    calls = [
        lambda: gather(jnp.ones((5, 6, 3), dtype), POINTS),
        lambda: backward(jnp.ones((5, 6, 3), dtype), FLOW, method="cubic"),
        lambda: sample(jnp.ones((5, 6, 3), dtype), FLOW),
        lambda: splat(jnp.ones((7, 3), dtype), POINTS),
        lambda: forward(IMAGE, jnp.zeros((5, 6, 2), dtype)),
        lambda: weighted(jnp.ones((5, 6), dtype)),
        lambda: gather(IMAGE, jnp.zeros((7, 2), dtype)),
        lambda: reconstruct(jnp.ones((7, 3), dtype), POINTS),
        lambda: jaxwarp.flow.invert(jnp.zeros((5, 6, 2), dtype)),
        lambda: jaxwarp.to_pixels(jnp.zeros((5, 6, 2), dtype), (5, 6), align_corners=True),
    ]
    for call in calls:
        with pytest.raises(TypeError) as raised:
            call()
        advised = re.findall(r"astype\(jnp\.(\w+)\)", str(raised.value))
        assert len(advised) == (dtype.itemsize < 8), raised.value
        numbers = [True, False]
        if jnp.issubdtype(dtype, jnp.integer):
            info = jnp.iinfo(dtype)
            numbers += [info.min, info.max, info.max - 1]
        for x in (jnp.array(n, dtype) for n in numbers):
            for wider in advised:
                assert float(x.astype(wider)) == x.astype(np.float64)


def test_integers_are_told_of_nearest():
    for call, where, option in ((gather, POINTS, "method"), (sample, FLOW, "mode")):
        with pytest.raises(TypeError, match=f"pass {option}='nearest', which keeps every bit"):
            call(PIXELS, where)


@pytest.mark.parametrize("shape", [(4,), (2, 3, 4)], ids=str)
def test_pixel_grid(shape):
    if len(shape) == 3:
        assert jaxwarp.pixel_grid(shape).shape == (2, 3, 4, 3)
        return
    with pytest.raises(ValueError, match=r"shape: expected .*, got \(4,\); .*"):
        jaxwarp.pixel_grid(shape)


def test_pixel_grid_refuses_what_cannot_hold_a_position():
    with pytest.raises(TypeError, match=r"dtype: expected .*, got None; .*"):
        jaxwarp.pixel_grid((4, 5), None)
    for dtype in ("int32", "float16", "bfloat16"):
        with pytest.raises(TypeError, match=f"dtype: expected .*, got {dtype}; .*"):
            jaxwarp.pixel_grid((4, 5), dtype=dtype)


@pytest.mark.parametrize(
    ("call", "arrays"),
    [
        (jaxwarp.gather, (IMAGE, POINTS)),
        (splat, (VALUES, POINTS)),
        (reconstruct, (VALUES, POINTS)),
        (jaxwarp.backward_warp, (IMAGE, FLOW)),
        (jaxwarp.forward_warp, (IMAGE, FLOW)),
    ],
)
def test_no_array_at_all(call, arrays):
    # JAX says so itself, with the one type or the other.
    for wrong in ((None, arrays[1]), (arrays[0], None), ("image", arrays[1])):
        with pytest.raises((TypeError, ValueError)):
            call(*wrong)
