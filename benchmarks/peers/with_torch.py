"""PyTorch: grid_sample in both memory layouts, an index_add splat, and torch.compile on a GPU.

Each at its best: the normalised grid is made beforehand, a shared image is sampled by one tall
grid, and grid_sample's backward kernel is called directly, for the gradients asked for alone.
"""

import itertools
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from benchmarks import cases
from benchmarks.cases import Case
from benchmarks.peers import ROTATED, Program, Unsupported

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BILINEAR_ZEROS = 0, 0, False  # mode, padding, align_corners of the aten operators


def versions() -> dict[str, str]:
    return {"torch": torch.__version__}


def build(*, peer: str, case: Case, threads: int) -> Program:
    torch.set_num_threads(threads)
    splat = case.operation.startswith("forward_")
    if case.order == "jvp":
        raise Unsupported("grid_sample has no forward-mode derivative")
    if case.dtype == "bfloat16":
        raise Unsupported("image and positions of one dtype, and bfloat16 holds no positions")
    if peer == "torch.compile" and DEVICE == "cpu":
        raise Unsupported("measured on a GPU only")
    if peer != "torch.compile" and splat != (peer == "torch index_add"):
        raise Unsupported("splats only" if peer == "torch index_add" else "samples only")
    if peer == "torch.compile" and not splat and case.order != "value":
        raise Unsupported("gradients of samples are those of the kernel")
    bind, read = splatting(case, peer) if splat else sampling(case, peer)
    inputs = cases.inputs(case)
    calls = [
        bind({name: torch.tensor(array, device=DEVICE) for name, array in inputs.items()})
        for _ in range(ROTATED if DEVICE == "cuda" else 1)
    ]

    def wait(results: list[Tensor]) -> list[Tensor]:
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        return results

    def warm(count: int) -> list[Tensor]:
        for _ in range(count):
            for call in calls:
                results = call()
        return wait(results)

    return Program(cold=lambda: wait(calls[0]()), warm=warm, read=read, work=len(calls))


def detached(results: list[Tensor]) -> list[np.ndarray]:
    return [result.detach().cpu().numpy() for result in results]


def sampling(case: Case, peer: str) -> tuple[Callable, Callable]:
    """What binds the calls to arrays, and what reads their results."""
    dims = len(case.spatial)
    # The flows of a shared image stand on top of each other: one image, one tall grid.
    batch = 1 if len(case.flow) > len(case.image) else -1
    tall = (-1, *case.spatial[1:]) if batch == 1 else case.spatial
    layout = torch.channels_last if dims == 2 else torch.channels_last_3d
    if peer != "torch channels_last":
        layout = torch.contiguous_format

    def first(array: Tensor, spatial: tuple[int, ...]) -> Tensor:
        array = array.reshape(batch, *spatial, array.shape[-1]).movedim(-1, 1)
        return array.contiguous(memory_format=layout)

    forward = getattr(torch.ops.aten, f"grid_sampler_{dims}d").default
    backward = getattr(torch.ops.aten, f"grid_sampler_{dims}d_backward").default
    if peer == "torch.compile":
        forward = torch.compile(forward)

    def bind(arrays: dict[str, Tensor]) -> Callable:
        at = torch.tensor(cases.grid(arrays["flow"].cpu().numpy()), device=DEVICE)
        at = at.reshape(batch, *tall, dims)
        image = first(arrays["image"], case.spatial)
        ct = first(arrays["ct"], tall) if "ct" in arrays else None

        @torch.no_grad()
        def call() -> list[Tensor]:
            wanted = [name in case.results for name in ("image", "flow")]
            out = [forward(image, at, *BILINEAR_ZEROS)] if "out" in case.results else []
            grads = backward(ct, image, at, *BILINEAR_ZEROS, wanted) if any(wanted) else ()
            return [*out, *(g for g, asked in zip(grads, wanted, strict=False) if asked)]

        return call

    def read(results: list[Tensor]) -> list[np.ndarray]:
        shapes = {"out": case.out, "image": case.image}
        return [
            cases.per_pixel(case, result.cpu().numpy())
            if name == "flow"
            else result.movedim(1, -1).reshape(shapes[name]).cpu().numpy()
            for name, result in zip(case.results, results, strict=True)
        ]

    return bind, read


def splatting(case: Case, peer: str) -> tuple[Callable, Callable]:
    """What binds the calls to arrays, and what reads their results."""
    dims, spatial = len(case.spatial), case.spatial
    reduce = case.operation.removeprefix("forward_")
    axes = torch.meshgrid(*(torch.arange(n, device=DEVICE) for n in spatial), indexing="ij")
    home = torch.stack(axes[::-1], -1).reshape(1, -1, dims)
    pixels = home.shape[1]
    strides = [int(np.prod(spatial[dims - axis :])) for axis in range(dims)]  # of x, y[, z]
    limits = spatial[::-1]

    def splat(values: Tensor, flow: Tensor, importance: Tensor | None = None) -> Tensor:
        flow = flow.reshape(-1, pixels, dims)
        values = values.reshape(-1, pixels, values.shape[-1]).expand(len(flow), -1, -1)
        if importance is not None:  # a softmax does not change with the maximum subtracted
            weight = torch.exp(importance - importance.max()).reshape(*flow.shape[:2], 1)
            values = torch.cat([values * weight, weight], -1)
        elif reduce == "average":
            values = torch.cat([values, torch.ones_like(values[..., :1])], -1)
        points = home + flow
        low = points.detach().floor()
        part, low = points - low, low.long()
        channels = values.shape[-1]
        total = values.new_zeros(len(flow) * pixels, channels)
        base = torch.arange(len(flow), device=DEVICE)[:, None] * pixels
        for corner in itertools.product((0, 1), repeat=dims):
            weight, index, inside = 1, base, True
            for axis, bit in enumerate(corner):
                weight = weight * (part[..., axis] if bit else 1 - part[..., axis])
                at = low[..., axis] + bit
                inside = inside & (at >= 0) & (at < limits[axis])
                index = index + at * strides[axis]
            weight = torch.where(inside, weight, 0)[..., None]
            index = torch.where(inside, index, 0).reshape(-1)
            total = total.index_add(0, index, (weight * values).reshape(-1, channels))
        if reduce != "sum":
            below = total[:, -1:]
            total = total[:, :-1] / torch.where(below > 0, below, 1)
        return total.reshape(case.out)

    function = torch.compile(splat) if peer == "torch.compile" else splat

    def bind(arrays: dict[str, Tensor]) -> Callable:
        operands = [arrays[name] for name in ("image", "flow", "importance") if name in arrays]
        wanted = {"value": [], "flow gradient": operands[1:2]}.get(case.order, operands)
        for operand in wanted:
            operand.requires_grad_()

        def call() -> list[Tensor]:
            with torch.set_grad_enabled(bool(wanted)):
                out = function(*operands)
            grads = torch.autograd.grad(out, wanted, arrays["ct"]) if wanted else ()
            return [*grads] if case.order == "flow gradient" else [out, *grads]

        return call

    return bind, detached
