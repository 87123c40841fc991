"""Sharded over a mesh of devices: the values of the reference, no operand gathered, and no more
reductions than the answer is a sum over devices."""

import re
from collections import Counter
from functools import cache, partial
from typing import NamedTuple

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from remembered import remembered

import jaxwarp
from jaxwarp import _ffi, _sharding, reference

B, H, W, C, N = 8, 8, 6, 4, 16
BOTH, CHANNELS = ("x", "y"), (None, None, None)  # a batch over both mesh axes; axes before channels
TOLERANCE = 1e-12
KERNELS = bool(_ffi.MODULES)
KINDS = pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=lambda k: k.name)


def arrays(*names):
    """NumPy arrays by name, in float64. All positions are multiples of 1/64: see tests/cases.py."""
    rng = np.random.default_rng(0)
    shift = lambda *shape: np.round(rng.uniform(-3, 3, shape) * 64) / 64  # noqa: E731
    draw = {
        "image": lambda: rng.standard_normal((B, H, W, C)),
        "one image": lambda: rng.standard_normal((1, H, W, C)),
        "single": lambda: rng.standard_normal((H, W, C)),
        "channels first": lambda: rng.standard_normal((B, C, H, W)),
        "flow": lambda: shift(B, H, W, 2),
        "one flow": lambda: shift(1, H, W, 2),
        "importance": lambda: rng.uniform(0.25, 2, (B, H, W)) * (rng.random((B, H, W)) > 0.1),
        "points": lambda: shift(N, 2) + 3,
        "batch of points": lambda: shift(B, N, 2) + 3,
        "batch of values": lambda: rng.standard_normal((B, N, C)),
        "volume": lambda: rng.standard_normal((1, 4, 4, 6, C)),
        "flow of a volume": lambda: shift(1, 4, 4, 6, 3),
    }
    return [draw[name]() for name in names]


def splat(module, values, points):
    return jax.vmap(lambda v, p: module.splat(v, p, (H, W)))(values, points)


def forward_warp(module, values, flow, importance=None, **options):
    return module.forward_warp(values, flow, importance=importance, return_coverage=True, **options)


# What is called, and the names of its arrays.
OPERATIONS = {
    "gather": (lambda module, *a: module.gather(*a), ("single", "points")),
    "backward_warp": (lambda module, *a: module.backward_warp(*a), ("image", "flow")),
    "shared image": (lambda module, *a: module.backward_warp(*a), ("one image", "flow")),
    "shared flow": (lambda module, *a: module.backward_warp(*a), ("image", "one flow")),
    "volume": (lambda module, *a: module.backward_warp(*a), ("volume", "flow of a volume")),
    "splat": (splat, ("batch of values", "batch of points")),
    "unweighted": (forward_warp, ("image", "flow")),
    "splat of a volume": (forward_warp, ("volume", "flow of a volume")),
    "sum": (partial(forward_warp, reduce="sum"), ("image", "flow", "importance")),
    "average": (partial(forward_warp, reduce="average"), ("image", "flow", "importance")),
    "softmax": (partial(forward_warp, reduce="softmax"), ("image", "flow", "importance")),
    "grid_sample": (lambda module, *a: module.grid_sample(*a), ("channels first", "flow")),
    "shared values": (
        lambda module, values, flow, w: module.forward_warp(values, flow, importance=w),
        ("one image", "flow", "importance"),
    ),
    "softmax of shared values": (
        lambda module, values, flow, logits: module.forward_warp(
            values, flow, importance=logits, reduce="softmax"
        ),
        ("one image", "flow", "importance"),
    ),
}


class Sharded(NamedTuple):
    """An operation on a mesh, and the all-reduces that its answer is. XLA merges those that do not
    wait for each other."""

    operation: str
    specs: tuple  # of the arrays
    result: P  # of the results; of the coverage, without the channels
    forward: int = 0  # all-reduces of the results ...
    both: int = 0  # ... and of the results and all cotangents

    def function(self, module=jaxwarp):
        return partial(OPERATIONS[self.operation][0], module)

    @property
    def arrays(self):
        return arrays(*OPERATIONS[self.operation][1])

    def place(self, mesh):
        return place(mesh, self.arrays, self.specs)


