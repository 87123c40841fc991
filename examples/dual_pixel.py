"""Render what the two halves of a dual-pixel sensor see of a scene out of focus.

    python examples/dual_pixel.py --out DIR [--focus DISPARITY] [--blur PIXELS]

Each pixel of a sharp image spreads evenly over a box as wide as its defocus, which grows with its
disparity from the plane in focus; half a pixel of the sensor sees half the aperture, and so half of
the box. A box is splatted as its four corners, +1 and -1, and filled by a cumulative sum. The image
and its disparity are those of scikit-image's stereo pair. Writes DIR/dual_pixel.png.
"""

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from fit_flow import motorcycle
from matplotlib.figure import Figure
from scipy.ndimage import distance_transform_edt

import jaxwarp


def spread(values, centre, width):
    """Adds to every pixel the share of each value whose box covers it.

    values: (H, W, C). centre, width: (H, W, 2) pixels, (x, y). Returns (H, W, C). A value of 1 adds
    up to the area of its box; a box of width 1 on a pixel covers that pixel.
    """
    h, w, _ = values.shape
    low = centre + 0.5 - width / 2
    corners, signed = [], []
    for right in (0, 1):
        for below in (0, 1):
            corners.append(low + width * jnp.array([right, below]))
            signed.append(values * (-1) ** (right + below))
    # One row and column more: what ends beyond the border is clamped to it and not drawn.
    edges = jaxwarp.splat(jnp.stack(signed), jnp.stack(corners), (h + 1, w + 1), boundary="nearest")
    return edges.cumsum(0).cumsum(1)[:h, :w]


def dual_pixel(image, defocus):
    """The (left, right) views of a sharp image (H, W, C), each (H, W, C).

    defocus: (H, W), the signed width in pixels of the box that a pixel becomes beyond its own.
    """
    views = []
    for side in (-1, 1):
        shift = side * defocus / 4  # the centre of one half of the box
        centre = jaxwarp.pixel_grid(defocus.shape) + jnp.stack([shift, 0 * shift], -1)
        width = 1 + jnp.abs(jnp.stack([defocus / 2, defocus], -1))
        one = 1 / width.prod(-1, keepdims=True)  # a pixel keeps its light
        light = spread(jnp.concatenate([image, jnp.ones_like(one)], -1) * one, centre, width)
        views.append(light[..., :-1] / light[..., -1:])
    return tuple(views)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for dual_pixel.png")
    parser.add_argument("--focus", type=float, default=50.0, help="disparity in focus, pixels")
    parser.add_argument("--blur", type=float, default=1.0, help="defocus per pixel of disparity")
    arguments = parser.parse_args()

    image, _, flow = motorcycle()
    disparity = -flow[..., 0]
    unknown = np.isnan(disparity)  # take the nearest known
    nearest = distance_transform_edt(unknown, return_distances=False, return_indices=True)
    disparity = disparity[tuple(nearest)]
    defocus = arguments.blur * (disparity - arguments.focus)
    left, right = jax.jit(dual_pixel)(jnp.asarray(image), jnp.asarray(defocus, jnp.float32))

    pictures = {
        "sharp": image,
        "defocus (pixels)": defocus,
        "left view": left,
        "right minus left": 0.5 + (right - left),
    }
    figure = Figure(figsize=(12, 8.4), layout="constrained")
    for axes, (title, picture) in zip(figure.subplots(2, 2).flat, pictures.items(), strict=True):
        picture = np.asarray(picture)
        drawn = axes.imshow(picture if picture.ndim == 2 else picture.clip(0, 1), cmap="RdBu_r")
        if picture.ndim == 2:
            drawn.set_clim(-np.abs(picture).max(), np.abs(picture).max())
            figure.colorbar(drawn, ax=axes, shrink=0.7)
        axes.set_title(title)
        axes.axis("off")
    arguments.out.mkdir(parents=True, exist_ok=True)
    figure.savefig(arguments.out / "dual_pixel.png", dpi=100)
    print(f"wrote {arguments.out / 'dual_pixel.png'}")


if __name__ == "__main__":
    main()
