"""Every operation with every option it takes, stated once; all test files draw from here.

A new method, boundary or operation is added to these lists and is then tested like the others.
"""

import math
import mmap
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np

METHODS = ("nearest", "linear", "cubic")
REDUCTIONS = ("sum", "average", "softmax")
AVERAGING = ("nearest", "linear")  # the methods that "average" and "softmax" accept
MODES = ("nearest", "bilinear", "bicubic")
PADDINGS = ("zeros", "border", "reflection")
BOUNDARIES = ("constant", "nearest", "mirror", "reflect", "wrap")
PER_AXIS = {2: ("wrap", "constant"), 3: ("constant", "reflect", "nearest")}  # a boundary for each
DTYPES = ("float16", "bfloat16", "float32", "float64")
INTEGERS = ("bool", "int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64")
SHAPES = {2: (5, 6), 3: (3, 4, 5)}
# For grid_sample, by (dims, align_corners): sizes in which multiples of 1/64 of a pixel are exact
# in normalised coordinates, so that ties and integers are where they are meant to be.
GRID_SHAPES = {(2, True): (5, 9), (2, False): (4, 8), (3, True): (3, 5, 9), (3, False): (2, 4, 8)}
CHANNELS = 3
DERIVATIVES = {
    2: ((0, 0), (1, 0), (0, 1), (1, 1), (2, 0), (0, 3)),
    3: ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 1), (0, 2, 1)),
}


@dataclass(frozen=True)
class Case:
    """One operation, in 2-D or 3-D, with one choice of its options."""

    op: str
    dims: int = 2
    options: dict = field(default_factory=dict)
    weighted: bool = False  # forward_warp with `importance`
    size: tuple | None = None  # of the image, where it is not that of SHAPES

    def __str__(self):
        shown = ("reduce", "method", "boundary", "derivative", "mode", "padding_mode")
        options = [self.options[name] for name in shown if name in self.options]
        options = [o if isinstance(o, str) else "+".join(map(str, o)) for o in options]
        options += ["importance"] * self.weighted
        options += ["aligned"] * self.options.get("align_corners", False)
        return "-".join([self.op, f"{self.dims}d", *options])

    @property
    def shape(self):
        return self.size or SHAPES[self.dims]

    @property
    def arguments(self):
        """The names of the arrays, in the order of `inputs`."""
        if self.op == "grid_sample":
            return "input", "grid"
        first = {"gather": "image", "backward_warp": "image"}.get(self.op, "values")
        second = {"gather": "points", "splat": "points"}.get(self.op, "flow")
        return (first, second, "importance")[: 2 + self.weighted]

    def function(self, module, **more):
        """The operation of `module`, jaxwarp or jaxwarp.reference, as a function of its arrays."""
        op, options = getattr(module, self.op), {**self.options, **more}
        if self.op == "splat":
            return lambda values, points: op(values, points, self.shape, **options)
        if self.weighted:
            return lambda values, flow, w: op(values, flow, importance=w, **options)
        return lambda image, points: op(image, points, **options)

    def inputs(self, kind="mixed", dtype="float64", point_dtype="float64", seed=0):
        """NumPy arrays, with positions of one kind; see `positions`."""
        rng = np.random.default_rng(seed)
        # The flow of backward_warp and the grid of grid_sample have a spatial shape of their own.
        own = (7,) * (self.dims - 1) + (4,)
        where = {"forward_warp": self.shape, "backward_warp": own, "grid_sample": own}
        where = where.get(self.op, (48,))
        image = rng.standard_normal((*(where if self.op == "splat" else self.shape), CHANNELS))
        points = positions(rng, kind, where, self.shape)
        if "flow" in self.arguments:
            points = points - grid(where)
        if self.op == "grid_sample":
            image = np.moveaxis(image, -1, 0)
            points = normalized(points, self.shape, self.options["align_corners"])
        importance = rng.uniform(0.25, 2, where) * (rng.random(where) > 0.2)  # some are 0
        arrays = (image, points, importance)[: len(self.arguments)]
        dtypes = (dtype, point_dtype, dtype)
        return tuple(a.astype(jnp.dtype(t)) for a, t in zip(arrays, dtypes, strict=False))


