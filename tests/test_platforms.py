"""What runs where there are no kernels: TPU, ROCm, Metal, a GPU with a package built without CUDA,
JAXWARP_KERNELS=0. Programs for another platform are lowered here, and those in plain jnp also run.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.export import DisabledSafetyCheck
from processes import fresh_process

import jaxwarp

CASES = [
    *cases.FEW,
    cases.Case("gather", 2, {"method": "nearest", "boundary": "wrap"}),
    cases.Case("forward_warp", 3, {"reduce": "softmax", "boundary": "reflect"}, weighted=True),
    cases.Case("forward_warp", 2, {"reduce": "average", "return_coverage": True}, weighted=True),
    *(c for c in cases.GRID_SAMPLE if c.dims == 2 and c.options["padding_mode"] == "reflection"),
]
DTYPES = ["bfloat16", "float32", "float64"]
# Sums in another order, as a part of the largest value; of a half type one unit in the last place.
TOLERANCE = {"bfloat16": 2**-7, "float32": 5e-6, "float64": 1e-12}
WITHOUT_KERNELS = ("tpu", "rocm", "METAL")


def value_and_cotangents(case):
    return jax.jit(cases.value_and_cotangents(case.function(jaxwarp)))


def for_tpu(program, *arrays):
    """A program for a platform without kernels, which runs here all the same."""
    checks = [DisabledSafetyCheck.platform()]
    return jax.export.export(program, platforms=["tpu"], disabled_checks=checks)(*arrays)


def targets(program, *arrays, platforms):
    """The names of the custom calls in the StableHLO for other platforms."""
    text = program.trace(*arrays).lower(lowering_platforms=platforms).as_text()
    return set(re.findall(r"custom_call @(\w+)", text))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_program_without_kernels_gives_what_kernels_give(case, dtype):
    arrays, program = case.inputs(dtype=dtype), value_and_cotangents(case)
    exported = for_tpu(program, *arrays)
    assert "custom_call" not in exported.mlir_module()
    cases.assert_close(exported.call(*arrays), program(*arrays), TOLERANCE[dtype])


def tiny_coverage(values, flow):
    return jaxwarp.forward_warp(values, jnp.full_like(flow, 100).at[0, 0].set(flow[0, 0] * 1e-25))


def tiny_importance(values, flow):
    importance = jnp.full(flow.shape[:2], 1e-25, flow.dtype) * (1 + flow[..., 0] ** 2)
    return jaxwarp.forward_warp(values, 0 * flow, importance=importance)


def hidden_nan(values, flow):
    """A NaN behind a logit of -inf, which weighs nothing."""
    logits = flow[..., 1].at[1, 1].set(-jnp.inf)
    values = values.at[1, 1].set(jnp.nan)
    return jaxwarp.forward_warp(values, flow, importance=logits, reduce="softmax")


def hidden_zero(values, flow):
    """The same behind an importance of 0."""
    importance = jnp.abs(flow[..., 1]).at[1, 1].set(0)
    return jaxwarp.forward_warp(values.at[1, 1].set(jnp.nan), flow, importance=importance)


@pytest.mark.parametrize(
    ("function", "second"),
    # In w the second derivative of (5) has 1 / D_j**2, and where w is 0 the value itself.
    [(tiny_coverage, True), (tiny_importance, False), (hidden_nan, True), (hidden_zero, False)],
)
def test_no_infinity_that_kernels_do_not_have(function, second):
    rng = np.random.default_rng(0)
    values = rng.uniform(1, 2, (4, 5, 3)).astype(np.float32)
    flow = rng.uniform(-1, 1, (4, 5, 2)).astype(np.float32)

    def derivatives(values, flow):
        gradient = jax.grad(total(function), (0, 1))
        d = jax.tree.map(jnp.ones_like, (values, flow))
        return jax.jvp(gradient, (values, flow), d) if second else gradient(values, flow)

    program = jax.jit(derivatives)
    found = for_tpu(program, values, flow).call(values, flow)
    expected = program(values, flow)
    for e, f in zip(*map(jax.tree.leaves, (expected, found)), strict=True):
        assert np.isfinite(e).all()
        np.testing.assert_allclose(f, e, rtol=0, atol=1e-4 * np.abs(e).max(initial=1))


def total(function):
    return lambda *arrays: sum((x**2).sum() for x in jax.tree.leaves(function(*arrays)))


def gradient(function):
    return jax.grad(total(function), (0, 1))


DERIVATIVES = {
    "value": lambda function: function,
    "tangent": jax.jacfwd,
    "gradient": gradient,
    "hessian": lambda function: jax.jacfwd(gradient(function)),
    "third": lambda function: gradient(jax.jacfwd(gradient(function))),
}


@pytest.mark.parametrize("order", DERIVATIVES)
@pytest.mark.parametrize("case", cases.FEW, ids=str)
def test_no_derivative_calls_a_kernel(case, order):
    program = jax.jit(DERIVATIVES[order](case.function(jaxwarp, forward_mode=True)))
    arrays = case.inputs(dtype="float32", point_dtype="float32")
    assert targets(program, *arrays, platforms=WITHOUT_KERNELS) == set()


@pytest.mark.parametrize("platform", WITHOUT_KERNELS)
def test_one_platform(platform):
    case = cases.FEW[0]
    assert targets(value_and_cotangents(case), *case.inputs(), platforms=(platform,)) == set()


def test_one_program_for_several_platforms():
    case = cases.Case("forward_warp", options={"reduce": "softmax"}, weighted=True)
    arrays, program = case.inputs(), value_and_cotangents(case)
    exported = jax.export.export(
        program, platforms=["cpu", "tpu", "rocm"], disabled_checks=jaxwarp.export_checks()
    )(*arrays)
    assert "jaxwarp_splat_vjp" in exported.mlir_module()
    again = jax.export.deserialize(exported.serialize())
    assert again.platforms == ("cpu", "tpu", "rocm")
    for a, e in zip(*map(jax.tree.leaves, (again.call(*arrays), program(*arrays))), strict=True):
        np.testing.assert_array_equal(a, e)  # the kernels run here


@pytest.mark.parametrize("boundary", cases.BOUNDARIES)
@pytest.mark.parametrize("op", ["backward_warp", "forward_warp"])
def test_sizes_may_be_symbolic(op, boundary):
    program = value_and_cotangents(cases.Case(op, options={"boundary": boundary}))
    b, h, w = jax.export.symbolic_shape("b, h, w")
    described = [jax.ShapeDtypeStruct((b, h, w, n), np.float64) for n in (3, 2)]
    exported = for_tpu(program, *described)
    rng = np.random.default_rng(0)
    arrays = rng.standard_normal((2, 5, 7, 3)), rng.uniform(-4, 4, (2, 5, 7, 2))
    cases.assert_close(exported.call(*arrays), program(*arrays), TOLERANCE["float64"])


@pytest.mark.parametrize("deterministic", [True, None])
def test_deterministic_sums_are_refused_on_a_gpu_without_kernels(monkeypatch, deterministic):
    monkeypatch.setenv("JAXWARP_DETERMINISTIC", "1")
    case = cases.Case("backward_warp", options={"deterministic": deterministic})
    arrays = case.inputs()
    value = jax.jit(case.function(jaxwarp))
    gradients = value_and_cotangents(case)
    assert targets(value, *arrays, platforms=("rocm",)) == set()  # a gather adds nothing up
    for program in (value, gradients):
        assert targets(program, *arrays, platforms=("tpu",)) == set()  # always deterministic
    with pytest.raises(ValueError, match=r"'rocm'.*no kernels.*pass deterministic=False"):
        targets(gradients, *arrays, platforms=("rocm",))


FOR_CUDA = """
import sys, warnings
sys.modules["jaxwarp._cuda"] = None  # as if built without it
import jax, jax.numpy as jnp, jaxwarp
image, flow = jnp.ones((4, 5, 3)), jnp.zeros((4, 5, 2))
program = jax.jit(jax.grad(lambda image, flow: jaxwarp.forward_warp(image, flow).sum(), (0, 1)))
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(2):
        text = program.trace(image, flow).lower(lowering_platforms=("cuda",)).as_text()
        jax.clear_caches()
