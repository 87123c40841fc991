"""Differentiable image warping for JAX, in hand-written C++ and CUDA kernels.

Images are channels-last, ``(H, W, C)`` or ``(D, H, W, C)``; `grid_sample` alone is channels-first,
as PyTorch's. The last axis of points and flows is ``(x, y)`` or ``(x, y, z)``, in pixels: x runs
along W, y along H, z along D, and 0 is the centre of the first pixel. Options are keyword-only.
Errors are raised while tracing; they say what was expected, what was received, and the remedy.

Annotations give shapes as jaxtyping writes them, which need not be installed. ``...`` is all that
may stand in front: batch axes, which broadcast, D in 3-D, the channels of `grid_sample`. ``*S`` is
any number of axes, ``*shape`` is ``H W`` or ``D H W``, ``dims`` is 2 or 3, and ``h w`` may be
another size than ``H W``.
"""

from importlib.metadata import version as _version

from jaxwarp import flow, halo, reference
from jaxwarp._ffi import export_checks
from jaxwarp._grid_sample import grid_sample, to_normalized, to_pixels
from jaxwarp._ops import backward_warp, forward_warp, gather, pixel_grid, splat
from jaxwarp._reconstruct import reconstruct

__all__ = [
    "backward_warp",
    "export_checks",
    "flow",
    "forward_warp",
    "gather",
    "grid_sample",
    "halo",
    "pixel_grid",
    "reconstruct",
    "reference",
    "splat",
    "to_normalized",
    "to_pixels",
]
__version__ = _version("jaxwarp")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
