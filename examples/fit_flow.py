"""Fit a dense optical flow between two frames, coarse to fine: first(q) = second(q + flow[q]).

    python examples/fit_flow.py A B --out DIR    # two image files of one size
    python examples/fit_flow.py --out DIR        # scikit-image's stereo pair, whose truth is known

Writes DIR/flow.png and DIR/flow.npz: `flow`, float32 (H, W, 2), (x, y) in pixels.
"""

import argparse
import time
from functools import partial
from importlib.resources import files
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import skimage.io
from matplotlib.figure import Figure
from skimage.util import img_as_float32
from tqdm import tqdm

import jaxwarp

SMOOTHNESS = 0.4  # weight of the smoothness term
GRADIENT = 4.0  # weight of the image gradients beside the colours, which lighting changes more
EDGE = 10.0  # how quickly an edge in the first frame releases the flow
SOFT_COLOUR = 0.003  # below these the Charbonnier penalty is quadratic: colours in [0, 1] ...
SOFT_FLOW = 0.03  # ... and flow in pixels
LEARNING_RATE = 0.3  # pixels per step, of each level's own pixels
FACTOR = 1.5  # between levels; 2 loses more of the thin structures
COARSEST = 12  # shortest side of the coarsest level, pixels
CHUNK = 10  # steps inside one compiled loop, between two updates of the bar


# ---- frames -------------------------------------------------------------------------------------


def read_image(path):
    """An image file as float32 (H, W, 3) in [0, 1]."""
    if not Path(path).is_file():
        raise ValueError(f"{path}: expected an image file, got no such file; check the path")
    try:
        image = skimage.io.imread(path)
    except Exception as error:  # each decoder has exceptions of its own
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"{path}: expected a readable image, got '{reason}'; pass a PNG, JPEG or TIFF file"
        ) from error
    image = image[..., None] if image.ndim == 2 else image
    if image.ndim != 3 or image.shape[2] > 4 or min(image.shape[:2]) < 8:
        raise ValueError(
            f"{path}: expected one grey or colour image of at least 8x8 pixels, "
            f"got an array of shape {image.shape}; pass a single frame"
        )
    colours = img_as_float32(image)[..., : 3 if image.shape[2] > 2 else 1]  # without alpha
    return np.broadcast_to(colours, (*image.shape[:2], 3))


def read_pair(first_path, second_path):
    """Two image files of one size."""
    first, second = read_image(first_path), read_image(second_path)
    if first.shape != second.shape:
        raise ValueError(
            f"{second_path}: expected the first frame's size {size(first)}, "
            f"got {size(second)}; crop or resize one of the two"
        )
    return first, second


def motorcycle():
    """Two real views and the true flow, NaN where unknown (Middlebury 2014, in scikit-image)."""
    folder = Path(str(files("skimage"))) / "data"  # by path: nothing can be downloaded
    first, second = read_pair(folder / "motorcycle_left.png", folder / "motorcycle_right.png")
    with np.load(folder / "motorcycle_disp.npz") as archive:
        disparity = archive["arr_0"]
    x = np.where(np.isfinite(disparity), -disparity, np.nan)  # left(x) = right(x - disparity)
    return first, second, np.stack([x, np.zeros_like(x)], axis=-1)


def size(image):
    return f"{image.shape[0]}x{image.shape[1]}"


# ---- coarse to fine -----------------------------------------------------------------------------


def pyramid_shapes(shape):
    """(H, W) of every level, coarsest first."""
    shapes = [tuple(shape)]
    while min(shapes[-1]) / FACTOR >= COARSEST:
        shapes.append(tuple(round(n / FACTOR ** len(shapes)) for n in shape))
    return shapes[::-1]


@partial(jax.jit, static_argnames="shape")
def resize_image(image, shape):
    return jax.image.resize(image, (*shape, image.shape[-1]), "linear", antialias=True)


@partial(jax.jit, static_argnames="shape")
def resize_flow(flow, shape):
    """The same motion on another grid: the vectors scale with the axes."""
    (h, w), (old_h, old_w) = shape, flow.shape[:2]
    scale = jnp.array([w / old_w, h / old_h], flow.dtype)
    return jax.image.resize(flow, (h, w, 2), "linear") * scale