print("custom_call" in text, [str(w.message) for w in caught if "jaxwarp" in str(w.message)])
"""


def test_a_package_without_cuda_says_so_once():
    called, warned = fresh_process(FOR_CUDA).split(" ", 1)
    (message,) = eval(warned)
    assert called == "False"
    assert "no CUDA kernels" in message and "install a wheel" in message
    # Whoever has asked for it needs no warning.
    assert fresh_process(FOR_CUDA, JAXWARP_KERNELS="0").strip() == "False []"


def test_without_kernels_no_compiled_module_is_needed():
    code = """
import sys
sys.modules["jaxwarp._cpu"] = sys.modules["jaxwarp._cuda"] = None
import jax, jax.numpy as jnp, jaxwarp
print(jaxwarp.export_checks(), jaxwarp.gather(jnp.arange(6.0).reshape(2, 3, 1), jnp.ones((1, 2))))
"""
    assert fresh_process(code, JAXWARP_KERNELS="0").strip() == "[] [[4.]]"


def test_transformations_without_kernels():
    """Some of them; `make test-plain` runs all, and the values and gradients of every option."""
    folder = Path(__file__).parent
    files = [folder / "test_transforms.py", folder / "test_sharding.py"]
    part = "(hessian and 2d) or (Explicit and average and rows)"
    command = [sys.executable, "-P", "-m", "pytest", "-q", "-n", "0", *files, "-k", part]
    environment = os.environ | {"JAXWARP_KERNELS": "0"}
    run = subprocess.run(
        command, capture_output=True, text=True, timeout=900, env=environment, cwd=folder.parent
    )
    assert run.returncode == 0, run.stdout
    assert int(re.search(r"(\d+) passed", run.stdout)[1]) > 10
