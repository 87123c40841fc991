"""The tangent kernels: jvp in one pass, and the transposes of the fused adjoints."""

from functools import partial

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from remembered import remembered

import jaxwarp
from jaxwarp import reference

EXACT = 1e-12  # float64: sums of at most a few hundred terms


def tangents(arrays, seed=1):
    rng = np.random.default_rng(seed)
    return tuple(rng.standard_normal(a.shape).astype(a.dtype) for a in arrays)


def pushing(function):
    return jax.jit(lambda arrays, d: jax.jvp(function, arrays, d))


def pushed(function, arrays, d):
    return pushing(function)(arrays, d)


@pytest.mark.parametrize("case", cases.UNDIFFERENTIATED, ids=str)
def test_equals_the_reference(case):
    arrays = case.inputs()
    if case.op == "forward_warp":  # where D_j is tiny, the reference's quotient rule cancels
        arrays = (arrays[0], *case.inputs("random")[1:])
    d = tangents(arrays)
    actual = pushed(case.function(jaxwarp, forward_mode=True), arrays, d)
    cases.assert_close(actual, remembered(pushing(case.function(reference)), arrays, d), EXACT)


@pytest.mark.parametrize("case", [*cases.FEW, *cases.GRID_SAMPLE[::5]], ids=str)
def test_is_the_transpose_of_the_adjoint(case):
    arrays = case.inputs("random")
    function = case.function(jaxwarp, forward_mode=True)
    d = tangents(arrays)
    out, d_out = pushed(function, arrays, d)
    ct = jax.tree.map(jnp.cos, out)
    found = jax.jit(lambda arrays, ct: jax.vjp(function, *arrays)[1](ct))(arrays, ct)

    def dots(a, b):
        return [x * y for x, y in zip(map(np.asarray, a), map(np.asarray, b), strict=True)]

    forward, backward = dots(jax.tree.leaves(d_out), jax.tree.leaves(ct)), dots(d, found)
    scale = sum(np.abs(x).sum() for x in (*forward, *backward))
    difference = sum(x.sum() for x in forward) - sum(x.sum() for x in backward)
    assert abs(difference) <= EXACT * scale


@pytest.mark.parametrize("of", [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2)], ids=str)
@pytest.mark.parametrize("case", cases.FEW, ids=str)
def test_of_some_operands(case, of):
    """An operand that does not move costs nothing and adds nothing."""
    arrays = case.inputs("random")
    if len(arrays) == 2 and 2 in of:
        pytest.skip("no importance")
    d = tangents(arrays)
    given = tuple(t if i in of else np.zeros_like(t) for i, t in enumerate(d))

    def moved(function):
        def of_some(*some):
            every = list(arrays)
            for i, a in zip(of, some, strict=True):
                every[i] = a
            return function(*every)

        return of_some

    actual = pushed(
        moved(case.function(jaxwarp, forward_mode=True)),
        tuple(arrays[i] for i in of),
        tuple(d[i] for i in of),
    )
    cases.assert_close(actual, remembered(pushing(case.function(reference)), arrays, given), EXACT)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("case", cases.FEW, ids=str)
def test_dtypes(case, dtype):
    arrays = case.inputs("inside", dtype=dtype, point_dtype="float32")
    d = tangents(arrays)
    out, d_out = pushed(case.function(jaxwarp, forward_mode=True), arrays, d)
    assert [x.dtype for x in jax.tree.leaves(d_out)] == [x.dtype for x in jax.tree.leaves(out)]
    wide = [tuple(np.asarray(a, np.float64) for a in some) for some in (arrays, d)]
    expected = remembered(pushing(case.function(reference)), *wide)[1]
    # One rounding of the result, and of a few terms in float32 before it; D_j is at least 1/64^2.
    rounding = max(float(jnp.finfo(dtype).eps), 64 * 2**-23)
    cases.assert_close(d_out, expected, rounding)