CASES = {
    # Over the batch nothing is summed, unless the batch shares it.
    "backward_warp batch": Sharded("backward_warp", (P("x"), P("x")), P("x")),
    "backward_warp batch over both": Sharded("backward_warp", (P(BOTH), P(BOTH)), P(BOTH)),
    "backward_warp shared image": Sharded("shared image", (P(), P(BOTH)), P(BOTH), 0, 1),
    "backward_warp shared flow": Sharded("shared flow", (P("x"), P()), P("x"), 0, 1),
    "splat batch": Sharded("splat", (P("x"), P("x")), P("x")),
    "sum batch": Sharded("sum", (P("x"),) * 3, P("x")),
    "average batch": Sharded("average", (P("x"),) * 3, P("x")),
    "softmax batch": Sharded("softmax", (P("x"),) * 3, P("x")),
    "shared values, batch": Sharded("shared values", (P(), P("x"), P("x")), P("x"), 0, 1),
    "grid_sample batch": Sharded("grid_sample", (P("x"), P("x")), P("x")),
    # Over the points, the image that they share has its cotangent summed, and a splat its result;
    # its cotangents are those of the points. A softmax finds the maximum first.
    "gather points": Sharded("gather", (P(), P("x")), P("x"), 0, 1),
    "backward_warp rows": Sharded("backward_warp", (P(), P(None, "x")), P(None, "x"), 0, 1),
    "backward_warp rows and columns": Sharded(
        "backward_warp", (P(), P(None, "x", "y")), P(None, "x", "y"), 0, 1
    ),
    "volume, two axes": Sharded(
        "volume", (P(), P(None, "x", None, "y")), P(None, "x", None, "y"), 0, 1
    ),
    "grid_sample rows": Sharded("grid_sample", (P(), P(None, "x")), P(None, None, "x"), 0, 1),
    "splat points": Sharded("splat", (P(None, "x"), P(None, "x")), P(), 1, 1),
    "unweighted rows": Sharded("unweighted", (P(None, "x"),) * 2, P(), 1, 1),
    "splat of a volume, two axes": Sharded(
        "splat of a volume", (P(None, "x", None, "y"),) * 2, P(), 1, 1
    ),
    "sum rows": Sharded("sum", (P(None, "x"),) * 3, P(), 1, 1),
    "average rows": Sharded("average", (P(None, "x"),) * 3, P(), 1, 1),
    "average rows and columns": Sharded("average", (P(None, "x", "y"),) * 3, P(), 1, 1),
    "softmax rows": Sharded("softmax", (P(None, "x"),) * 3, P(), 2, 2),
    "softmax rows and columns": Sharded("softmax", (P(None, "x", "y"),) * 3, P(), 2, 2),
    # Over the channels, the cotangents of what they share are summed: flow and importance.
    "backward_warp channels": Sharded(
        "backward_warp", (P(*CHANNELS, "x"), P()), P(*CHANNELS, "x"), 0, 1
    ),
    "grid_sample channels": Sharded("grid_sample", (P(None, "x"), P()), P(None, "x"), 0, 1),
    "splat channels": Sharded("splat", (P(None, None, "x"), P()), P(*CHANNELS, "x"), 0, 1),
    "sum channels": Sharded("sum", (P(*CHANNELS, "x"), P(), P()), P(*CHANNELS, "x"), 0, 1),
    "average channels": Sharded("average", (P(*CHANNELS, "x"), P(), P()), P(*CHANNELS, "x"), 0, 1),
    "softmax channels": Sharded("softmax", (P(*CHANNELS, "x"), P(), P()), P(*CHANNELS, "x"), 0, 1),
    # Two at once. The cotangents of image and points are sums over different axes: two reductions.
    "gather points and channels": Sharded(
        "gather", (P(None, None, "x"), P("y")), P("y", "x"), 0, 2
    ),
    "backward_warp batch and rows": Sharded(
        "backward_warp", (P("x"), P("x", "y")), P("x", "y"), 0, 1
    ),
    "backward_warp batch and channels": Sharded(
        "backward_warp", (P("x", None, None, "y"), P("x")), P("x", None, None, "y"), 0, 1
    ),
    "average batch and rows": Sharded("average", (P("x", "y"),) * 3, P("x"), 1, 1),
    "average batch and channels": Sharded(
        "average", (P("y", None, None, "x"), P("y"), P("y")), P("y", None, None, "x"), 0, 1
    ),
    "average rows and channels": Sharded(
        "average", (P(None, "x", None, "y"), P(None, "x"), P(None, "x")), P(*CHANNELS, "y"), 1, 2
    ),
    "softmax batch and rows": Sharded("softmax", (P("x", "y"),) * 3, P("x"), 2, 2),
}


