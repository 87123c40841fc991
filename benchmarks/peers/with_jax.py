"""jaxwarp and its reference, gathers and scatters of XLA, jax's map_coordinates, and the copy that
is the limit of them all."""

import itertools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
from jax.scipy import ndimage

import jaxwarp
from benchmarks import cases
from benchmarks.cases import Case
from benchmarks.peers import ROTATED, Program, Unsupported

COPIED = 2**30  # bytes of the array that is copied on a GPU: many times its cache


def versions() -> dict[str, str]:
    return {
        "jaxwarp": jaxwarp.__version__,
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "device": jax.devices()[0].device_kind,
        "platform": jax.default_backend(),
    }


def build(*, peer: str, case: Case, threads: int) -> Program:
    jax.config.update("jax_enable_x64", case.dtype == "float64")
    if peer == "copy":
        return copy(case, threads)
    if peer == "map_coordinates":
        if (case.operation, case.order) != ("backward_warp", "value"):
            raise Unsupported("values of backward_warp only; its gradients are those of xla")
        return program(batched(map_coordinates, case), case)
    if peer == "xla":
        sampled = case.operation in ("backward_warp", "grid_sample")
        reduce = case.operation.removeprefix("forward_")
        return program(batched(gathers if sampled else partial(scatters, reduce), case), case)
    module = jaxwarp if peer == "jaxwarp" else jaxwarp.reference
    if case.operation == "grid_sample":
        function = partial(module.grid_sample, align_corners=False)
        return program(function, case, normalised=True)
    if case.operation == "backward_warp":
        return program(partial(module.backward_warp, forward_mode=case.order == "jvp"), case)

    def forward_warp(values, flow, importance=None):
        reduce = case.operation.removeprefix("forward_")
        return module.forward_warp(values, flow, reduce=reduce, importance=importance)

    return program(forward_warp, case)


def batched(one: Callable, case: Case) -> Callable:
    if len(case.flow) == case.flow[-1] + 1:
        return one
    axis = 0 if len(case.image) == len(case.flow) else None

    def run(image, flow, *importance):
        return jax.vmap(one, in_axes=(axis, 0, *(0 for _ in importance)))(image, flow, *importance)

    return run


def map_coordinates(image: jax.Array, flow: jax.Array) -> jax.Array:
    points = jaxwarp.reference.pixel_grid(flow.shape[:-1], flow.dtype) + flow
    at = [points[..., axis] for axis in reversed(range(flow.shape[-1]))]
    plane = partial(ndimage.map_coordinates, coordinates=at, order=1, mode="constant")
    return jax.vmap(plane, in_axes=-1, out_axes=-1)(image)


def corners(flow: jax.Array) -> Iterator[tuple[tuple[jax.Array, ...], jax.Array]]:
    points = jaxwarp.reference.pixel_grid(flow.shape[:-1], flow.dtype) + flow
    low = jnp.floor(points)
    part, low = points - low, low.astype(int)
    for corner in itertools.product((0, 1), repeat=flow.shape[-1]):
        weight = jnp.where(np.array(corner, bool), part, 1 - part).prod(-1, keepdims=True)
        yield tuple(jnp.moveaxis(low + np.array(corner), -1, 0)[::-1]), weight


def gathers(image: jax.Array, flow: jax.Array) -> jax.Array:
    """The backward warp in a few lines of jnp: four (eight) gathers."""
    wide = image.astype(flow.dtype)
    get = {"mode": "fill", "fill_value": 0, "wrap_negative_indices": False}
    return sum(g * wide.at[at].get(**get) for at, g in corners(flow)).astype(image.dtype)


def scatters(reduce: str, values: jax.Array, flow: jax.Array, importance=None) -> jax.Array:
    """The forward warp in a few lines of jnp: four (eight) scatters."""
    wide = values.astype(flow.dtype)
    if reduce != "sum":  # a softmax does not change with the maximum subtracted
        peak = 0 if importance is None else jax.lax.stop_gradient(importance.max())
        weight = 1 if importance is None else jnp.exp(importance - peak)[..., None]
        weight = weight * jnp.ones_like(flow[..., :1])
        wide = jnp.concatenate([weight * wide, weight], -1)
    total = jnp.zeros_like(wide)
    for at, g in corners(flow):
        total = total.at[at].add(g * wide, mode="drop", wrap_negative_indices=False)
    if reduce != "sum":
        below = total[..., -1:]
        total = total[..., :-1] / jnp.where(below > 0, below, 1)
    return total.astype(values.dtype)


def differentiated(function: Callable, order: str) -> Callable:
    """(flow, others) -> results, a tuple."""

    def run(flow, others):
        operands = [others["image"], flow]
        operands += [others["importance"]] if "importance" in others else []
        if order == "value":
            return (function(*operands),)
        if order == "jvp":
            return jax.jvp(function, tuple(operands), (others["d_image"], others["d_flow"]))
        if order == "flow gradient":
            _, vjp = jax.vjp(lambda flow: function(operands[0], flow, *operands[2:]), flow)
            return vjp(others["ct"])
        out, vjp = jax.vjp(function, *operands)
        return (out, *vjp(others["ct"]))

    return run