def grid(shape):
    """Pixel positions (*shape, d), (x, y[, z]), written without the package."""
    return np.moveaxis(np.indices(shape), 0, -1)[..., ::-1].astype(float)


def normalized(points, shape, align_corners):
    """The grid of grid_sample for positions in pixels; on an axis of size 1 nothing is certain."""
    n = np.array(shape[::-1])
    return 2 * points / np.maximum(n - 1, 1) - 1 if align_corners else (2 * points + 1) / n - 1


def positions(rng, kind, where, shape):
    """Positions (*where, d) around an image of spatial `shape`.

    "inside", "random", "integer", "border", "huge", "nonfinite" or "mixed": all of the last five.
    Ordinary ones are multiples of 1/64: exact in float32 and as pixel + flow, and no weight of a
    splat is so small that dividing by it would magnify the rounding.
    """
    size = np.array(shape[::-1])
    draw = {
        "inside": lambda: np.floor(rng.uniform(0, size - 1, (*where, len(shape))) * 64) / 64,
        "random": lambda: np.round(rng.uniform(-3, size + 2, (*where, len(shape))) * 64) / 64,
        "integer": lambda: rng.integers(-3, size + 3, (*where, len(shape))).astype(float),
        "border": lambda: (
            rng.choice([-2, -1, -0.5, 0, 0.5], (*where, len(shape)))
            + rng.choice([0, 1], (*where, len(shape))) * size
        ),
    }
    if kind in draw:
        return draw[kind]()
    p = np.choose(
        rng.choice(4, (*where, len(shape)), p=[0.2, 0.4, 0.2, 0.2]), [f() for f in draw.values()]
    )
    one_axis = rng.integers(len(shape), size=where)[..., None] == np.arange(len(shape))
    huge = rng.choice([1e30, -1e30, 2.0**31, -(2.0**33), 1e9], p.shape)
    nonfinite = rng.choice([np.nan, np.inf, -np.inf], p.shape)
    which = rng.random(where)[..., None]
    if kind == "huge":
        return np.where(one_axis, huge, p)
    if kind == "nonfinite":
        return np.where(one_axis, nonfinite, p)
    assert kind == "mixed", kind
    p = np.where(one_axis & (which < 0.1), huge, p)
    return np.where(one_axis & (which > 0.9), nonfinite, p)


def _options(op, method, boundary, **more):
    fill = {"fill_value": 0.5} if op != "splat" and "constant" in boundary else {}
    return {"method": method, "boundary": boundary, **more, **fill}


def _forward_options(reduce, method, boundary, dims):
    # The coverage is asked for in 3-D and not in 2-D: both ways are compared with the reference.
    options = {"reduce": reduce, "method": method, "boundary": boundary}
    options |= {"return_coverage": True} if dims == 3 else {}
    return options | ({"fill_value": 0.5, "min_coverage": 0.2} if reduce != "sum" else {})


