"""Every transformation of JAX on every operation, against the same on the reference, in float64.

A transformation is written once, as a function of an operation and its arrays, and listed by its
decorator. Those that need forward mode at the outermost level are expected to be refused without
`forward_mode=True`; all others work with and without it.
"""

from functools import partial
from typing import NamedTuple

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import scalar
from remembered import remembered

import jaxwarp
from jaxwarp import reference

TOLERANCE = 1e-9  # third derivatives of an average magnify the rounding by powers of 1 / D_j

EVERY_TRANSFORMATION = [
    cases.Case("gather"),
    cases.Case("splat"),
    cases.Case("backward_warp", options={"boundary": "nearest"}),
    cases.Case("forward_warp", options={"reduce": "sum"}, weighted=True),
    cases.Case("forward_warp", options={"reduce": "average", "min_coverage": 0.1}),
    cases.Case("forward_warp", options={"reduce": "average"}, weighted=True),
    cases.Case("forward_warp", options={"reduce": "softmax", "min_coverage": 0.1}, weighted=True),
]
SOME_TRANSFORMATIONS = [
    cases.Case("gather", 3, {"method": "cubic", "boundary": "reflect", "derivative": (0, 1, 0)}),
    cases.Case("splat", 3, {"method": "cubic", "boundary": cases.PER_AXIS[3]}),
    cases.Case("backward_warp", 3, {"method": "cubic", "boundary": "mirror", "fill_value": 0.5}),
    cases.Case("forward_warp", 3, {"reduce": "sum", "method": "cubic", "boundary": "nearest"}),
    cases.Case("forward_warp", 3, {"reduce": "average", "return_coverage": True}, weighted=True),
    next(c for c in cases.GRID_SAMPLE if str(c) == "grid_sample-3d-bicubic-reflection"),
]
TRANSFORMATIONS = {}


def transformation(*, forward=False, some=False):
    """`forward`: needs forward_mode=True. `some`: also for the cases of SOME_TRANSFORMATIONS."""

    def register(function):
        TRANSFORMATIONS[function.__name__] = (function, forward, some)
        return function

    return register


class Arrays(NamedTuple):
    """The operands x of an operation, tangents dx of them, and batches of both; a tree for jit."""

    x: tuple
    batch: tuple  # two of x
    batches: tuple  # three of batch
    dx: tuple
    d_batch: tuple

    @classmethod
    def of(cls, case):
        def inputs(seed):
            first, points, *w = case.inputs("inside" if case.op == "splat" else "random", seed=seed)
            # Off the kinks, where a second derivative is not one of a function, by 1/128.
            return (first, points + 1 / 128, *w)

        def stack(trees):
            return jax.tree.map(lambda *a: np.stack(a), *trees)

        def tangents(seed, x):
            rng = np.random.default_rng(seed)
            return tuple(rng.standard_normal(a.shape) for a in x)

        x, batch = inputs(0), stack([inputs(1), inputs(2)])
        batches = stack([stack([inputs(i), inputs(i + 9)]) for i in (3, 4, 5)])
        arrays = cls(x, batch, batches, tangents(6, x), tangents(7, batch))
        return jax.tree.map(jnp.asarray, arrays)

    @property
    def count(self):
        return len(self.x)

    @property
    def axes(self):
        """Which operands a vmap maps: each alone, and all."""
        each = [tuple(0 if i == j else None for i in range(self.count)) for j in range(self.count)]
        return [*each, (0,) * self.count]

    def mapped(self, axes, inner=None):
        """Operands for vmap over `axes`, or for vmap over `axes` of vmap over `inner`."""
        inner = inner or (None,) * self.count
        operands = {
            (None, None): self.x,
            (None, 0): self.batch,
            (0, None): [b[:, 0] for b in self.batches],
            (0, 0): self.batches,
        }
        return tuple(operands[o, n][i] for i, (o, n) in enumerate(zip(axes, inner, strict=True)))


def gradient(f, count):
    return jax.grad(scalar(f), tuple(range(count)))


# -------------------------------------------------------------------------- values, reverse mode


@transformation(some=True)
def value(f, a):
    return f(*a.x)


