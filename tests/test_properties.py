"""Drawn at random: shapes, dtypes, positions and options, against the reference.

The draws are the same in every run (derandomize), so that a failure is reproducible. With
JAXWARP_EXAMPLES they are that many, and new ones.
"""

import os

import cases
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import HealthCheck, given, settings
from remembered import remembered

import jaxwarp
from jaxwarp import reference

EXAMPLES = int(os.environ.get("JAXWARP_EXAMPLES", "0"))
FEW = settings(
    max_examples=EXAMPLES or 40,
    derandomize=not EXAMPLES,
    deadline=None,  # most of an example is the compilation of the reference
    suppress_health_check=[HealthCheck.too_slow],
)
SIZES = st.integers(1, 6)


def coordinates(n):
    """Coordinates around an axis of length n; multiples of 1/64, as in cases.positions."""
    ordinary = st.integers(-64 * (n + 2), 64 * (2 * n + 2)).map(lambda i: i / 64)
    pixels = st.integers(-2 * n - 1, 3 * n + 1).map(float)
    # So huge that pixel + flow is flow in every dtype: the sum may be formed in a wider one.
    special = st.sampled_from([np.nan, np.inf, -np.inf, 1e30, -1e30, 2.0**60, -(2.0**70)])
    return st.one_of(ordinary, ordinary, pixels, special)


@st.composite
def images(draw, shape, dtype, finite=True):
    rng = np.random.default_rng(draw(st.integers(0, 999)))
    image = rng.standard_normal(shape)
    if not finite and image.size and draw(st.booleans()):
        image.flat[draw(st.integers(0, image.size - 1))] = np.nan
    return image.astype(jnp.dtype(dtype))


@st.composite
def calls(draw):
    """(case, its arrays), of any operation with any options that go together."""
    dims = draw(st.integers(2, 3))
    shape = tuple(draw(SIZES) for _ in range(dims))
    channels = draw(st.sampled_from([0, 1, 2, 3, 4, 7]))
    op = draw(st.sampled_from(["gather", "splat", "backward_warp", "forward_warp"]))
    options = {
        "method": draw(st.sampled_from(cases.METHODS)),
        "boundary": draw(st.sampled_from(cases.BOUNDARIES)),
    }
    if op in ("gather", "splat"):
        options["derivative"] = tuple(draw(st.integers(0, 2)) for _ in range(dims))
    if op in ("gather", "backward_warp"):
        options["fill_value"] = draw(st.sampled_from([0.0, -2.5, 100.0]))
    if op == "forward_warp":
        options["return_coverage"] = draw(st.booleans())
        averages = st.sampled_from(["average", "softmax"])
        options["reduce"] = "sum" if options["method"] == "cubic" else draw(averages)
        if options["reduce"] != "sum":
            options["fill_value"] = draw(st.sampled_from([0.0, np.nan, 7.0]))
            # No coverage is exactly one of these: float32 and float64 find the same holes.
            options["min_coverage"] = draw(st.sampled_from([0.0, 0.1, 0.7]))
    where = shape
    if op != "forward_warp":
        rank = dims if op == "backward_warp" else draw(st.integers(0, 2))
        where = tuple(draw(st.integers(0, 4)) for _ in range(rank))
    dtype = draw(st.sampled_from(cases.DTYPES))
    point_dtype = draw(st.sampled_from(["float32", "float64"]))
    first = draw(images((*(where if op == "splat" else shape), channels), dtype, finite=False))
    count = int(np.prod(where))
    rows = [[draw(coordinates(n)) for n in shape[::-1]] for _ in range(count)]
    points = np.array(rows, np.float64).reshape(*where, dims)
    arrays = [first, points]
    if "warp" in op:
        arrays[1] = points - cases.grid(where)
    softmax = options.get("reduce") == "softmax"
    weighted = softmax or (op == "forward_warp" and draw(st.booleans()))
    if weighted:
        importance = st.sampled_from([0.0, 2.5, -np.inf, 1e4, -1e4] if softmax else [0, 0.25, 1, 3])
        w = draw(st.lists(importance, min_size=count, max_size=count))
        arrays.append(np.array(w, dtype=np.float32).reshape(where))
    arrays[1] = arrays[1].astype(point_dtype)

    return cases.Case(op, dims, options, weighted, shape), arrays


@FEW
@given(calls())
def test_values(call):
    case, arrays = call
    dtype = arrays[0].dtype
    actual = jax.jit(case.function(jaxwarp))(*arrays)
    wide = np.float64 if dtype == np.float64 else np.float32
    arrays[0] = arrays[0].astype(wide)
    name = f"values of {case!r}"
    expected = remembered(jax.jit(case.function(reference)), *arrays, name=name)
    # The rounding of the sums, and that to the storage dtype.
    tolerance = 1e-12 if wide == np.float64 and arrays[1].dtype == wide else 1e-5
    fill = case.options["fill_value"] if case.op in ("gather", "backward_warp") else 0
    if fill:  # slopes cancel where all corners hold it; an axis' add up to 4 at most for each order
        tolerance *= max(1, abs(fill)) * 4.0 ** sum(case.options.get("derivative", ()))
    storage = float(jnp.finfo(dtype).eps) / 2 if dtype.itemsize == 2 else 0
    cases.assert_close(actual, expected, max(tolerance, storage))
    assert jax.tree.leaves(actual)[0].dtype == dtype


@FEW
@given(calls())
def test_cotangents(call):
    case, arrays = call
    arrays = [a.astype(np.float64) for a in arrays]
    arrays[0] = np.nan_to_num(arrays[0], posinf=1)

    def cotangents(function):
        def run(*arrays):
            out, vjp = jax.vjp(function, *arrays)
            return vjp(
                jax.tree.map(lambda o: jnp.cos(jnp.arange(float(o.size)).reshape(o.shape)), out)
            )

        return jax.jit(run)

    actual = cotangents(case.function(jaxwarp))(*arrays)
    name = f"cotangents of {case!r}"
    expected = remembered(cotangents(case.function(reference)), *arrays, name=name)
    # The least denominator, 0.25 / 64^3, magnifies the rounding.
    cases.assert_close(actual, expected, 1e-9)
