"""What is measured: the list of cases, the arrays of a case, and the bytes that it must move.

Only NumPy is needed here, so that every peer's process builds the same arrays by itself.
"""

import math
from dataclasses import dataclass
from itertools import product

import ml_dtypes
import numpy as np

OPERATIONS = ("backward_warp", "grid_sample", "forward_average", "forward_sum", "forward_softmax")
PASSES = ("value", "flow gradient", "all gradients", "jvp")  # "all": the value and every gradient

# name: shape of the image, shape of the flow. Channels and displacements are last.
SIZES = {
    "24x32x3": ((24, 32, 3), (24, 32, 2)),
    "3 flows of 24x32x3": ((24, 32, 3), (3, 24, 32, 2)),
    "16x16x3": ((16, 16, 3), (16, 16, 2)),
    "64x64x3": ((64, 64, 3), (64, 64, 2)),
    "256x256x1": ((256, 256, 1), (256, 256, 2)),
    "256x256x3": ((256, 256, 3), (256, 256, 2)),
    "256x256x4": ((256, 256, 4), (256, 256, 2)),
    "256x256x64": ((256, 256, 64), (256, 256, 2)),
    "436x1024x3": ((436, 1024, 3), (436, 1024, 2)),
    "1080x1920x3": ((1080, 1920, 3), (1080, 1920, 2)),
    "2160x3840x4": ((2160, 3840, 4), (2160, 3840, 2)),
    "4320x7680x3": ((4320, 7680, 3), (4320, 7680, 2)),
    "8x256x256x64": ((8, 256, 256, 64), (8, 256, 256, 2)),
    "128x128x128x1": ((128, 128, 128, 1), (128, 128, 128, 3)),
    "16 flows of 436x1024x3": ((436, 1024, 3), (16, 436, 1024, 2)),
    "480x640x3": ((1, 480, 640, 3), (1, 480, 640, 2)),
    "8x32x64x3": ((8, 32, 64, 3), (8, 32, 64, 2)),
}
LARGE = ("436x1024x3", "1080x1920x3", "2160x3840x4", "8x256x256x64", "128x128x128x1")
LARGE = (*LARGE, "16 flows of 436x1024x3")
NOTES = ("480x640x3", "8x32x64x3")  # the two sizes of the original notes
TINY = ("16x16x3",)  # its cold figure is the cost of a call
SCALING = ("64x64x3", "256x256x3", "436x1024x3", "1080x1920x3", "4320x7680x3")  # of the plot


@dataclass(frozen=True, kw_only=True)
class Case:
    operation: str
    order: str = "value"  # one of PASSES
    size: str = "1080x1920x3"
    motion: str = "smooth"  # or "random": +-64 pixels; or "zero"
    dtype: str = "float32"  # of the image; the flow is float64 for float64, else float32

    def __str__(self) -> str:
        return f"{self.operation}, {self.order}, {self.size}, {self.motion}, {self.dtype}"

    @property
    def image(self) -> tuple[int, ...]:
        return SIZES[self.size][0]

    @property
    def flow(self) -> tuple[int, ...]:
        return SIZES[self.size][1]

    @property
    def spatial(self) -> tuple[int, ...]:
        return self.flow[-1 - self.flow[-1] : -1]

    @property
    def out(self) -> tuple[int, ...]:
        return (*self.flow[:-1], self.image[-1])

    @property
    def pixels(self) -> int:
        return math.prod(self.flow[:-1])

    @property
    def results(self) -> tuple[str, ...]:
        """What is computed; a name of an input stands for the gradient in it."""
        weight = ("importance",) if self.operation == "forward_softmax" else ()
        return {
            "value": ("out",),
            "flow gradient": ("flow",),
            "all gradients": ("out", "image", "flow", *weight),
            "jvp": ("out", "d_out"),
        }[self.order]

    def bytes(self) -> int:
        """What must be read and written at least, each once."""
        item = np.dtype(self.numpy_dtype).itemsize
        image, out = math.prod(self.image) * item, math.prod(self.out) * item
        flow = math.prod(self.flow) * (8 if self.dtype == "float64" else 4)
        weight = flow // self.flow[-1] if self.operation == "forward_softmax" else 0
        operands = image + flow + weight
        return {
            "value": operands + out,
            "flow gradient": operands + out + flow,
            "all gradients": 2 * (operands + out),
            "jvp": 2 * (operands + out),
        }[self.order]

    @property
    def numpy_dtype(self) -> np.dtype:
        return np.dtype(ml_dtypes.bfloat16 if self.dtype == "bfloat16" else self.dtype)


def of(**choices: tuple[str, ...]) -> list[Case]:
    """The product of the choices for each field of a case."""
    return [Case(**dict(zip(choices, each, strict=True))) for each in product(*choices.values())]