@transformation(some=True)
def value_and_grad(f, a):
    return jax.value_and_grad(scalar(f), tuple(range(a.count)))(*a.x)


@transformation(some=True)
def grad_in_one(f, a):
    return [jax.grad(scalar(f), i)(*a.x) for i in range(a.count)]


@transformation()
def vjp(f, a):
    out, pull = jax.vjp(f, *a.x)
    return out, pull(jax.tree.map(jnp.cos, out))


@transformation()
def vjp_of_one_coverage_or_channel(f, a):
    return jax.grad(lambda *x: jax.tree.leaves(f(*x))[-1][..., 0].sum(), 1)(*a.x)


@transformation(some=True)
def jacrev(f, a):
    return jax.jacrev(lambda *x: jnp.ravel(jax.tree.leaves(f(*x))[0])[:5], tuple(range(a.count)))(
        *a.x
    )


# ----------------------------------------------------------------------------------- forward mode


@transformation(forward=True, some=True)
def jvp(f, a):
    return jax.jvp(f, a.x, a.dx)


@transformation(forward=True)
def jvp_in_one(f, a):
    def along(i):
        def of_one(x):
            return f(*a.x[:i], x, *a.x[i + 1 :])

        return jax.jvp(of_one, (a.x[i],), (a.dx[i],))

    return [along(i) for i in range(a.count)]


@transformation(forward=True)
def jacfwd(f, a):
    def along_a_line(t):
        return f(*(x + t[0] * d + t[1] * d**2 for x, d in zip(a.x, a.dx, strict=True)))

    return jax.jacfwd(along_a_line)(jnp.zeros(2))


@transformation(forward=True, some=True)
def linearize(f, a):
    out, push = jax.linearize(f, *a.x)
    return out, push(*a.dx), push(*a.x)


@transformation(forward=True, some=True)
def linear_transpose_in_the_first(f, a):
    def linear(first):
        return jax.tree.leaves(f(first, *a.x[1:]))[0]

    shape = jax.eval_shape(linear, a.x[0])
    ct = jnp.cos(jnp.arange(float(shape.size))).reshape(shape.shape)
    return jax.linear_transpose(linear, a.x[0])(ct)


@transformation(forward=True)
def grad_of_jvp(f, a):
    return jax.grad(lambda *x: scalar(lambda *x: jax.jvp(f, x, a.dx)[1])(*x), (0, 1))(*a.x)


@transformation(forward=True)
def vmap_of_jvp(f, a):
    return jax.vmap(lambda d: jax.jvp(f, a.x, d))(a.d_batch), jax.vmap(partial(jax.jvp, f))(
        a.batch, a.d_batch
    )


@transformation(forward=True)
def jvp_of_vmap(f, a):
    return jax.jvp(lambda x: jax.vmap(f)(a.batch[0], x, *a.batch[2:]), a.batch[1:2], a.d_batch[1:2])


@transformation(forward=True)
def jvp_of_scan(f, a):
    return jax.jvp(partial(walk, f, a), a.x[1:2], a.dx[1:2])


@transformation(forward=True)
def jvp_of_while(f, a):
    def run(points):
        def step(state):
            return state[0] + 1, state[1] + 0.01 * jnp.tanh(scalar(f)(a.x[0], state[1], *a.x[2:]))

        return jax.lax.while_loop(lambda state: state[0] < 3, step, (0, points))[1]

    return jax.jvp(run, a.x[1:2], a.dx[1:2])


# --------------------------------------------------------------------------------- higher orders


@transformation(some=True)
def jvp_of_grad(f, a):
    return jax.jvp(gradient(f, a.count), a.x, a.dx)


@transformation()
def jvp_of_grad_in_one(f, a):
    def of_points(points):
        return jax.grad(lambda p: scalar(f)(a.x[0], p, *a.x[2:]))(points)

    def of_first(first):
        return jax.grad(lambda i: scalar(f)(i, *a.x[1:]))(first)

    return jax.jvp(of_points, a.x[1:2], a.dx[1:2]), jax.jvp(of_first, a.x[:1], a.dx[:1])