def place(mesh, given, specs):
    return [jax.device_put(a, NamedSharding(mesh, s)) for a, s in zip(given, specs, strict=True)]


def mesh_of(kind):
    return jax.make_mesh((4, 2), ("x", "y"), (kind, kind), devices=jax.devices()[:8])


def with_cotangents(function):
    def compute(*arrays):
        out, pull = jax.vjp(function, *arrays)
        return out, pull(jax.tree.map(lambda o: jnp.sin(3 * o), out))

    return compute


@cache
def expected(operation):
    """Results and cotangents by the reference, on one device."""
    function, names = OPERATIONS[operation]
    compute = jax.jit(with_cotangents(partial(function, reference)))
    return remembered(compute, *arrays(*names), name=operation)


def collectives(program, *arrays):
    text = program.lower(*arrays).compile().as_text()
    kinds = r"all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
    return Counter(re.findall(rf"({kinds})(?:-start)?\(", text))


def run(function, placed):
    """What a function gives when jitted, and the collectives in its program."""
    program = jax.jit(function)
    return program(*placed), collectives(program, *placed)


@KINDS
@pytest.mark.parametrize("name", CASES)
def test_equals_the_reference_without_a_gather(name, kind):
    case, mesh = CASES[name], mesh_of(kind)
    with jax.set_mesh(mesh):
        placed = case.place(mesh)
        results, of_forward = run(case.function(), placed)
        both, of_both = run(with_cotangents(case.function()), placed)
    assert (of_forward, of_both) == (
        Counter({"all-reduce": case.forward} if case.forward else {}),
        Counter({"all-reduce": case.both} if case.both else {}),
    )
    wanted = expected(case.operation)
    cases.assert_close((results, both), (wanted[0], wanted), TOLERANCE)
    for x in jax.tree.leaves((results, both[0])):
        spec = NamedSharding(mesh, P(*case.result[: x.ndim]))
        assert x.sharding.is_equivalent_to(spec, x.ndim)
    for ct, primal in zip(both[1], placed, strict=True):  # a cotangent lies as its primal does
        assert ct.sharding.is_equivalent_to(primal.sharding, ct.ndim)


# ---------------------------------------------------------------------------- transformations


class ForwardMode:
    """jaxwarp, with forward_mode=True."""

    def __getattr__(self, name):
        return partial(getattr(jaxwarp, name), forward_mode=True)


def tangents(arrays):
    return tuple(jnp.cos(3 * a) for a in arrays)


def loss(function):
    return lambda *a: sum(jnp.sum(jnp.sin(3 * out)) for out in jax.tree.leaves(function(*a)))


def forward_and_back(function, *a):
    """The tangent map, and its transpose."""
    out, push = jax.linearize(function, *a)
    return push(*tangents(a)), jax.linear_transpose(push, *a)(out)


def hessian_product(function, *a):
    return jax.jvp(jax.grad(loss(function), tuple(range(len(a)))), a, tangents(a))


def vmap_of_gradient(function, *a):
    # Each operand that has a batch is mapped over it; an image or a flow alone is shared.
    axes = tuple(None if x.shape[0] == 1 else 0 for x in a)
    a = [x[0] if axis is None else x for x, axis in zip(a, axes, strict=True)]
    return jax.vmap(jax.grad(loss(function), tuple(range(len(a)))), axes)(*a)


