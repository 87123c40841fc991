"""Checks of what a user of a GPU meets first, each a step of run.py: `python checks.py STEP`.

Exit status 0: right. 1: wrong. 77: there is nothing to check here.
"""

import hashlib
import json
import os
import sys
import tempfile
from functools import partial
from pathlib import Path

CANNOT = 77
GRAPHS = "--xla_gpu_graph_min_graph_size=1 --xla_gpu_enable_command_buffer=FUSION,CUSTOM_CALL"


def smoke() -> bool:
    """Values and gradients of both warps, for some channels and dtypes, as on the CPU."""
    jax, jaxwarp = modules()
    import jax.numpy as jnp
    import numpy as np

    def everything(image, flow):
        def warps(image, flow):
            return jaxwarp.backward_warp(image, flow), jaxwarp.forward_warp(image, flow)

        out, vjp = jax.vjp(warps, image, flow)
        return out, vjp(jax.tree.map(jnp.cos, out))

    rng, right = np.random.default_rng(0), True
    for channels, dtype in ((3, "float32"), (17, "float32"), (4, "float32"), (3, "bfloat16")):
        image = jnp.asarray(rng.random((64, 64, channels), np.float32), dtype)
        flow = rng.random((64, 64, 2), np.float32) * 16 - 8
        actual = jax.jit(everything)(image, flow)
        with jax.default_device(jax.devices("cpu")[0]):
            expected = jax.jit(everything)(np.asarray(image), flow)
        off = [
            np.abs(np.float64(a) - np.float64(e)).max() / (1 + np.abs(np.float64(e)).max())
            for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True)
        ]
        worst = np.max(off)  # a NaN stays one
        close = worst < (2.0**-6 if dtype == "bfloat16" else 1e-4)
        print(f"64x64x{channels} {dtype}: off by {worst:.2g}, {'right' if close else 'WRONG'}")
        right &= close
    return right


def graph() -> bool:
    """Does XLA put the calls into a CUDA graph (a command buffer), and are they right there?"""
    folder = tempfile.TemporaryDirectory()
    dump = f"--xla_dump_to={folder.name} --xla_dump_hlo_as_text"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {GRAPHS} {dump}"
    jax, jaxwarp = modules()
    import numpy as np

    rng = np.random.default_rng(0)
    image = rng.random((64, 64, 3), np.float32)
    flow = rng.random((64, 64, 2), np.float32) * 8 - 4

    def warps(image, flow):
        return jaxwarp.forward_warp(jaxwarp.backward_warp(image, flow), flow)

    run, off = jax.jit(warps), []
    for k in range(4):  # a graph is recorded in a later call than the first
        with jax.default_device(jax.devices("cpu")[0]):
            expected = np.asarray(jax.jit(warps)(image + k, flow))
        off.append(np.abs(np.asarray(run(image + k, flow)) - expected).max())
    worst = np.max(off)
    text = ""
    for path in sorted(Path(folder.name).glob("*.thunk_sequence_after_thunk_passes.txt")):
        text += f"{path.name}:\n{path.read_text(errors='replace')}\n"
    print(text or sorted(path.name for path in Path(folder.name).iterdir()))
    counts = {name: text.count(name) for name in ("CommandBuffer", "CustomCall")}
    print(f"in the sequences of thunks: {counts}; results off by {worst:.2g}")
    return counts["CommandBuffer"] > 0 and worst < 1e-4


def hashes() -> bool:
    """How many different results do ten equal runs have? One, where that is promised."""
    jax, jaxwarp = modules()
    import numpy as np

    rng = np.random.default_rng(0)
    image = rng.random((256, 256, 3), np.float32)
    flow = rng.random((256, 256, 2), np.float32) * 64 - 32

    def gradients(deterministic):
        warp = partial(jaxwarp.backward_warp, deterministic=deterministic)

        def run(image, flow):
            out, vjp = jax.vjp(warp, image, flow)
            return vjp(out)

        return run

    right = True
    for name, function, promised in (
        ("backward_warp", jaxwarp.backward_warp, True),
        ("its gradients", gradients(False), False),
        ("its gradients, deterministic", gradients(True), True),
        ("forward_warp", jaxwarp.forward_warp, False),
        ("forward_warp, deterministic", partial(jaxwarp.forward_warp, deterministic=True), True),
    ):
        run = jax.jit(function)
        found = set()
        for _ in range(10):
            leaves = map(np.asarray, jax.tree.leaves(run(image, flow)))
            found.add(hashlib.sha256(b"".join(leaf.tobytes() for leaf in leaves)).hexdigest())
        print(f"{name}: {len(found)} different results in 10 runs")
        right &= len(found) == 1 or not promised
    return right


def modules():
    """jax and jaxwarp, where there is a GPU."""
    import jax

    import jaxwarp

    known = {"jax": jax.__version__, "jaxwarp": jaxwarp.__version__}
    try:
        gpu = jax.devices("gpu")[0]
    except RuntimeError:
        print(f"versions: {json.dumps(known)}")
        print("JAX sees no GPU")
        sys.exit(CANNOT)
    known |= {"device": gpu.device_kind, "platform": gpu.client.platform_version}
    print(f"versions: {json.dumps(known)}")
    return jax, jaxwarp


if __name__ == "__main__":
    sys.exit(0 if {"smoke": smoke, "graph": graph, "hashes": hashes}[sys.argv[1]]() else 1)
