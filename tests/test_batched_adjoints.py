"""Adjoints of a splat where batch axes, non-finite positions and second order meet."""

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from remembered import remembered

import jaxwarp
from jaxwarp import reference

TOLERANCE = 1e-11  # float64, sums of a few dozen terms divided by coverages down to 1e-2


def both(make):
    cases.assert_close(make(jaxwarp), remembered(lambda: make(reference)), TOLERANCE)


@pytest.mark.parametrize("reduce", ["sum", "average"])
def test_second_order_of_a_batch_with_one_cotangent(reduce):
    rng = np.random.default_rng(0)
    values, flows = rng.standard_normal((3, 4, 1)), rng.uniform(-1, 1, (2, 3, 4, 2))

    def make(module):
        gradient = jax.grad(lambda flow: module.forward_warp(values, flow, reduce=reduce).sum())
        return jax.grad(lambda flows: (jax.vmap(gradient)(flows) ** 2).sum())(flows)

    both(make)


def test_dropped_sources_have_no_gradient():
    points = jnp.array([[jnp.nan, 1.0], [jnp.inf, 1.0], [1.2, 1.0]])
    values = jnp.ones((3, 1))

    def make(module):
        def loss(values, points):
            return (module.splat(values, points, (3, 3), boundary="wrap") ** 2).sum()

        second = jax.grad(lambda points: (jax.grad(loss, 1)(values, points) ** 2).sum())(points)
        return jax.grad(loss)(values, points), second

    both(make)
    assert (make(jaxwarp)[0][:2] == 0).all()


@pytest.mark.parametrize("reduce", ["sum", "average"])
def test_dropped_sources_at_second_order(reduce):
    rng = np.random.default_rng(0)
    values, importance = rng.standard_normal((3, 4, 1)), rng.uniform(0.2, 1, (3, 4))
    flow = rng.uniform(-1, 1, (3, 4, 2))
    flow[0, 0, 0], flow[1, 2, 1] = np.nan, np.inf

    def make(module):
        def loss(values, flow, importance):
            out = module.forward_warp(
                values, flow, importance=importance, reduce=reduce, boundary="wrap"
            )
            return jnp.sum(jnp.sin(out))

        def pulled(*arrays):
            return sum(jnp.vdot(g, jnp.cos(g)) for g in jax.grad(loss, (0, 1, 2))(*arrays))

        return jax.grad(pulled, (0, 1, 2))(values, flow, importance)

    both(make)


def test_tangent_has_the_shape_of_the_batch():
    rng = np.random.default_rng(0)
    values, points = rng.standard_normal((4, 7, 1)), rng.uniform(0, 3, (7, 2))

    def make(module):
        gradients = jax.grad(lambda v, p: module.splat(v, p, (3, 4)).sum(), (0, 1))
        mapped = jax.vmap(gradients, (0, None))
        pulled = jax.grad(
            lambda points: sum((g.reshape(28, -1) ** 2).sum() for g in mapped(values, points))
        )
        return jax.jvp(lambda v: mapped(v, points), (values,), (values,)), pulled(points)

    both(make)


def test_an_empty_batch_adds_nothing():
    image, flows = jnp.ones((64, 64, 3)), jnp.zeros((0, 64, 64, 2))
    for _ in range(8):  # what fresh memory holds is a matter of luck
        used = jax.jit(lambda i: i * 3 + 7)(image)
        del used
        gradient = jax.grad(lambda image: jaxwarp.backward_warp(image, flows).sum())(image)
        assert (gradient == 0).all()