@KINDS
@pytest.mark.parametrize(
    ("name", "transformation", "reductions"),
    [
        ("backward_warp batch and channels", forward_and_back, 1),
        ("backward_warp shared image", hessian_product, 1),
        ("backward_warp shared image", vmap_of_gradient, 0),
        ("backward_warp rows", forward_and_back, 1),
        ("splat points", hessian_product, 1),
        # The tangent of what (5) divides is a second sum: it needs the result of the first, as (6).
        ("average rows", forward_and_back, 2),
        ("average batch and rows", hessian_product, 2),
        ("average batch and channels", vmap_of_gradient, 1),
        ("softmax rows", hessian_product, 3),
        ("softmax rows", vmap_of_gradient, 2),
    ],
    ids=lambda x: getattr(x, "__name__", x),
)
def test_transformations(name, transformation, reductions, kind):
    case, mesh = CASES[name], mesh_of(kind)
    operation, _ = OPERATIONS[case.operation]

    compute = partial(transformation, partial(operation, ForwardMode()))
    with jax.set_mesh(mesh):
        actual, counted = run(compute, case.place(mesh))
    if KERNELS:
        assert counted == Counter({"all-reduce": reductions} if reductions else {})
    assert counted.keys() <= {"all-reduce"}
    cases.assert_close(actual, jax.jit(compute)(*case.arrays), TOLERANCE)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("shared", ["image", "flow"])
def test_half_precision_with_one_of_the_batch_on_each_device(dtype, shared):
    """What the batch shares is summed over the devices, as exactly as on one."""
    names, specs = {
        "image": (("one image", "flow"), (P(), P(BOTH))),
        "flow": (("image", "one flow"), (P(BOTH), P())),
    }[shared]
    given, mesh = [a.astype(dtype) for a in arrays(*names)], mesh_of(AxisType.Auto)
    placed = place(mesh, given, specs)
    for function in (jaxwarp.backward_warp, jaxwarp.forward_warp):
        program = jax.jit(with_cotangents(function))
        actual, one_device = program(*placed), program(*given)
        assert jax.tree.map(lambda x: x.dtype, actual) == jax.tree.map(
            lambda x: x.dtype, one_device
        )
        # Sums of another order: one rounding in the last place.
        cases.assert_close(actual, one_device, 2 * float(jnp.finfo(dtype).eps))


@KINDS
@pytest.mark.parametrize("dtypes", [("bfloat16", "float32"), ("float32", "float64")], ids=str)
@pytest.mark.parametrize("name", ["backward_warp batch", "backward_warp rows", "unweighted rows"])
def test_conversions_gather_nothing(name, dtypes, kind):
    """Where a kernel's dtypes are not those of the arrays."""
    case, mesh = CASES[name], mesh_of(kind)
    given = [a.astype(t) for a, t in zip(case.arrays, dtypes, strict=True)]
    compute = with_cotangents(case.function())
    with jax.set_mesh(mesh):
        actual, counted = run(compute, place(mesh, given, case.specs))
    assert counted == Counter({"all-reduce": case.both} if case.both else {})
    one_device = jax.jit(compute)(*given)
    assert jax.tree.map(lambda x: x.dtype, actual) == jax.tree.map(lambda x: x.dtype, one_device)
    cases.assert_close(actual, one_device, 4 * float(jnp.finfo(dtypes[0]).eps))


# ---------------------------------------------------------------------------- what is gathered


