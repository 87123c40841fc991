"""Programs that outlive the process or the shapes they were traced with, and JAX's own checkers."""

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from processes import fresh_process

import jaxwarp
from jaxwarp import _ffi

EVERY_KERNEL = [
    cases.Case("gather"),
    cases.Case("splat"),
    cases.Case("backward_warp", 3, {"method": "cubic"}),
    cases.Case("forward_warp", options={"reduce": "average"}, weighted=True),
]


def value_and_cotangents(case):
    def compute(*arrays):
        out, pull = jax.vjp(case.function(jaxwarp), *arrays)
        return out, pull(jnp.sin(3 * out))

    return jax.jit(compute)


def cache_hits_and_misses(code, folder, **environment):
    """Of JAX's persistent cache in `folder`, in a fresh process that runs `code`."""
    counted = f"""
import jax
events = []
jax.monitoring.register_event_listener(lambda name, **_: events.append(name.rsplit("/", 1)[-1]))
{code}
print(events.count("cache_hits"), events.count("cache_misses"))
"""
    environment |= {
        "JAX_COMPILATION_CACHE_DIR": str(folder),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
    }
    return tuple(map(int, fresh_process(counted, **environment).split()))


@pytest.mark.parametrize("case", EVERY_KERNEL, ids=str)
def test_export_to_a_fresh_process(case, tmp_path):
    arrays, program = case.inputs(), value_and_cotangents(case)
    exported = jax.export.export(
        program, disabled_checks=jaxwarp.export_checks(), platforms=list(_ffi.MODULES)
    )(*arrays)
    (tmp_path / "program").write_bytes(exported.serialize())
    np.savez(tmp_path / "arrays.npz", *arrays)
    fresh_process(
        f"""
import jax, numpy as np
import jaxwarp  # registers the kernels
with np.load({str(tmp_path / "arrays.npz")!r}) as file:
    arrays = [file[f"arr_{{i}}"] for i in range({len(arrays)})]
program = jax.export.deserialize(open({str(tmp_path / "program")!r}, "rb").read())
np.savez({str(tmp_path / "results.npz")!r}, *jax.tree.leaves(program.call(*arrays)))
"""
    )
    expected = jax.tree.leaves(program(*arrays))
    with np.load(tmp_path / "results.npz") as file:
        actual = [file[f"arr_{i}"] for i in range(len(expected))]
    cases.assert_close(actual, expected, 0)


def test_export_without_the_checks_is_refused():
    with pytest.raises(ValueError, match="jaxwarp_gather"):
        jax.export.export(jax.jit(jaxwarp.gather))(np.ones((4, 5, 1)), np.ones((3, 2)))


def test_symbolic_sizes():
    """One exported program for every batch, height and width."""

    def loss(image, flow):
        out, coverage = jaxwarp.forward_warp(image, flow, return_coverage=True)
        return jnp.sum(jnp.sin(out) * jaxwarp.backward_warp(image, flow)) + jnp.sum(coverage**2)

    program = jax.jit(jax.value_and_grad(loss, (0, 1)))
    b, h, w = jax.export.symbolic_shape("b, h, w")
    shapes = [jax.ShapeDtypeStruct((b, h, w, n), np.float64) for n in (3, 2)]
    exported = jax.export.export(program, disabled_checks=jaxwarp.export_checks())(*shapes)
    rng = np.random.default_rng(0)
    for size in ((1, 4, 5), (2, 7, 3), (3, 1, 1)):
        image, flow = rng.standard_normal((*size, 3)), rng.uniform(-2, 2, (*size, 2))
        cases.assert_close(exported.call(image, flow), program(image, flow), 1e-12)