def program(function: Callable, case: Case, *, normalised: bool = False) -> Program:
    """Normalised: the function takes images with channels first and normalised positions."""
    arrays = cases.inputs(case)
    first = -1 - len(case.spatial)
    if normalised:
        arrays["flow"] = cases.grid(arrays["flow"])
        for name in arrays.keys() & {"image", "ct"}:
            arrays[name] = np.moveaxis(arrays[name], -1, first)
    others = jax.tree.map(jnp.array, arrays)
    flow = others.pop("flow")
    run = differentiated(function, case.order)
    call = jax.jit(run)

    def read(results: tuple[jax.Array, ...]) -> list[np.ndarray]:
        found = list(map(np.asarray, results))
        if normalised:
            for k, name in enumerate(case.results):
                gradient = name == "flow"
                found[k] = (
                    cases.per_pixel(case, found[k])
                    if gradient
                    else np.moveaxis(found[k], first, -1)
                )
        return found

    def cold() -> tuple[jax.Array, ...]:
        return jax.block_until_ready(call(flow, others))

    if jax.default_backend() == "cpu":
        return Program(cold=cold, warm=repeated(run, call, flow, others), read=read)
    return Program(cold=cold, warm=rotated(run, flow, others), read=read, work=ROTATED)


def repeated(
    run: Callable, call: Callable, flow: jax.Array, others: dict[str, jax.Array]
) -> Callable:
    """Calls in a loop of XLA, for a CPU. `call` is the jitted `run`."""

    # Each turn takes a number of the last result into the flow, times 0: so no turn can be left
    # out, and the flow and the results stay in their (donated) buffers. The barrier keeps the
    # number out of the update, which XLA would else fuse with it, and then copy the whole flow.
    @partial(jax.jit, donate_argnums=1)
    def loop(count, state, others):
        def turn(_, state):
            flow, results = state
            last = results[0][(0,) * results[0].ndim].astype(flow.dtype)
            corner = (0,) * flow.ndim
            number = jax.lax.optimization_barrier(flow[corner] + 0 * last)
            flow = jax.lax.dynamic_update_slice(flow, number.reshape((1,) * flow.ndim), corner)
            return flow, run(flow, others)

        return jax.lax.fori_loop(0, count, turn, state)

    state = None

    def warm(count: int) -> tuple[jax.Array, ...]:
        nonlocal state
        if state is None:
            state = flow + 0, call(flow, others)
        state = jax.block_until_ready(loop(count, state, others))
        return state[1]

    return warm


def rotated(run: Callable, flow: jax.Array, others: dict[str, jax.Array]) -> Callable:
    """Calls on inputs in rotation, for a GPU: enqueued one after the other, waited for at the end.

    The results of the last turn are donated to the next: so the addresses stay, and a CUDA graph
    that XLA may have made of the calls needs no update.
    """
    inputs = [jax.tree.map(jnp.copy, (flow, others)) for _ in range(ROTATED)]

    @partial(jax.jit, donate_argnums=1, keep_unused=True)
    def turn(inputs, results):
        return [run(*each) for each in inputs]

    results = None

    def warm(count: int) -> tuple[jax.Array, ...]:
        nonlocal results
        if results is None:
            shapes = jax.eval_shape(turn, inputs, None)
            results = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        for _ in range(count):
            results = turn(inputs, results)
        return jax.block_until_ready(results)[-1]

    return warm


def copy(case: Case, threads: int) -> Program:
    """Reads and writes as many bytes as the case must, half of them each.

    Cold: a jitted negation (a jitted copy is left out by XLA). Warm: NumPy's copy in threads on a
    CPU; on a GPU the negation of an array of 1 GiB, of which the case takes its share of time.
    """
    source = jnp.ones(case.bytes() // 8, jnp.float32)
    call = jax.jit(jnp.negative)
    work = 1.0
    if jax.default_backend() == "cpu":
        parts = np.array_split(np.array(source), threads)
        targets = [part.copy() for part in parts]
        pool = ThreadPoolExecutor(threads)

        def repeat(count, part, target):
            for _ in range(count):
                np.copyto(target, part)

        def warm(count: int) -> None:
            list(pool.map(partial(repeat, count), parts, targets))

    else:
        large = jnp.ones(COPIED // 4, jnp.float32)
        work = 2 * COPIED / case.bytes()

        def warm(count: int) -> None:
            for _ in range(count):
                result = call(large)
            jax.block_until_ready(result)

    return Program(
        cold=lambda: jax.block_until_ready(call(source)),
        warm=warm,
        read=lambda results: [],
        work=work,
    )