# ---- objective ----------------------------------------------------------------------------------


def features(image):
    """(H, W, 9): colours and their weighted gradients, all warped together as channels."""
    dy, dx = jnp.gradient(image, axis=(0, 1))
    return jnp.concatenate([image, GRADIENT * dx, GRADIENT * dy], axis=-1)


def edge_weights(image):
    """Weights of the flow's jumps along y and x: small across an edge of the image."""
    return [jnp.exp(-EDGE * jnp.abs(jnp.diff(image, axis=a)).mean(-1)) for a in (0, 1)]


def objective(flow, first, second, edges):
    """Robust difference of first and warped second, plus edge-aware smoothness of the flow."""
    difference = jaxwarp.backward_warp(second, flow, boundary="nearest") - first
    photometric = jnp.sqrt(difference**2 + SOFT_COLOUR**2).sum(-1).mean()
    smoothness = 0.0
    for axis, weight in enumerate(edges):
        jump = jnp.diff(flow, axis=axis)
        smoothness += (weight * jnp.sqrt((jump**2).sum(-1) + SOFT_FLOW**2)).mean()
    return photometric + SMOOTHNESS * smoothness


def fit(first, second, *, steps=100, objective=objective, progress=True):
    """Yields the flow of every level, coarsest first; the last has the frames' size."""
    optimizer = optax.adam(optax.cosine_decay_schedule(LEARNING_RATE, steps, alpha=0.05))

    @jax.jit
    def advance(flow, state, *frames):
        def step(carry, _):
            flow, state = carry
            value, gradient = jax.value_and_grad(objective)(flow, *frames)
            updates, state = optimizer.update(gradient, state)
            return (optax.apply_updates(flow, updates), state), value

        (flow, state), values = jax.lax.scan(step, (flow, state), length=CHUNK)
        return flow, state, values[-1]

    @partial(jax.jit, static_argnames="shape")
    def start(flow, first, second, shape):
        flow = resize_flow(flow, shape)
        a, b = resize_image(first, shape), resize_image(second, shape)
        return flow, optimizer.init(flow), features(a), features(b), edge_weights(a)

    shapes = pyramid_shapes(first.shape[:2])
    flow = jnp.zeros((*shapes[0], 2), jnp.float32)
    for shape in shapes:
        flow, state, *frames = start(flow, first, second, shape)
        label = size(flow).rjust(9)
        with tqdm(total=steps, desc=label, unit="step", leave=False, disable=not progress) as bar:
            for done in range(0, steps, CHUNK):
                flow, state, value = advance(flow, state, *frames)
                bar.set_postfix(objective=f"{value:.4f}", refresh=False)
                bar.update(min(CHUNK, steps - done))
        yield flow


# ---- report -------------------------------------------------------------------------------------


warp = jax.jit(partial(jaxwarp.backward_warp, boundary="nearest"))


def grey_levels(first, other):
    """(H, W): absolute difference, averaged over colours, in grey levels of 255."""
    return 255 * np.abs(first - np.asarray(other)).mean(-1)


def measure(first, second, flow, truth=None):
    """Errors of a flow of any level at full size; end-point errors (px) where truth is known."""
    flow = resize_flow(flow, first.shape[:2])
    found = {"photometric": grey_levels(first, warp(second, flow)).mean()}
    if truth is not None:
        error = np.linalg.norm(flow - truth, axis=-1)
        error = error[np.isfinite(error)]
        found |= {"median": np.median(error), "mean": error.mean()}
        found |= {f"under {limit} px": (error < limit).mean() for limit in (1, 3)}
    return {name: float(value) for name, value in found.items()}