GATHER_AND_SPLAT = [
    Case(op, dims, _options(op, method, boundary, derivative=derivative))
    for op in ("gather", "splat")
    for dims in (2, 3)
    for method in METHODS
    for boundary in BOUNDARIES
    for derivative in DERIVATIVES[dims]
]
BACKWARD_WARP = [
    Case("backward_warp", dims, _options("backward_warp", method, boundary))
    for dims in (2, 3)
    for method in METHODS
    for boundary in BOUNDARIES
]
FORWARD_WARP = [
    Case("forward_warp", dims, _forward_options(reduce, method, boundary, dims), weighted)
    for dims in (2, 3)
    for reduce in REDUCTIONS
    for method in (METHODS if reduce == "sum" else AVERAGING)
    for boundary in BOUNDARIES
    for weighted in ((True,) if reduce == "softmax" else (False, True))
]
GRID_SAMPLE = [
    Case(
        "grid_sample",
        dims,
        {"mode": mode, "padding_mode": padding, "align_corners": align},
        size=GRID_SHAPES[dims, align],
    )
    for dims in (2, 3)
    for mode in MODES
    for padding in PADDINGS
    for align in (False, True)
]
AXES_APART = [
    *(
        Case(op, dims, _options(op, method, PER_AXIS[dims], derivative=derivative))
        for op in ("gather", "splat")
        for dims in (2, 3)
        for method in METHODS
        for derivative in DERIVATIVES[dims][:2]
    ),
    *(
        Case("backward_warp", dims, _options("backward_warp", method, PER_AXIS[dims]))
        for dims in (2, 3)
        for method in METHODS
    ),
    *(
        Case(
            "forward_warp",
            dims,
            _forward_options(reduce, "linear", PER_AXIS[dims], dims),
            reduce == "softmax",
        )
        for dims in (2, 3)
        for reduce in REDUCTIONS
    ),
]
ALL = GATHER_AND_SPLAT + BACKWARD_WARP + FORWARD_WARP + GRID_SAMPLE + AXES_APART
UNDIFFERENTIATED = [case for case in ALL if not any(case.options.get("derivative", ()))]

# One of each kind, for tests that need not meet every combination of options.
FEW = [
    Case("gather", 2, _options("gather", "linear", "constant")),
    Case("gather", 3, _options("gather", "cubic", PER_AXIS[3])),
    Case("splat", 2, _options("splat", "linear", "constant")),
    Case("splat", 3, _options("splat", "cubic", "reflect")),
    Case("backward_warp", 2, _options("backward_warp", "linear", "nearest")),
    Case("backward_warp", 3, _options("backward_warp", "cubic", "constant")),
    Case("forward_warp", 2, _forward_options("sum", "linear", "constant", 2)),
    Case("forward_warp", 2, _forward_options("average", "linear", "constant", 2)),
    Case("forward_warp", 2, _forward_options("average", "linear", "wrap", 2), weighted=True),
    Case("forward_warp", 3, _forward_options("sum", "cubic", "constant", 3), weighted=True),
    Case("forward_warp", 2, _forward_options("softmax", "linear", "constant", 2), weighted=True),
]


def scalar(function):
    """A loss with derivatives of every order."""
    return lambda *arrays: sum(jnp.sum(jnp.sin(out)) for out in jax.tree.leaves(function(*arrays)))


def value_and_cotangents(function):
    """The function, with the cotangents of its arrays where cosines are those of its results."""

    def compute(*arrays):
        out, pull = jax.vjp(function, *arrays)
        ct = jax.tree.map(
            lambda o: jnp.cos(jnp.arange(o.size)).reshape(o.shape).astype(o.dtype), out
        )
        return out, pull(ct)

    return compute


def sparse_image(shape):
    """(array, the same memory as a NumPy array): zeros that take no memory until they are written.

    So an image of more than 2^31 elements costs nothing. Kernels read it where it lies.
    """
    pages = mmap.mmap(
        -1, 2 * math.prod(shape), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000
    )
    host = np.frombuffer(pages, np.float16).reshape(shape)  # 0x4000: MAP_NORESERVE
    image = jax.dlpack.from_dlpack(host)
    assert image.unsafe_buffer_pointer() == host.ctypes.data
    return image, host


LARGE_SHAPES = {2: (50_000, 43_000), 3: (1300, 1310, 1320)}  # more than 2^31 pixels


def assert_close(actual, expected, tolerance):
    """Equal trees, up to `tolerance` times the largest finite value of each expected array."""
    actual, expected = jax.tree.leaves(actual), jax.tree.leaves(expected)
    assert len(actual) == len(expected)
    for a, e in zip(actual, expected, strict=True):
        assert a.shape == e.shape
        a, e = np.asarray(a, np.float64), np.asarray(e, np.float64)
        scale = np.max(np.abs(e), where=np.isfinite(e), initial=1.0)
        np.testing.assert_allclose(a, e, rtol=0, atol=tolerance * scale)
