"""What XLA is given: no copies of shared operands, no grids, and only the cotangents asked for."""

import math
import re
from collections import Counter
from functools import partial

import cases
import jax
import numpy as np
import pytest

import jaxwarp
from jaxwarp import _ffi

IMAGE, FLOW, BATCH = (11, 13, 3), (7, 9, 2), 5
# Instructions that only name a buffer.
NAMES = {"parameter", "bitcast", "get-tuple-element", "tuple"}


@pytest.fixture(autouse=True)
def optimised():
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


def compiled(function, *arrays):
    """[(instruction, custom-call target or "", sizes of its results)] of the optimised program.

    The bodies of fusions are left out: what stands in them is not a buffer.
    """
    text = jax.jit(function).lower(*arrays).compile().as_text()
    instructions, fused = [], False
    for line in text.splitlines():
        if line.endswith("{"):
            fused = "fused" in line
        found = re.match(r"\s+(?:ROOT )?%?\S+ = (\(.*?\)|\S+) ([a-z][a-z0-9-]*)\(", line)
        if found and not fused:
            shapes = re.findall(r"[a-z]+\d*\[([\d,]*)\]", found[1])
            sizes = [math.prod(map(int, filter(None, s.split(",")))) for s in shapes]
            target = re.search(r'custom_call_target="([^"]*)"', line)
            instructions.append((found[2], target[1] if target else "", sizes))
    assert instructions
    return instructions


def made(instructions, *shape):
    """How many buffers of that size the program makes."""
    size = math.prod(shape)
    return sum(sizes.count(size) for name, _, sizes in instructions if name not in NAMES)


def calls(instructions):
    return Counter(target for _, target, _ in instructions if target)


def arrays(*shapes, dtype="float32"):
    rng = np.random.default_rng(0)
    return [rng.standard_normal(shape).astype(dtype) for shape in shapes]


def cotangents(function, wanted):
    """A function of (cotangent, arrays): the cotangents of those arrays that are wanted."""

    def run(ct, *arrays):
        def of_wanted(*some):
            every = list(arrays)
            for i, a in zip(wanted, some, strict=True):
                every[i] = a
            return function(*every)

        return jax.vjp(of_wanted, *(arrays[i] for i in wanted))[1](ct)

    return run


def test_the_way_of_counting_finds_a_copy():
    image, flow = arrays(IMAGE, (BATCH, *FLOW))

    def copies(image, flow):
        every = jax.numpy.broadcast_to(image, (BATCH, *IMAGE)) + 1
        return jax.vmap(jaxwarp.backward_warp)(every, flow)

    assert made(compiled(copies, image, flow), BATCH, *IMAGE) == 1


@pytest.mark.parametrize("case", cases.FEW, ids=str)
def test_a_call_is_one_kernel_and_nothing_else(case):
    # No grid of positions, no channel of ones, no concatenation, no division outside.
    inputs = case.inputs(dtype="float32", point_dtype="float32")
    instructions = compiled(case.function(jaxwarp), *inputs)
    assert {name for name, _, _ in instructions} <= NAMES | {"custom-call"}
    assert calls(instructions).total() == 1


@pytest.mark.parametrize("case", cases.FEW, ids=str)
def test_a_jvp_is_two_kernels_and_nothing_else(case):
    inputs = case.inputs(dtype="float32", point_dtype="float32")
    warp = case.function(jaxwarp, forward_mode=True)
    instructions = compiled(lambda x, d: jax.jvp(warp, x, d), inputs, inputs)
    assert {name for name, _, _ in instructions} <= NAMES | {"custom-call"}
    kernel = "gather" if case.op in ("gather", "backward_warp") else "splat"
    assert calls(instructions) == {f"jaxwarp_{kernel}": 1, f"jaxwarp_{kernel}_tangent": 1}


@pytest.mark.parametrize("reduce", [None, *cases.REDUCTIONS])
def test_the_transpose_of_an_adjoint_is_one_kernel(reduce):
    """In its cotangent, as in a gradient of a gradient."""
    image, flow, w, ct = arrays(IMAGE, (*IMAGE[:2], 2), IMAGE[:2], IMAGE)

    def warp(image, flow, w):
        if reduce is None:
            return jaxwarp.backward_warp(image, flow)
        return jaxwarp.forward_warp(image, flow, importance=w, reduce=reduce)

    def transposed(image, flow, w, ct, d):
        _, pull = jax.vjp(warp, image, flow, w)
        return jax.linear_transpose(pull, ct)(d)

    some = compiled(transposed, image, flow, w, ct, (image, flow, w))
    tangent = "jaxwarp_gather_tangent" if reduce is None else "jaxwarp_splat_tangent"
    assert calls(some)[tangent] == 1
    assert calls(some).total() == (2 if reduce in ("average", "softmax") else 1)  # and (5)