def flow_to_rgb(flow):
    """The usual colour wheel: hue is direction, saturation is length (Baker et al., IJCV 2011)."""
    knots = np.cumsum([0, 15, 6, 4, 11, 13, 6])  # red, yellow, green, cyan, blue, magenta, red
    red, green, blue = [1, 1, 0, 0, 0, 1, 1], [0, 1, 1, 1, 0, 0, 0], [0, 0, 0, 1, 1, 1, 0]
    x, y = np.moveaxis(np.asarray(flow), -1, 0)
    length = np.hypot(x, y)
    angle = 27 * (np.arctan2(-y, -x) / np.pi + 1)
    hue = np.stack([np.interp(angle, knots, channel) for channel in (red, green, blue)], axis=-1)
    return 1 - (length / max(length.max(), 1e-6))[..., None] * (1 - hue)


def picture(first, second, flow):
    """The two frames, the flow, the warped frame, and the error before and after."""
    warped = warp(second, flow)
    errors = [grey_levels(first, second), grey_levels(first, warped)]
    longest = np.linalg.norm(flow, axis=-1).max()
    panels = [
        ("first frame", first, {}),
        ("second frame", second, {}),
        (f"fitted flow, up to {longest:.1f} px", flow_to_rgb(flow), {}),
        ("second frame, warped by the flow", warped, {}),
    ]
    scale = {"cmap": "magma", "vmin": 0, "vmax": max(np.percentile(errors[0], 99), 1)}
    for when, error in zip(("before", "after"), errors, strict=True):
        panels.append((f"error {when}: {error.mean():.1f} grey levels", error, scale))
    height = 2 * (4 * first.shape[0] / first.shape[1] + 0.25)
    figure = Figure(figsize=(12, height), layout="constrained")
    for axes, (title, image, style) in zip(figure.subplots(2, 3).flat, panels, strict=True):
        axes.imshow(image, **style)
        axes.set_title(title)
        axes.set_axis_off()
    wheel = figure.axes[2].inset_axes([0.8, 0.02, 0.18, 0.18 * first.shape[1] / first.shape[0]])
    grid = np.stack(np.meshgrid(*[np.linspace(-1, 1, 101)] * 2), axis=-1)
    inside = np.linalg.norm(grid, axis=-1, keepdims=True) <= 1
    wheel.imshow(np.concatenate([flow_to_rgb(grid * inside), inside], axis=-1))
    wheel.set_axis_off()
    return figure


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("first", nargs="?", help="image file (default: scikit-image's stereo pair)")
    parser.add_argument("second", nargs="?", help="image file of the same size")
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder for the results")
    parser.add_argument("--steps", type=int, default=100, help="optimisation steps per level")
    options = parser.parse_args()
    if (options.first is None) != (options.second is None):
        parser.error("expected two images or none, got one; pass both frames")
    if options.steps < 1:
        parser.error(f"--steps: expected at least 1, got {options.steps}; 100 is the default")
    try:
        if options.first is None:
            first, second, truth = motorcycle()
        else:
            (first, second), truth = read_pair(options.first, options.second), None
    except ValueError as error:
        raise SystemExit(f"fit_flow: {error}") from None
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SystemExit(
            f"fit_flow: --out: expected a folder that can be made, got '{options.out}' "
            f"({error.strerror}); pass another one"
        ) from None

    start = time.perf_counter()
    before = measure(first, second, jnp.zeros_like(first[..., :2]), truth)
    print("    level  photometric error" + "   end-point error (px)" * (truth is not None))
    print("    start " + row(before))
    for flow in fit(first, second, steps=options.steps):
        after = measure(first, second, flow, truth)
        print(size(flow).rjust(9) + " " + row(after), flush=True)
    seconds = time.perf_counter() - start

    np.savez_compressed(options.out / "flow.npz", flow=np.asarray(flow, np.float32))
    picture(first, second, flow).savefig(options.out / "flow.png", dpi=100)
    print(
        f"{seconds:.1f} s; photometric error {before['photometric']:.1f} -> "
        f"{after['photometric']:.1f} grey levels; wrote flow.png and flow.npz in {options.out}"
    )


def row(found):
    text = f"{found['photometric']:8.1f} grey levels"
    if "median" in found:
        text += f"   median {found['median']:5.2f}, mean {found['mean']:5.2f}, "
        text += ", ".join(f"{100 * found[f'under {n} px']:.0f} % under {n}" for n in (1, 3))
    return text


if __name__ == "__main__":
    main()