@pytest.mark.parametrize("operation", ["backward_warp", "average"])
def test_sizes_that_the_mesh_does_not_divide(operation):
    """XLA would pad them, and a kernel would count the padding: they are gathered."""
    function, names = OPERATIONS[operation]
    mesh = mesh_of(AxisType.Auto)
    given = [a[:3, :7, :5, ..., :3] if a.ndim == 4 else a[:3, :7, :5] for a in arrays(*names)]
    wanted = jax.jit(with_cotangents(partial(function, reference)))(*given)
    for spec in (P("x"), P(None, "x"), P(None, "x", "y"), P(*CHANNELS, "y")):

        def constrained(*a, spec=spec):
            shardings = [NamedSharding(mesh, P(*spec[: x.ndim])) for x in a]
            a = map(jax.lax.with_sharding_constraint, a, shardings)
            return with_cotangents(partial(function, jaxwarp))(*a)

        cases.assert_close(jax.jit(constrained)(*given), wanted, TOLERANCE)


@KINDS
def test_an_image_sharded_along_its_rows_is_gathered(kind):
    """A position may lie anywhere, so every device needs all of the image: that is one all-gather,
    and the sum of the cotangents. jaxwarp.halo is for images for which this is too much."""
    case, mesh = CASES["backward_warp rows"], mesh_of(kind)
    with jax.set_mesh(mesh):
        placed = place(mesh, case.arrays, (P(None, "x"), P(None, "x")))
        actual, counted = run(with_cotangents(case.function()), placed)
    cases.assert_close(actual, expected(case.operation), TOLERANCE)
    assert counted == {"all-gather": 1, "all-reduce": 1}


@KINDS
def test_operands_that_disagree(kind):
    case, mesh = CASES["backward_warp batch"], mesh_of(kind)
    for specs in ((P("y"), P("x")), (P("x"), P(None, "x")), (P("x"), P()), (P(), P("x"))):
        with jax.set_mesh(mesh):
            actual = jax.jit(with_cotangents(case.function()))(*place(mesh, case.arrays, specs))
        cases.assert_close(actual, expected(case.operation), TOLERANCE)


def test_plain_arrays_under_a_mesh():
    case = CASES["average batch"]
    with jax.set_mesh(mesh_of(AxisType.Auto)):
        actual = jax.jit(with_cotangents(case.function()))(*case.arrays)
    cases.assert_close(actual, expected(case.operation), TOLERANCE)


@KINDS
def test_without_jit(kind):
    case, mesh = CASES["average batch"], mesh_of(kind)
    out, coverage = case.function()(*case.place(mesh))
    assert out.sharding.is_equivalent_to(NamedSharding(mesh, P("x")), out.ndim)
    cases.assert_close((out, coverage), expected(case.operation)[0], TOLERANCE)


# ---------------------------------------------------------------------------- shard_map

SHARD_MAP = {
    "gather": ("gather", (P(), P("x")), P("x")),
    "backward_warp": ("shared image", (P(), P("x")), P("x")),
    "average": ("average", (P("x"), P("x"), P("x")), P("x")),
    "softmax": ("softmax", (P("x"), P("x"), P("x")), P("x")),
    "shared values": ("shared values", (P(), P("x"), P("x")), P("x")),
}
CHECKS = pytest.mark.parametrize(
    ("kind", "check_vma"),
    [(AxisType.Auto, True), (AxisType.Auto, False), (AxisType.Explicit, True)],
    ids=["Auto-checked", "Auto-unchecked", "Explicit-checked"],
)


@CHECKS
@pytest.mark.parametrize("name", SHARD_MAP)
def test_shard_map(name, kind, check_vma):
    """Gradients of a shard_map, and gradients inside one: what every device has is summed."""
    operation, in_specs, out_specs = SHARD_MAP[name]
    function, names = OPERATIONS[operation]
    function, given, mesh = partial(function, jaxwarp), arrays(*names), mesh_of(kind)
    every = tuple(range(len(given)))
    on_mesh = partial(jax.shard_map, mesh=mesh, in_specs=in_specs, check_vma=check_vma)

    def inside(*a):
        if check_vma:
            return jax.grad(lambda *a: jax.lax.psum(loss(function)(*a), "x"), every)(*a)
        # Without it JAX does not know what varies: the user sums the gradient.
        cts = jax.grad(loss(function), every)(*a)
        return tuple(
            jax.lax.psum(ct, "x") if spec == P() else ct
            for ct, spec in zip(cts, in_specs, strict=True)
        )

    def outside(*a):
        return with_cotangents(on_mesh(function, out_specs=out_specs))(*a)

    with jax.set_mesh(mesh):
        placed = place(mesh, given, in_specs)
        both, of_outside = run(outside, placed)
        gradient, of_inside = run(on_mesh(inside, out_specs=in_specs), placed)
    assert {*of_outside, *of_inside} <= {"all-reduce"}
    cases.assert_close(both, expected(operation), TOLERANCE)
    one_device = jax.jit(jax.grad(loss(function), every))(*given)
    cases.assert_close(gradient, one_device, TOLERANCE)