@transformation(some=True)
def grad_of_grad(f, a):
    def product(*x):
        return sum(jnp.vdot(g, d) for g, d in zip(gradient(f, a.count)(*x), a.dx, strict=True))

    return jax.grad(product, tuple(range(a.count)))(*a.x)


@transformation()
def hessian(f, a):
    def of_some(some):
        points = a.x[1].reshape(-1, some.shape[-1]).at[:4].set(some).reshape(a.x[1].shape)
        return scalar(f)(a.x[0], points, *a.x[2:])

    return jax.hessian(of_some)(a.x[1].reshape(-1, a.x[1].shape[-1])[:4])


@transformation()
def jacrev_of_jacrev(f, a):
    def of_some(some):
        first = a.x[0].reshape(-1).at[:4].set(some).reshape(a.x[0].shape)
        return scalar(f)(first, *a.x[1:])

    return jax.jacrev(jax.jacrev(of_some))(a.x[0].reshape(-1)[:4])


@transformation()
def third_order(f, a):
    def curvature(points):
        def of_points(p):
            return jax.grad(lambda p: scalar(f)(a.x[0], p, *a.x[2:]))(p)

        return jnp.sum(jnp.cos(jax.jvp(of_points, (points,), (a.dx[1],))[1]))

    return jax.grad(curvature)(a.x[1])


# ------------------------------------------------------------------------------------------ vmap


@transformation(some=True)
def vmap(f, a):
    return [jax.vmap(f, axes)(*a.mapped(axes)) for axes in a.axes]


@transformation()
def vmap_of_other_axes(f, a):
    last = [jnp.moveaxis(x, 0, -1) for x in a.batch]
    second = [jnp.moveaxis(x, 0, 1) for x in a.batch]
    n = [x.ndim - 1 for x in a.batch]
    out_axes = jax.tree.map(lambda o: o.ndim, jax.eval_shape(f, *a.x))
    return (
        jax.vmap(f, n, out_axes)(*last),
        jax.vmap(f, (1, -1, *n[2:]), 1)(second[0], *last[1:]),
    )


@transformation()
def vmap_of_size_one_and_zero(f, a):
    one = jax.vmap(f)(*(x[None] for x in a.x))
    none = jax.vmap(f, (0, *(None,) * (a.count - 1)))(a.batch[0][:0], *a.x[1:])
    ct = jax.grad(lambda *x: scalar(jax.vmap(f, (None, 0, *(None,) * (a.count - 2))))(*x), (0, 1))(
        a.x[0], a.batch[1][:0], *a.x[2:]
    )
    return one, none, ct


@transformation()
def vmap_of_vmap(f, a):
    return [
        jax.vmap(jax.vmap(f, inner), outer)(*a.mapped(outer, inner))
        for inner, outer in zip(a.axes, reversed(a.axes), strict=True)
    ]


@transformation(some=True)
def grad_of_vmap(f, a):
    return [gradient(jax.vmap(f, axes), a.count)(*a.mapped(axes)) for axes in a.axes]


@transformation(some=True)
def vmap_of_grad(f, a):
    return [jax.vmap(gradient(f, a.count), axes)(*a.mapped(axes)) for axes in a.axes]


@transformation()
def grad_in_one_of_vmap(f, a):
    return [
        jax.grad(scalar(jax.vmap(f, axes)), i)(*a.mapped(axes))
        for axes in a.axes
        for i in range(a.count)
    ]


@transformation()
def grad_of_vmap_of_vmap(f, a):
    return [
        gradient(jax.vmap(jax.vmap(f, inner), outer), a.count)(*a.mapped(outer, inner))
        for inner, outer in zip(a.axes, reversed(a.axes), strict=True)
    ]


@transformation()
def vmap_of_grad_of_vmap(f, a):
    return [
        jax.vmap(gradient(jax.vmap(f, inner), a.count), outer)(*a.mapped(outer, inner))
        for inner, outer in zip(a.axes, reversed(a.axes), strict=True)
    ]