def test_persistent_cache(tmp_path):
    """A second process finds the compiled programs of the first."""
    code = """
import numpy as np, jaxwarp
image, flow = np.ones((4, 5, 3)), np.ones((4, 5, 2))
f = jax.jit(jax.grad(lambda i, f: jaxwarp.forward_warp(i, f).sum(), (0, 1)))
f(image, flow)
"""
    hits, misses = cache_hits_and_misses(code, tmp_path)
    assert (hits, misses > 0) == (0, True)
    hits, misses = cache_hits_and_misses(code, tmp_path)
    assert (hits > 0, misses) == (True, 0)


def test_persistent_cache_tells_sharded_kernels_apart(tmp_path):
    """They differ in nothing but what partitions them, which the programs' text leaves out."""
    code = """
import itertools, jax.numpy as jnp, jaxwarp, numpy as np
sharding = jax.NamedSharding(jax.make_mesh((2,), ("x",)), jax.P("x"))
random = np.random.default_rng(0)
image, flow = random.normal(size=(2, 6, 7, 3)), random.normal(size=(2, 6, 7, 2))
sharded = [jax.device_put(x, sharding) for x in (image, flow)]

def check(f, **options):
    def both(*arrays):
        out, pull = jax.vjp(lambda *a: f(*a, **options), *arrays)
        return out, pull(jnp.sin(out))
    results = [jax.tree.leaves(jax.jit(both)(*arrays)) for arrays in ((image, flow), sharded)]
    for expected, actual in zip(*results):
        np.testing.assert_allclose(actual, expected, rtol=1e-12, atol=1e-12)

methods, boundaries = ("nearest", "linear", "cubic"), ("constant", "wrap", "reflect")
for method, boundary in itertools.product(methods, boundaries):
    check(jaxwarp.backward_warp, method=method, boundary=boundary)
for fill in (0.0, 1.0):
    check(jaxwarp.backward_warp, fill_value=fill)
for reduce, boundary in itertools.product(("sum", "average"), boundaries):
    check(jaxwarp.forward_warp, reduce=reduce, boundary=boundary)
"""
    environment = {
        "JAX_REMOVE_CUSTOM_PARTITIONING_PTR_FROM_CACHE_KEY": "1",  # the address, which is random
        "JAX_NUM_CPU_DEVICES": "2",
    }
    _, misses = cache_hits_and_misses(code, tmp_path, **environment)
    assert misses > 0
    _, misses = cache_hits_and_misses(code, tmp_path, **environment)
    assert misses == 0


@pytest.mark.parametrize("case", EVERY_KERNEL, ids=str)
@pytest.mark.parametrize(
    "policy", ["everything_saveable", "nothing_saveable", "dots_saveable"], ids=str
)
def test_checkpoint_policies(case, policy):
    arrays = case.inputs("random")

    def loss(f):
        return lambda *a: jnp.sum(jnp.sin(f(*a)))

    plain = case.function(jaxwarp)
    kept = jax.checkpoint(plain, policy=getattr(jax.checkpoint_policies, policy))
    argnums = tuple(range(len(arrays)))
    actual, expected = (jax.jit(jax.grad(loss(f), argnums))(*arrays) for f in (kept, plain))
    cases.assert_close(actual, expected, 1e-12)


@pytest.mark.parametrize("case", EVERY_KERNEL, ids=str)
def test_no_leaked_tracers_and_no_nans(case):
    arrays = case.inputs("random")
    with jax.checking_leaks(), jax.debug_nans(True):
        out, cts = value_and_cotangents(case)(*arrays)
        assert all(np.isfinite(x).all() for x in (out, *cts))
        hvp = jax.jit(
            lambda *a: jax.jvp(
                jax.grad(lambda *b: jnp.sum(jnp.sin(case.function(jaxwarp)(*b)))), a, a
            )
        )
        jax.block_until_ready(hvp(*arrays))


def test_debug_nans_names_the_operation():
    points = np.array([[np.nan, 1.0]])
    with jax.debug_nans(True), pytest.raises(FloatingPointError, match="nan"):
        jax.block_until_ready(jax.jit(jaxwarp.gather)(np.ones((4, 5, 1)), points))