def default() -> list[Case]:
    """Every operation, pass, size, motion and dtype, but not every product of them."""
    warp, average, ends = ("backward_warp",), ("forward_average",), ("value", "all gradients")
    listed = [
        *of(operation=OPERATIONS, order=PASSES[:3]),
        *of(operation=warp, order=("jvp",)),
        *of(operation=warp, order=ends, size=LARGE),
        *of(operation=average, order=ends[1:], size=LARGE),
        *of(operation=average, size=("2160x3840x4", *NOTES)),
        *of(operation=warp + average, order=ends, motion=("random",)),
        *of(operation=warp, motion=("random",), size=("2160x3840x4",)),
        *of(operation=warp + average, motion=("zero",)),
        *of(operation=warp, order=ends, dtype=("bfloat16", "float64")),
        *of(operation=average, order=ends[1:], dtype=("bfloat16", "float64")),
        *of(operation=warp, size=SCALING),
        *of(operation=warp + average, order=ends, size=TINY),
    ]
    return list(dict.fromkeys(listed))


def full() -> list[Case]:
    """All products of operation, pass, size and motion in float32, then the other dtypes."""
    motions = ("smooth", "random")
    listed = [
        *default(),
        *of(operation=OPERATIONS, order=PASSES[:3], size=LARGE, motion=motions),
        *of(operation=("backward_warp",), order=("jvp",), size=LARGE, motion=motions),
        *of(operation=OPERATIONS, order=PASSES[:3], dtype=("bfloat16", "float64")),
    ]
    return list(dict.fromkeys(listed))


def quick() -> list[Case]:
    """A smoke run on tiny images: each operation with its gradients, jvp, dtypes, shared image."""
    tiny = of(operation=OPERATIONS, order=("all gradients",), size=("24x32x3",))
    jvp = Case(operation="backward_warp", order="jvp", size="24x32x3")
    half = Case(operation="backward_warp", size="24x32x3", motion="random", dtype="bfloat16")
    shared = Case(operation="backward_warp", size="3 flows of 24x32x3", dtype="float64")
    return [*tiny, jvp, half, shared]


def gpu() -> list[Case]:
    """The twelve that say most about a GPU in few minutes, the most important ones first."""
    every = "all gradients"
    large, volume, deep = "2160x3840x4", "128x128x128x1", "8x256x256x64"
    return [
        Case(operation="backward_warp", size=large),
        Case(operation="backward_warp", order=every, size=large),
        Case(operation="forward_average"),
        Case(operation="forward_average", order=every),
        Case(operation="backward_warp"),
        Case(operation="backward_warp", order=every),
        Case(operation="forward_average", motion="random"),
        Case(operation="backward_warp", order=every, motion="random"),
        Case(operation="backward_warp", motion="random"),
        Case(operation="forward_softmax", order=every),
        Case(operation="backward_warp", order=every, size=deep),
        Case(operation="backward_warp", order=every, size=volume),
    ]


def inputs(case: Case) -> dict[str, np.ndarray]:
    """image, flow, and where they are used: importance, ct, d_image, d_flow; channels last.

    Displacements, unless zero, are odd multiples of 1/32 pixel. So no position is on a kink, where
    gradients differ by definition, and OpenCV's rounding of weights to 1/32 pixel changes nothing.
    """
    rng = np.random.default_rng(0)
    real = np.float64 if case.dtype == "float64" else np.float32

    def values(shape: tuple[int, ...], shift: float = 0.0) -> np.ndarray:
        array = rng.random(shape, dtype=real)
        array -= shift
        return array.astype(case.numpy_dtype, copy=False)

    if case.motion == "zero":
        flow = np.zeros(case.flow, real)
    elif case.motion == "random":
        flow = rng.random(case.flow, dtype=real) * 128 - 64
    else:
        axes = np.ogrid[tuple(slice(n) for n in case.spatial)]
        phase = sum(axis / n for axis, n in zip(axes, case.spatial, strict=True))
        planes = [8 * np.sin(2 * np.pi * (phase + k / 3)) for k in range(case.flow[-1])]
        flow = np.broadcast_to(np.stack(planes, -1).astype(real), case.flow)
    if case.motion != "zero":
        flow = (2 * np.floor(flow * 16) + 1) / real(32)
    arrays = {"image": values(case.image), "flow": flow}
    if case.operation == "forward_softmax":
        arrays["importance"] = rng.random(case.flow[:-1], dtype=real) * 4
    if "gradient" in case.order:
        arrays["ct"] = values(case.out, 0.5)
    if case.order == "jvp":
        arrays["d_image"] = values(case.image, 0.5)
        arrays["d_flow"] = rng.random(case.flow, dtype=real) - real(0.5)
    return arrays


def positions(flow: np.ndarray) -> np.ndarray:
    """Pixel positions (x, y[, z]) of a flow, exact for the displacements of `inputs`."""
    dims = flow.shape[-1]
    axes = np.meshgrid(*map(np.arange, flow.shape[-1 - dims : -1]), indexing="ij")
    return np.stack(axes[::-1], -1).astype(flow.dtype) + flow


def grid(flow: np.ndarray) -> np.ndarray:
    """The same positions as `torch.nn.functional.grid_sample` takes them, align_corners=False."""
    dims = flow.shape[-1]
    sizes = np.array(flow.shape[-1 - dims : -1][::-1])
    return ((2 * positions(flow).astype(np.float64) + 1) / sizes - 1).astype(flow.dtype)


def per_pixel(case: Case, ct_grid: np.ndarray) -> np.ndarray:
    """The gradient in the flow, of the gradient in `grid`: p = (grid + 1) size / 2 - 1/2."""
    return ct_grid.reshape(case.flow) * (2 / np.array(case.spatial[::-1])).astype(ct_grid.dtype)