def test_second_order_of_a_gather_is_a_few_kernels():
    image, flow, ct = arrays(IMAGE, (*IMAGE[:2], 2), IMAGE)

    def pulled(image, flow, ct):
        return jax.vjp(jaxwarp.backward_warp, image, flow)[1](ct)

    def forward(every, d):
        return jax.jvp(pulled, every, d)

    def reverse(every, cts):
        return jax.vjp(pulled, *every)[1](cts)

    every = (image, flow, ct)
    assert calls(compiled(forward, every, every)) == {
        "jaxwarp_gather_vjp": 1,
        "jaxwarp_gather_vjp_tangent": 1,
        "jaxwarp_splat_tangent": 1,
    }
    found = calls(compiled(reverse, every, (image, flow)))
    assert found["jaxwarp_gather_vjp_tangent"] == 1 and found.total() <= 4


def test_tangents_do_not_copy_a_shared_image():
    image, flow, d = arrays(IMAGE, FLOW, (BATCH, *FLOW))

    def push(image, flow, d):
        warp = partial(jaxwarp.backward_warp, image, forward_mode=True)
        return jax.jvp(warp, (flow,), (d,))[1]

    instructions = compiled(jax.vmap(push, (None, None, 0)), image, flow, d)
    assert made(instructions, *IMAGE) == made(instructions, BATCH, *IMAGE) == 0
    assert made(instructions, BATCH, *FLOW) == 0
    assert calls(instructions) == {"jaxwarp_gather_tangent": 1}


def test_vmap_does_not_copy_a_shared_image():
    image, flow, ct = arrays(IMAGE, (BATCH, *FLOW), (BATCH, *FLOW[:2], 3))
    warp = jax.vmap(jaxwarp.backward_warp, (None, 0))
    instructions = compiled(warp, image, flow)
    assert made(instructions, *IMAGE) == made(instructions, BATCH, *IMAGE) == 0
    assert calls(instructions) == {"jaxwarp_gather": 1}

    # The leading axes of the operation mean the same.
    instructions = compiled(jaxwarp.backward_warp, image, flow)
    assert made(instructions, *IMAGE) == made(instructions, BATCH, *IMAGE) == 0

    instructions = compiled(cotangents(warp, [0, 1]), ct, image, flow)
    assert made(instructions, *IMAGE) == 1  # its cotangent, summed over the batch
    assert made(instructions, BATCH, *IMAGE) == 0
    assert calls(instructions) == {"jaxwarp_gather_vjp": 1}


def test_vmap_does_not_copy_a_shared_flow():
    image, flow, ct = arrays((BATCH, *IMAGE), FLOW, (BATCH, *FLOW[:2], 3))
    warp = jax.vmap(jaxwarp.backward_warp, (0, None))
    assert made(compiled(warp, image, flow), BATCH, *FLOW) == 0
    instructions = compiled(cotangents(warp, [0, 1]), ct, image, flow)
    assert made(instructions, *FLOW) == 1
    assert made(instructions, BATCH, *FLOW) == 0


@pytest.mark.parametrize("reduce", cases.REDUCTIONS)
def test_vmap_does_not_copy_shared_values(reduce):
    values, flow, w, ct = arrays(IMAGE, (BATCH, *IMAGE[:2], 2), IMAGE[:2], (BATCH, *IMAGE))

    def one(values, flow, w):
        return jaxwarp.forward_warp(values, flow, importance=w, reduce=reduce)

    warp, divides = jax.vmap(one, (None, 0, None)), reduce != "sum"
    planes = {"sum": 0, "average": 2, "softmax": 3}[reduce]  # that (6) needs
    instructions = compiled(warp, values, flow, w)
    assert made(instructions, *IMAGE) == made(instructions, *IMAGE[:2]) == 0
    assert made(instructions, BATCH, *IMAGE) == 1  # the result
    assert made(instructions, BATCH, *IMAGE[:2]) <= planes
    instructions = compiled(cotangents(warp, [0, 1, 2]), ct, values, flow, w)
    assert made(instructions, *IMAGE) == made(instructions, *IMAGE[:2]) == 1
    assert made(instructions, BATCH, *IMAGE) == divides
    assert made(instructions, BATCH, *IMAGE[:2]) == planes


