"""Draws the pictures of the page on conventions, with jaxwarp: python docs/pictures.py DIR."""

import sys
from pathlib import Path

import jax.numpy as jnp
import matplotlib
import matplotlib.patheffects as effects
import numpy as np
from matplotlib.figure import Figure

import jaxwarp

ROW = jnp.array([1.0, 3.0, 2.0, 4.0])  # the image of the curves: one row of four pixels
BLUE, RED, GREY = "#2a6fbb", "#c33c32", "0.55"
STYLE = {"font.size": 11, "svg.hashsalt": "jaxwarp", "axes.spines.top": False}
STYLE |= {"axes.spines.right": False, "savefig.facecolor": "white"}


def grid(ax, height, width, name):
    """Pixels as squares, their centres as dots, and the axes along which x and y grow."""
    for y in range(height):
        for x in range(width):
            ax.fill(
                x + np.array([-0.5, 0.5, 0.5, -0.5]),
                y + np.array([-0.5, -0.5, 0.5, 0.5]),
                facecolor="0.96",
                edgecolor="0.75",
            )
            ax.plot(x, y, ".", color=GREY, markersize=4)
    ax.set(xlim=(-0.6, width - 0.4), ylim=(height - 0.4, -0.6), aspect="equal")
    ax.set(xticks=range(width), yticks=range(height), xlabel="x (along W)", ylabel="y (along H)")
    ax.set_title(name, fontsize=11)
    ax.xaxis.set_label_position("top")
    ax.xaxis.tick_top()
    ax.tick_params(length=0)
    for side in ax.spines.values():
        side.set_visible(False)


def label(ax, x, y, text, **options):
    drawn = ax.text(x, y, text, zorder=5, **options)
    drawn.set_path_effects([effects.withStroke(linewidth=3, foreground="white")])


def arrow(ax, start, end, color):
    ax.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": color, "lw": 2})


def panel(width=4.2, height=3.6):
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def position():
    """One position, its four neighbours and their weights."""
    figure, ax = panel()
    grid(ax, 4, 5, "a position and its four weights")
    p = np.array([2.25, 1.5])
    for j in ((2, 1), (3, 1), (2, 2), (3, 2)):
        weight = np.prod(1 - np.abs(p - j))
        ax.plot([p[0], j[0]], [p[1], j[1]], color=BLUE, lw=1, zorder=1)
        ax.plot(*j, "o", color=BLUE, markersize=4 + 14 * weight)
        out = np.sign(np.array(j) - p)
        label(ax, j[0] + 0.12 * out[0], j[1] + 0.36 * out[1], f"{weight:g}",
              ha="center", va="center")  # fmt: skip
    ax.plot(*p, "x", color=RED, markersize=9, mew=2)
    label(ax, p[0] + 0.1, p[1], "(2.25, 1.5)", va="center", color=RED)
    return figure


def backward():
    figure, ax = panel()
    grid(ax, 4, 5, "backward_warp: against the flow")
    ax.plot(1, 2, "s", color=BLUE, markersize=11)
    ax.plot(2.5, 1, "x", color=RED, markersize=9, mew=2)
    arrow(ax, (1, 2), (2.44, 1.04), GREY)
    label(ax, 1.0, 2.42, "q: gets the value", color=BLUE, ha="center")
    label(ax, 2.6, 0.72, "q + flow[q]: is read", color=RED, ha="center")
    label(ax, 2.0, 1.68, "flow[q] = (1.5, -1)", color="0.3")
    return figure


def forward():
    figure, ax = panel()
    grid(ax, 4, 5, "forward_warp: along the flow")
    ax.plot(1, 2, "s", color=RED, markersize=11)
    for j, size in (((2, 1), 9), ((3, 1), 9)):
        ax.plot(*j, "o", color=BLUE, markersize=size)
    arrow(ax, (1, 2), (2.44, 1.04), GREY)
    label(ax, 1.0, 2.42, "r: is read", color=RED, ha="center")
    label(ax, 2.6, 0.62, "r + flow[r]: these get it", color=BLUE, ha="center")
    label(ax, 2.0, 1.68, "flow[r] = (1.5, -1)", color="0.3")
    return figure


def sampled(x, **options):
    points = jnp.stack([x, jnp.zeros_like(x)], -1)
    return jaxwarp.gather(ROW[None, :, None], points, **options)[:, 0]


def curve(title, low=-5.0, high=9.0, **options):
    """gather along one row: the row itself, and what lies outside."""
    figure, ax = panel(4.2, 2.3)
    x = jnp.linspace(low, high, 1401) + 1e-4  # off the ties of "nearest"
    y = np.array(sampled(x, **options))
    y[1:][np.abs(np.diff(y)) > 0.5] = np.nan  # a step is a gap
    ax.axvspan(-0.5, len(ROW) - 0.5, color="0.94", lw=0)
    ax.plot(x, y, color=RED, lw=1.8)
    ax.plot(range(len(ROW)), ROW, "o", color=BLUE)
    ax.set(xlim=(low, high), ylim=(-0.4, 4.4), xlabel="x", yticks=range(5))
    ax.set_xticks(range(int(low), int(high) + 1, 1 if high - low < 8 else 2))
    ax.set_title(title, fontsize=11)
    return figure


def slopes():
    """Values and right-hand slopes of the linear method."""
    figure, ax = panel(4.2, 2.3)
    x = jnp.linspace(0, 3, 601)
    ax.plot(x, sampled(x), color=GREY, lw=1, label="value")
    slope = np.array(sampled(x, derivative=(1, 0)))
    at = np.array(sampled(jnp.arange(3.0), derivative=(1, 0)))
    slope[1:][np.abs(np.diff(slope)) > 0.5] = np.nan
    ax.plot(x[:-1], slope[:-1], color=RED, lw=1.8, label="derivative in x")
    ax.plot(range(3), at, "o", color=RED, markersize=5)
    ax.set(xlabel="x", xticks=range(4))
    ax.set_title('derivative=(1, 0), method="linear"', fontsize=11)
    ax.legend(fontsize=9, loc="lower right", frameon=False)
    return figure


def draw(folder: Path) -> None:
    """Draws every picture, as SVG."""
    figures = {"position": position, "backward": backward, "forward": forward, "slopes": slopes}
    for boundary in ("constant", "nearest", "mirror", "reflect", "wrap"):
        figures[f"boundary_{boundary}"] = lambda b=boundary: curve(f'boundary="{b}"', boundary=b)
    for method in ("nearest", "linear", "cubic"):
        figures[f"method_{method}"] = lambda m=method: curve(
            f'method="{m}"', low=-0.999, high=4.0, method=m, boundary="nearest"
        )
    with matplotlib.rc_context(STYLE):
        for name, figure in figures.items():
            figure().savefig(folder / f"{name}.svg", metadata={"Date": None})


if __name__ == "__main__":
    Path(sys.argv[1]).mkdir(parents=True, exist_ok=True)
    draw(Path(sys.argv[1]))