@CHECKS
@pytest.mark.parametrize("operation", ["shared image", "shared values", "softmax of shared values"])
def test_second_order_in_shard_map(operation, kind, check_vma):
    function, names = OPERATIONS[operation]
    function, given, mesh = partial(function, jaxwarp), arrays(*names), mesh_of(kind)
    specs = (P(), P("x"), P("x"))[: len(names)]
    with jax.set_mesh(mesh):
        sharded = jax.shard_map(
            function, mesh=mesh, in_specs=specs, out_specs=P("x"), check_vma=check_vma
        )
        compute = partial(hessian_product, sharded)
        actual, counted = run(compute, place(mesh, given, specs))
    assert set(counted) == {"all-reduce"}
    cases.assert_close(actual, jax.jit(partial(hessian_product, function))(*given), TOLERANCE)


@CHECKS
@pytest.mark.parametrize("operation", ["shared image", "softmax"])
@pytest.mark.filterwarnings("ignore:`with mesh")
def test_shard_map_over_some_of_the_mesh(operation, kind, check_vma):
    """What is sharded over the other axes is gathered, and the values are right."""
    function, names = OPERATIONS[operation]
    given, mesh = arrays(*names), mesh_of(kind)
    in_specs = tuple(P() if a.shape[0] == 1 else P("x") for a in given)
    sharded = partial(
        jax.shard_map,
        partial(function, jaxwarp),
        mesh=mesh,
        in_specs=in_specs,
        out_specs=P("x"),
        axis_names={"x"},
        check_vma=check_vma,
    )
    placed = place(mesh, given, [P(*spec, "y") if spec else spec for spec in in_specs])
    # The old way to name a mesh is one that custom_partitioning sees.
    for old in (False, True) if kind == AxisType.Auto else (False,):
        with mesh if old else jax.set_mesh(mesh):
            actual = jax.jit(with_cotangents(sharded()))(*placed)
        cases.assert_close(actual, expected(operation), TOLERANCE)


def test_a_splat_in_shard_map_is_summed_by_the_user():
    case, mesh = CASES["splat points"], mesh_of(AxisType.Auto)
    local = lambda *a: jax.lax.psum(case.function()(*a), "x")  # noqa: E731
    sharded = jax.shard_map(local, mesh=mesh, in_specs=case.specs, out_specs=P())
    actual, counted = run(with_cotangents(sharded), case.place(mesh))
    assert counted == {"all-reduce": 1}
    cases.assert_close(actual, expected(case.operation), TOLERANCE)


# ---------------------------------------------------------------------------- the private name


def test_the_private_name_is_there():
    assert _sharding._need_devices is not None, (
        "jax._src.dispatch.prim_requires_devices_during_lowering is gone: sharded operands are "
        "gathered now (right, but slower). Find its successor for jaxwarp/_sharding.py."
    )


@KINDS
@pytest.mark.parametrize("name", ["backward_warp batch and channels", "softmax rows"])
def test_without_the_private_name_values_are_right(name, kind, monkeypatch):
    monkeypatch.setattr(_sharding, "_need_devices", None)
    case, mesh = CASES[name], mesh_of(kind)
    with jax.set_mesh(mesh):
        actual, counted = run(with_cotangents(case.function()), case.place(mesh))
    cases.assert_close(actual, expected(case.operation), TOLERANCE)
    assert counted["all-gather"] > 0 or not KERNELS  # the name was in use
