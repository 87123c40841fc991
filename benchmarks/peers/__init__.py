"""What a peer is: a library, imported in a process of its own, that makes a `Program` of a case.

Each module here has `versions() -> dict` and `build(*, peer, case, threads) -> Program`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

# process: its module, and the peers that it serves.
LIBRARIES: dict[str, tuple[str, tuple[str, ...]]] = {
    "jaxwarp": ("with_jax", ("jaxwarp",)),
    "jax": ("with_jax", ("reference", "xla", "map_coordinates")),
    "copy": ("with_jax", ("copy",)),
    "opencv": ("with_opencv", ("opencv",)),
    "torch": ("with_torch", ("torch", "torch channels_last", "torch index_add")),
    "torch.compile": ("with_torch", ("torch.compile",)),  # compiles for long, and for itself
    "cupy": ("with_cupy", ("cupy atomics",)),
}
PEERS = {peer: library for library, (_, peers) in LIBRARIES.items() for peer in peers}


class Unsupported(Exception):
    """This peer has no such operation; the text says which."""


@dataclass(frozen=True, kw_only=True)
class Program:
    cold: Callable[[], Any]  # one call as a user makes it, until its results are there
    warm: Callable[[int], Any]  # so many calls with buffers reused; the results of the last
    read: Callable[[Any], list[np.ndarray]]  # the results in jaxwarp's layout and order
    work: float = 1.0  # calls that one of `warm` stands for: on a GPU it takes inputs in rotation


ROTATED = 3  # sets of inputs and results on a GPU, so that its cache holds none of them