@transformation()
def vmap_of_cotangents(f, a):
    out, pull = jax.vjp(f, *a.x)
    cts = jax.tree.map(lambda o: jnp.stack([jnp.cos(o), jnp.sin(o), o]), out)
    return jax.vmap(pull)(cts)


@transformation(some=True)
def vmap_of_jvp_of_grad(f, a):
    along = partial(jax.jvp, gradient(f, a.count))
    return jax.vmap(lambda d: along(a.x, d))(a.d_batch), jax.vmap(along)(a.batch, a.d_batch)


@transformation()
def jvp_of_grad_of_vmap(f, a):
    axes = (None, 0, *(None,) * (a.count - 2))
    x = a.mapped(axes)
    return jax.jvp(gradient(jax.vmap(f, axes), a.count), x, tuple(jnp.cos(i) for i in x))


@transformation()
def vmap_of_jacrev(f, a):
    def some(*x):
        return jnp.ravel(jax.tree.leaves(f(*x))[0])[:3]

    return jax.vmap(jax.jacrev(some, 1))(*a.batch)


# ---------------------------------------------------------------------------------- control flow


def walk(f, a, points):
    """Three steps of a flow that depends on what it warps."""

    def step(p, _):
        return p + 0.01 * jnp.tanh(scalar(f)(a.x[0], p, *a.x[2:])), None

    return jax.lax.scan(step, points, None, length=3)[0]


@transformation(some=True)
def grad_of_scan(f, a):
    def total(first, batch):
        def step(s, points):
            return s + scalar(f)(first, points, *a.x[2:]), None

        return jax.lax.scan(step, 0.0, batch)[0]

    return jax.grad(total, (0, 1))(a.x[0], a.batch[1])


@transformation()
def grad_of_scan_carry(f, a):
    return jax.grad(lambda p: jnp.sum(jnp.sin(walk(f, a, p))))(a.x[1])


@transformation()
def vmap_of_scan(f, a):
    return jax.vmap(partial(walk, f, a))(a.batch[1])


@transformation(some=True)
def checkpoint(f, a):
    return jax.grad(jax.checkpoint(scalar(f)), tuple(range(a.count)))(*a.x)


@transformation()
def checkpoint_of_scan(f, a):
    def total(first, batch):
        @jax.checkpoint
        def step(s, points):
            return s + scalar(f)(first, points, *a.x[2:]), None

        return jax.lax.scan(step, 0.0, batch)[0]

    return jax.grad(total, (0, 1))(a.x[0], a.batch[1])


@transformation()
def grad_of_cond(f, a):
    def either(p, *x):
        return jax.lax.cond(p > 0, scalar(f), lambda *x: 2 * scalar(f)(*x), *x)

    return jax.grad(either, (1, 2))(jnp.sum(a.x[0]), *a.x)


@transformation()
def vmap_of_cond(f, a):
    def either(p, *x):
        return jax.lax.cond(p > 0, f, lambda *x: jax.tree.map(jnp.negative, f(*x)), *x)

    return jax.vmap(either)(jnp.array([1.0, -1.0]), *a.batch)


@transformation()
def while_loop(f, a):
    def step(state):
        return state[0] + 1, state[1] + 0.01 * jnp.tanh(scalar(f)(a.x[0], state[1], *a.x[2:]))

    return jax.lax.while_loop(lambda state: state[0] < 3, step, (0, a.x[1]))


@transformation()
def grad_of_map(f, a):
    return jax.grad(
        lambda x: jnp.sum(jnp.sin(jax.tree.leaves(jax.lax.map(lambda y: f(*y), x))[0]))
    )(a.batch)


# ---------------------------------------------------------------------------------------- tests