def test_nested_vmap_does_not_copy_a_shared_image():
    image, flow, ct = arrays(IMAGE, (2, BATCH, *FLOW), (2, BATCH, *FLOW[:2], 3))
    warp = jax.vmap(jax.vmap(jaxwarp.backward_warp, (None, 0)), (None, 0))
    instructions = compiled(cotangents(warp, [0, 1]), ct, image, flow)
    assert made(instructions, *IMAGE) == 1
    assert made(instructions, BATCH, *IMAGE) == made(instructions, 2 * BATCH, *IMAGE) == 0


def test_gradient_in_the_flow_alone_makes_no_image():
    image, flow, ct = arrays(IMAGE, FLOW, (*FLOW[:2], 3))
    instructions = compiled(cotangents(jaxwarp.backward_warp, [1]), ct, image, flow)
    assert made(instructions, *IMAGE) == 0
    assert made(instructions, *FLOW) == 1
    assert calls(instructions).total() == 1
    assert "jaxwarp_splat" not in calls(instructions)

    # The same through a loss, as flows are fitted.
    def loss(flow, image, target):
        return ((jaxwarp.backward_warp(image, flow) - target) ** 2).sum()

    instructions = compiled(jax.grad(loss), flow, image, ct)
    assert made(instructions, *IMAGE) == 0
    assert calls(instructions) == {"jaxwarp_gather": 1, "jaxwarp_gather_vjp": 1}


def test_gradient_in_the_image_alone_makes_no_flow():
    image, flow, ct = arrays(IMAGE, FLOW, (*FLOW[:2], 3))
    instructions = compiled(cotangents(jaxwarp.backward_warp, [0]), ct, image, flow)
    assert made(instructions, *IMAGE) == 1
    assert made(instructions, *FLOW) == 0
    assert calls(instructions).total() == 1


@pytest.mark.parametrize("wanted", [[0], [1], [2], [0, 2], [0, 1, 2]], ids=str)
@pytest.mark.parametrize("reduce", cases.REDUCTIONS)
def test_forward_warp_makes_only_the_cotangents_asked_for(reduce, wanted):
    shape = IMAGE[:2]
    shapes = {0: IMAGE, 1: (*shape, 2), 2: shape}
    ct, *inputs = arrays(IMAGE, *shapes.values())
    inputs[2] = abs(inputs[2])

    def warp(values, flow, w):
        return jaxwarp.forward_warp(values, flow, importance=w, reduce=reduce)

    instructions = compiled(cotangents(warp, wanted), ct, *inputs)
    forward = reduce != "sum"  # (6) needs its result, and planes of weights
    assert made(instructions, *IMAGE) == (0 in wanted) + forward
    assert made(instructions, *shapes[1]) == (1 in wanted)
    assert made(instructions, *shape) <= (2 in wanted) + 3 * forward
    assert calls(instructions).total() == 1 + forward


@pytest.mark.skipif("cuda" not in _ffi.MODULES, reason="built without CUDA")
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_deterministic_sums_take_memory_on_a_gpu_alone(dtype):
    """3 words of float32 sums, 6 of float64, in a buffer of the program; without sums, none."""
    image, flow = arrays(IMAGE, FLOW, dtype=dtype)
    values, own = arrays((*FLOW[:2], 3), FLOW, dtype=dtype)

    def scratch(platform, function, *arrays):
        traced = jax.jit(partial(function, deterministic=True)).trace(*arrays)
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        assert ("deterministic = true" in text) == (platform == "cuda")
        return [int(n) for n in set(re.findall(r"tensor<(\d+)xui32>", text))]

    def image_gradient(image, flow, deterministic):
        def loss(image):
            return (jaxwarp.backward_warp(image, flow, deterministic=deterministic) ** 2).sum()

        return jax.grad(loss)(image)

    words, pixels = (3 if dtype == "float32" else 6), math.prod(FLOW[:2])
    assert scratch("cuda", jaxwarp.forward_warp, values, own) == [words * pixels * 4]  # coverage
    assert scratch("cuda", image_gradient, image, flow) == [words * math.prod(IMAGE)]
    assert scratch("cuda", jaxwarp.backward_warp, image, flow) == []
    for function, operands in (
        (jaxwarp.forward_warp, (values, own)),
        (image_gradient, (image, flow)),
    ):
        assert scratch("cpu", function, *operands) == []