@pytest.mark.parametrize("flow_dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("op", ["backward_warp", "forward_warp"])
def test_half_precision_flow(op, flow_dtype):
    case = next(c for c in cases.FEW if c.op == op)
    arrays = case.inputs("inside", dtype="float32", point_dtype=flow_dtype)
    d = tangents(arrays)
    actual = pushed(case.function(jaxwarp, forward_mode=True), arrays, d)
    wide = [tuple(np.asarray(a, np.float64) for a in some) for some in (arrays, d)]
    cases.assert_close(actual, remembered(pushing(case.function(reference)), *wide), 64 * 2**-23)


@pytest.mark.parametrize("reduce", ["average", "softmax"])
def test_an_isolated_source_does_not_change_as_it_moves(reduce):
    rng = np.random.default_rng(0)
    for dtype in (np.float32, np.float64):
        for _ in range(50):
            p = rng.uniform(0, 3, (1, 1, 2)).astype(dtype)
            values = np.zeros((4, 4, 2), dtype)
            values[0, 0] = 100 * rng.standard_normal(2)
            flow = np.full((4, 4, 2), np.nan, dtype)  # all others are dropped
            flow[0, 0] = p
            options = {"reduce": reduce, "importance": np.ones((4, 4), dtype)}
            warp = partial(jaxwarp.forward_warp, values, forward_mode=True, **options)
            d_flow = np.ones_like(flow)
            d_out = jax.jvp(warp, (flow,), (d_flow,))[1]
            t = p[0, 0] - np.floor(p[0, 0])
            least = np.min([t, 1 - t], axis=0).prod()  # the smallest D_j
            bound = 4 * np.finfo(dtype).eps * np.abs(values).max() * 2 / max(least, 1e-30)
            assert np.abs(d_out).max() <= bound


@pytest.mark.parametrize("boundary", cases.BOUNDARIES)
def test_non_finite_positions_and_fills(boundary):
    image = np.arange(12.0).reshape(3, 4, 1)
    points = np.array([[np.nan, 1], [np.inf, 1], [1, -np.inf], [1e30, 1], [-7.5, 1]])
    fills = [0.5, np.inf] if boundary == "constant" else [0.0]
    for fill in fills:
        for of_image in (True, False):
            options = {"boundary": boundary, "fill_value": fill}
            d = (np.ones_like(image) * of_image, np.ones_like(points))
            actual, expected = (
                pushed(partial(m.gather, **options, **more), (image, points), d)
                for m, more in ((jaxwarp, {"forward_mode": True}), (reference, {}))
            )
            np.testing.assert_array_equal(np.isnan(actual[1]), np.isnan(expected[1]))
            cases.assert_close(actual, expected, EXACT)


def test_values_touch_only_where_they_weigh():
    image = np.zeros((4, 4, 1))
    image[0, 0] = np.nan
    points = np.array([[1.0, 0.0], [1.0, 1.0], [2.5, 2.5], [0.5, 0.5]])
    d = (np.ones_like(image), np.ones_like(points))
    d_out = pushed(partial(jaxwarp.gather, forward_mode=True), (image, points), d)[1]
    assert np.isnan(d_out[:, 0]).tolist() == [False, False, False, True]

    values, flow = np.ones((4, 4, 1)), np.zeros((4, 4, 2))
    values[0, 0] = np.inf
    d = (np.ones_like(values), np.zeros_like(flow))
    d_out = pushed(partial(jaxwarp.forward_warp, forward_mode=True), (values, flow), d)[1]
    assert np.isfinite(d_out[1:, 1:]).all()


def test_holes_do_not_move():
    values, flow = np.ones((4, 4, 1)), np.full((4, 4, 2), 1.25)
    warp = partial(jaxwarp.forward_warp, fill_value=7.0, min_coverage=0.5, forward_mode=True)
    out, d_out = pushed(warp, (values, flow), tangents((values, flow)))
    assert (out == 7).any() and (d_out[out == 7] == 0).all()


@pytest.mark.parametrize("shared", ["operands", "tangents", "points"])
@pytest.mark.parametrize("case", cases.FEW, ids=str)
def test_batches(case, shared):
    """Operands or tangents that a batch shares are not repeated, and mean the same."""
    arrays = case.inputs("random")
    d = tangents(arrays)
    stacked = tuple(np.stack([a, 0.5 * a, np.flip(a, 0)]) for a in arrays)
    d_stacked = tuple(np.stack([t, -t, np.flip(t, 0)]) for t in d)
    given = {
        "operands": (arrays, d_stacked, (None, 0)),
        "tangents": (stacked, d, (0, None)),
        "points": (
            (stacked[0], arrays[1], *stacked[2:]),
            (d_stacked[0], d[1], *d_stacked[2:]),
            ((0, None, 0)[: len(d)],) * 2,
        ),
    }[shared]

    def mapped(module, **more):
        function = case.function(module, **more)
        return jax.jit(jax.vmap(lambda a, d: jax.jvp(function, a, d), given[2]))(*given[:2])

    cases.assert_close(
        mapped(jaxwarp, forward_mode=True), remembered(lambda: mapped(reference)), EXACT
    )


@pytest.mark.parametrize("boundary", cases.BOUNDARIES)
@pytest.mark.parametrize("method", cases.METHODS)
@pytest.mark.parametrize("dims", [2, 3])
def test_second_order_forward_over_reverse(dims, method, boundary):
    """How (2) moves, with each operand alone and with all; positions of every kind."""
    fill = {"fill_value": 0.5} if boundary == "constant" else {}
    case = cases.Case("gather", dims, {"method": method, "boundary": boundary, **fill})
    arrays = case.inputs()
    ct = np.cos(np.arange(48 * cases.CHANNELS)).reshape(48, cases.CHANNELS)
    every = (*arrays, ct)
    d = tangents(every)

    def pulled(module):
        function = case.function(module)
        return lambda image, points, ct: jax.vjp(function, image, points)[1](ct)

    for moved in ((0,), (1,), (2,), (0, 1, 2)):
        some = tuple(t * (i in moved) for i, t in enumerate(d))
        expected = remembered(pushing(pulled(reference)), every, some)
        cases.assert_close(pushed(pulled(jaxwarp), every, some), expected, 1e-11)


@pytest.mark.parametrize("case", [c for c in cases.FEW if "values" in c.arguments], ids=str)
def test_second_order_on_grid_lines(case):
    """Where a weight is 0 and its derivative is not, in every order of the operands."""
    arrays = case.inputs("integer", seed=1)
    d = tangents(arrays)

    def gradient(module):
        return jax.grad(cases.scalar(case.function(module)), tuple(range(len(arrays))))

    expected = remembered(pushing(gradient(reference)), arrays, d)
    cases.assert_close(pushed(gradient(jaxwarp), arrays, d), expected, 1e-10)


@pytest.mark.parametrize("case", cases.FEW, ids=str)
def test_second_order_reverse_over_reverse(case):
    """The transposed adjoints, with cotangents of each result alone and of all."""
    arrays = case.inputs("random")
    arrays = (arrays[0], arrays[1] + 1 / 128, *arrays[2:])  # off the kinks

    def second(module, of, wanted):
        def loss(*some):
            every = list(arrays)
            for i, a in zip(of, some, strict=True):
                every[i] = a
            return cases.scalar(case.function(module))(*every)

        def of_gradient(*some):
            found = jax.grad(loss, tuple(range(len(of))))(*some)
            return sum(jnp.sum(jnp.cos(found[i])) for i in wanted)

        some = tuple(arrays[i] for i in of)
        return jax.jit(jax.grad(of_gradient, tuple(range(len(of)))))(*some)

    every = tuple(range(len(arrays)))
    for of, wanted in ((every, (0,)), (every, (1,)), (every, every), ((0,), (0,)), ((1,), (0,))):
        expected = remembered(partial(second, reference, of, wanted))
        cases.assert_close(second(jaxwarp, of, wanted), expected, 1e-9)