@pytest.mark.parametrize(
    ("name", "case"),
    [
        pytest.param(name, case, id=f"{name}-{case}")
        for name, (_, _, some) in TRANSFORMATIONS.items()
        for case in EVERY_TRANSFORMATION + (SOME_TRANSFORMATIONS if some else [])
    ],
)
def test_transformation(name, case):
    transformed, forward, _ = TRANSFORMATIONS[name]
    arrays = Arrays.of(case)
    expected = remembered(jax.jit(partial(transformed, case.function(reference))), arrays)
    modes = [
        partial(transformed, case.function(jaxwarp, forward_mode=mode)) for mode in (True, False)
    ]
    allowed = modes[:1] if forward else modes
    for actual in jax.jit(lambda arrays: [mode(arrays) for mode in allowed])(arrays):
        cases.assert_close(actual, expected, TOLERANCE)
    if forward and name != "linear_transpose_in_the_first":  # which some operations allow even so
        # From JAX: the second where the tangents of a custom_vjp are differentiated again.
        with pytest.raises((TypeError, NotImplementedError), match=r"forward-mode|custom_lin"):
            modes[1](arrays)


@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_transformation_without_jit(name):
    transformed, forward, _ = TRANSFORMATIONS[name]
    case = EVERY_TRANSFORMATION[0]
    arrays = Arrays.of(case)
    function = partial(transformed, case.function(jaxwarp, forward_mode=forward))
    cases.assert_close(function(arrays), jax.jit(function)(arrays), TOLERANCE)


@pytest.mark.parametrize("case", [*EVERY_TRANSFORMATION, SOME_TRANSFORMATIONS[-1]], ids=str)
@pytest.mark.parametrize(
    "name",
    ["value_and_grad", "vjp", "jvp", "vmap", "grad_of_vmap", "vmap_of_jvp", "grad_of_grad",
     "jvp_of_grad", "checkpoint", "while_loop"],
)  # fmt: skip
def test_disable_jit(name, case):
    transformed, forward, _ = TRANSFORMATIONS[name]
    arrays = Arrays.of(case)
    function = partial(transformed, case.function(jaxwarp, forward_mode=forward))
    expected = jax.jit(function)(arrays)
    with jax.disable_jit():
        actual = function(arrays)
    cases.assert_close(actual, expected, TOLERANCE)


@pytest.mark.parametrize("case", EVERY_TRANSFORMATION, ids=str)
def test_donated_arguments(case):
    arrays, function = Arrays.of(case).x, case.function(jaxwarp)
    step = lambda *x: jax.tree.map(jnp.add, x, gradient(function, len(x))(*x))  # noqa: E731
    expected = jax.jit(step)(*arrays)
    for donated in (0, 1, tuple(range(len(arrays)))):
        given = jax.tree.map(jnp.copy, arrays)
        actual = jax.jit(step, donate_argnums=donated)(*given)
        cases.assert_close(actual, expected, 0)
        assert given[0].is_deleted() or given[1].is_deleted()


def test_gauss_newton():
    """J and its transpose, from `linearize`, fit a flow; at the fit J^T J is the exact Hessian."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:6, :7]
    second = np.stack([np.sin(0.7 * x + 0.3 * y), np.cos(0.5 * x * y / 4), 0.2 * x - 0.1 * y], -1)
    truth = rng.uniform(0.2, 0.8, (6, 7, 2))
    warp = partial(jaxwarp.backward_warp, method="cubic", boundary="mirror", forward_mode=True)
    first = warp(second, truth)

    def residual(flow):
        return (warp(second, flow) - first).ravel()

    def normal_matrix(flow):
        _, jvp = jax.linearize(residual, flow)
        transposed = jax.linear_transpose(jvp, flow)
        basis = jnp.eye(flow.size).reshape(flow.size, *flow.shape)
        return jax.vmap(lambda v: transposed(jvp(v))[0].ravel())(basis)

    def loss(flow):
        return 0.5 * jnp.sum(residual(flow) ** 2)

    exact = jax.hessian(loss)(truth).reshape(truth.size, truth.size)
    cases.assert_close(jax.jit(normal_matrix)(truth), exact, 1e-12)

    @jax.jit
    def step(flow):
        damped = normal_matrix(flow) + 1e-9 * jnp.eye(flow.size)
        return flow - jnp.linalg.solve(damped, jax.grad(loss)(flow).ravel()).reshape(flow.shape)

    flow = truth + rng.uniform(-0.02, 0.02, truth.shape)
    losses = [float(loss(flow := step(flow))) for _ in range(5)]
    assert losses[-1] < 1e-20 < losses[0]
