"""Train a small flow network on all devices of all processes, self-supervised by a warp.

    python examples/train_distributed.py                       # one process, all its devices
    python examples/train_distributed.py --processes 2 --process 0 --coordinator HOST:PORT
    python examples/train_distributed.py --processes 2 --process 1 --coordinator HOST:PORT

Every process runs the same program; on a cluster a launcher sets the three options. The mesh spans
all devices, the batch is sharded over it, and JAX sums the gradients: nothing here, and nothing in
jaxwarp, knows how many processes there are. The frames are crops of scikit-image's photographs,
moved by smooth random flows that the network has to find.
"""

import argparse
from importlib.resources import files
from itertools import pairwise
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import skimage.io
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from skimage.util import img_as_float32

import jaxwarp

SIZE, BATCH = 48, 16
CHANNELS = (6, 24, 24, 24, 2)
PHOTOGRAPHS = ("astronaut.png", "coffee.png", "chelsea.png", "motorcycle_left.png")


def start(processes, process, coordinator):
    """Joins the other processes; on a CPU they talk through gloo."""
    if processes > 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(coordinator, processes, process)
    return jax.make_mesh((jax.device_count(),), ("batch",), (AxisType.Auto,))


def frames(step):
    """The whole batch of a step, (first, second), each (BATCH, SIZE, SIZE, 3) in [0, 1]."""
    rng = np.random.default_rng(step)
    folder = Path(str(files("skimage"))) / "data"  # by path: nothing can be downloaded
    crops = []
    for i in range(BATCH):
        photograph = img_as_float32(skimage.io.imread(folder / PHOTOGRAPHS[i % len(PHOTOGRAPHS)]))
        y, x = (rng.integers(n - SIZE) for n in photograph.shape[:2])
        crops.append(photograph[y : y + SIZE, x : x + SIZE, :3])
    second = np.stack(crops)
    coarse = rng.uniform(-3, 3, (BATCH, 3, 3, 2)).astype(np.float32)
    flow = jax.image.resize(coarse, (BATCH, SIZE, SIZE, 2), "cubic")
    return np.asarray(jaxwarp.backward_warp(second, flow, boundary="mirror")), second


def sharded(arrays, mesh):
    """Global arrays, of which this process gives its part of the batch."""
    sharding = NamedSharding(mesh, PartitionSpec("batch"))
    part = slice(
        BATCH * jax.process_index() // jax.process_count(),
        BATCH * (jax.process_index() + 1) // jax.process_count(),
    )
    return [jax.make_array_from_process_local_data(sharding, a[part], a.shape) for a in arrays]


def new_network(seed=0):
    """Weights (3, 3, in, out) and biases of a stack of convolutions."""
    rng = np.random.default_rng(seed)
    shapes = [(3, 3, inputs, outputs) for inputs, outputs in pairwise(CHANNELS)]
    return [
        (
            (rng.standard_normal(s) * np.sqrt(2 / np.prod(s[:3]))).astype(np.float32),
            np.zeros(s[3], np.float32),
        )
        for s in shapes
    ]


def predict(network, first, second):
    """The flow (..., SIZE, SIZE, 2) from the first frame to the second."""
    x = jnp.concatenate([first, second], axis=-1) - 0.5
    for i, (weights, bias) in enumerate(network):
        x = jax.lax.conv_general_dilated(
            x, weights, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        x = x + bias
        x = jax.nn.relu(x) if i + 1 < len(network) else x
    return x


def loss(network, first, second):
    """How far the second frame, warped back, is from the first; and how rough the flow is."""
    flow = predict(network, first, second)
    difference = jaxwarp.backward_warp(second, flow, boundary="mirror") - first
    rough = sum(jnp.mean(jnp.diff(flow, axis=axis) ** 2) for axis in (1, 2))
    return jnp.mean(jnp.sqrt(difference**2 + 1e-6)) + 0.01 * rough


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--process", type=int, default=0, help="0 to PROCESSES - 1")
    parser.add_argument("--coordinator", help="HOST:PORT of process 0")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--gradients", type=Path, help="save those of the first step, and stop")
    arguments = parser.parse_args()
    mesh = start(arguments.processes, arguments.process, arguments.coordinator)
    if BATCH % jax.device_count():
        parser.error(f"expected a number of devices that divides {BATCH}, got {jax.device_count()}")

    everywhere = NamedSharding(mesh, PartitionSpec())
    network = jax.device_put(new_network(), everywhere)
    if arguments.gradients:
        gradient = jax.jit(jax.value_and_grad(loss), out_shardings=everywhere)
        results = gradient(network, *sharded(frames(0), mesh))
        np.savez(arguments.gradients, *map(np.asarray, jax.tree.leaves(results)))
        return

    optimizer = optax.adam(3e-3)
    state = jax.jit(optimizer.init, out_shardings=everywhere)(network)

    @jax.jit
    def step(network, state, first, second):
        value, gradient = jax.value_and_grad(loss)(network, first, second)
        updates, state = optimizer.update(gradient, state)
        without = loss(jax.tree.map(jnp.zeros_like, network), first, second)
        return optax.apply_updates(network, updates), state, value / without

    for i in range(arguments.steps):
        network, state, share = step(network, state, *sharded(frames(i), mesh))
        if jax.process_index() == 0 and (i % 10 == 0 or i + 1 == arguments.steps):
            print(f"step {i:3d}: {float(share):4.0%} of the loss without a flow", flush=True)


if __name__ == "__main__":
    main()
