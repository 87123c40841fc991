"""How a kernel is partitioned over a mesh: which axes of its operands may be sharded, what one
shard computes, and what is summed over shards.

The only file that knows custom_partitioning and the one private name of JAX that it needs.

Every axis of an operand has a label; axes with one label are sharded alike. Batch axes, points and
channels may be sharded. Along the axes of an image (REPLICATED) every shard needs all of it, since
a position may lie anywhere.
"""

import hashlib
import itertools
import math
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental.custom_partitioning import custom_partitioning
from jax.experimental.xla_metadata import set_xla_metadata
from jax.extend.core import Primitive
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec, Sharding

try:
    # Partitioning needs the devices while a primitive is lowered; there is no public way to say so.
    from jax._src.dispatch import prim_requires_devices_during_lowering as _need_devices
except ImportError:  # what is sharded is then gathered by XLA: slower, never wrong
    _need_devices: set[Primitive] | None = None  # type: ignore[no-redef]

Label = str | None  # None: an axis of size 1 that broadcasts
Labels = tuple[Label, ...]
Axes = dict[str, tuple[str, ...]]  # label -> the mesh axes over which it is sharded
Operands = dict[str, Any]

BATCH, GRID, SPATIAL = "b", "g", "s"  # followed by a number
CHANNEL, COORDINATE = "ch", "xy"


def register(primitive: Primitive) -> None:
    """Must be called for every primitive whose lowering is partitioned."""
    if _need_devices is not None:
        _need_devices.add(primitive)


def _replicated(label: Label) -> bool:
    return label is not None and (label == COORDINATE or label.startswith(SPATIAL))


def _merge(specs: Sequence[Sequence[Any]], labels: Sequence[Labels], order: Sequence[int]) -> Axes:
    """The mesh axes of each label: the first operand in `order` that shards it decides, and no mesh
    axis is used twice."""
    axes: Axes = {}
    used: set[str] = set()
    for i in order:
        spec = (*specs[i], *[None] * (len(labels[i]) - len(specs[i])))
        for label, given in zip(labels[i], spec, strict=True):
            names = (given,) if isinstance(given, str) else given or ()
            free = label and label not in axes and not _replicated(label) and not used & set(names)
            if label and free and names:
                axes[label] = names
                used |= set(names)
    return axes


def _even_spec(x: Any) -> list[tuple[str, ...]]:
    """The mesh axes of each axis of x, where they divide it evenly. XLA would pad the others, and a
    kernel would count the padding."""
    names = [(given,) if isinstance(given, str) else given or () for given in x.sharding.spec]
    shape = x.sharding.mesh.shape
    return [
        of if n % math.prod(shape[m] for m in of) == 0 else ()
        for of, n in zip(names, x.shape, strict=False)  # a spec may leave out the last axes
    ]


def _spec(labels: Labels, axes: Axes) -> PartitionSpec:
    return PartitionSpec(*(axes.get(label) if label else None for label in labels))


def _order(names: Sequence[str]) -> list[int]:
    """Points decide first: there are most of them."""
    kinds = ("points", "importance", "values")
    rank = {name: next((i for i, k in enumerate(kinds) if name.endswith(k)), 3) for name in names}
    return sorted(range(len(names)), key=lambda i: rank[names[i]])


class Shard(NamedTuple):
    """What one shard knows of the others."""

    axes: Axes  # those over which something is sharded; empty on one device
    labels: dict[str, Labels]  # of each operand and result

    def over(self, prefix: str) -> tuple[str, ...]:
        """The mesh axes over which labels that begin with `prefix` are sharded."""
        return tuple(
            m for label, names in self.axes.items() if label.startswith(prefix) for m in names
        )

    def origin(self, name: str, shape: Sequence[int]) -> list[Array]:
        """The first index of this shard along every grid axis of operand `name`."""
        return [
            jax.lax.axis_index(self.axes[label]) * n if label in self.axes else jnp.int32(0)
            for label, n in zip(self.labels[name], shape, strict=True)
            if label is not None and label.startswith(GRID)
        ]

    def sum(self, name: str, x: Array) -> Array:
        """The result `name`, of which every shard has its part."""
        of = self.labels[name]
        if not any(label and label.startswith(GRID) for label in of):
            of = (*of, CHANNEL)  # a plane: every shard of the channels has all of it
        names = tuple(m for label, names in self.axes.items() if label not in of for m in names)
        return jax.lax.psum(x, names) if names else x


def _partly_manual(operands: Operands) -> bool:
    """Inside a shard_map over some mesh axes only. What is sharded over the others is gathered:
    custom_partitioning does not know that it is inside, and XLA would end the process."""
    mesh = jax.typeof(next(iter(operands.values()))).sharding.mesh
    return bool(mesh.manual_axes) and not mesh.are_all_axes_manual


Kernel = Callable[[Operands, Operands, Shard], Operands]


def partitioned(
    kernel: Kernel, operands: Operands, outputs: Operands, labels: dict[str, Labels], name: str
) -> Operands:
    """kernel(operands, outputs, shard), run on every shard with its part of the operands.

    `outputs` are shapes and dtypes. The kernel returns results of the shapes it is given. `name`
    tells it from others on the same operands.
    """
    if _need_devices is None or _partly_manual(operands):
        return kernel(operands, outputs, Shard({}, labels))
    names = tuple(operands)  # the functions below outlive the operands, which may be tracers
    of_operands = [labels[name] for name in names]
    of_outputs = [labels[name] for name in outputs]
    order = _order(names)

    def whole(*arrays: Array) -> list[Array]:
        given = dict(zip(names, arrays, strict=True))
        return list(kernel(given, outputs, Shard({}, labels)).values())

    def merge(arguments: Sequence[Any]) -> Axes:
        return _merge([_even_spec(a) for a in arguments], of_operands, order)

    def infer(mesh: Mesh, arguments: Any, results: Any) -> list[Sharding]:
        if mesh.empty:
            return [everywhere(arguments)] * len(of_outputs)
        axes = merge(arguments)
        return [NamedSharding(mesh, _spec(of, axes)) for of in of_outputs]

    def everywhere(arguments: Any) -> Sharding:
        # Several devices and no mesh, as under jax.set_mesh with plain arrays. What is sharded all
        # the same is gathered.
        devices = np.array(list(arguments[0].sharding.device_set))
        return NamedSharding(Mesh(devices, ("devices",)), PartitionSpec())

    def partition(mesh: Mesh, arguments: Any, results: Any) -> Any:
        if mesh.empty:
            of_all = (everywhere(arguments),) * len(arguments)
            return mesh, whole, infer(mesh, arguments, results), of_all
        axes = merge(arguments)

        def part(x: Any, of: Labels) -> jax.ShapeDtypeStruct:
            counts = [math.prod(mesh.shape[m] for m in axes.get(label or "", ())) for label in of]
            shape = tuple(n // count for n, count in zip(x.shape, counts, strict=True))
            return jax.ShapeDtypeStruct(shape, x.dtype)

        def on_shard(*arrays: Array) -> list[Array]:
            # An ambient Explicit mesh must not reach what is traced for one shard.
            with jax.sharding.use_abstract_mesh(AbstractMesh((), ())):
                parts = {n: part(x, labels[n]) for n, x in outputs.items()}
                given = dict(zip(names, arrays, strict=True))
                return list(kernel(given, parts, Shard(axes, labels)).values())

        of_arguments = tuple(NamedSharding(mesh, _spec(of, axes)) for of in of_operands)
        return mesh, on_shard, infer(mesh, arguments, results), of_arguments

    sharded = custom_partitioning(whole)
    count = itertools.count()
    rule = " -> ".join(
        ", ".join(" ".join(label or f"one{next(count)}" for label in of) for of in side)
        for side in (of_operands, of_outputs)
    )
    appearing = dict.fromkeys(label for of in (*of_operands, *of_outputs) for label in of)
    sharded.def_partition(
        partition,
        infer_sharding_from_operands=infer,
        sharding_rule=rule,
        need_replication_factors=tuple(label for label in appearing if _replicated(label)),
    )
    # Of a kernel that is partitioned later, the program's text has an address alone, which may have
    # been another's: JAX's persistent cache would take one program for another.
    described = repr((version("jaxwarp"), name, names, outputs, labels))
    with set_xla_metadata(jaxwarp_kernel=hashlib.sha256(described.encode()).hexdigest()):
        return dict(zip(outputs, sharded(*operands.values()), strict=True))


def result_avals(
    operands: Operands, results: Operands, labels: dict[str, Labels]
) -> list[jax.core.ShapedArray]:
    """Types of results: with their sharding on an Explicit mesh, and what varies in a shard_map."""
    avals = list(operands.values())
    meshes = (a.sharding.mesh for a in avals)
    mesh = next((mesh for mesh in meshes if not mesh.empty), None)
    if mesh is None:
        return [jax.core.ShapedArray(x.shape, x.dtype) for x in results.values()]
    specs = [a.sharding.spec for a in avals]
    axes = _merge(specs, [labels[name] for name in operands], _order(list(operands)))
    manual = next((a for a in avals if a.manual_axis_type.varying), avals[0]).manual_axis_type

    def sharding(name: str) -> NamedSharding:
        primal = operands.get(name.removeprefix("ct_"))  # a cotangent has the type of its primal
        if name.startswith("ct_") and primal is not None and primal.shape == results[name].shape:
            return primal.sharding
        return NamedSharding(mesh, _spec(labels[name], axes))

    return [
        jax.core.ShapedArray(x.shape, x.dtype, sharding=sharding(name), manual_axis_type=manual)
        for name, x in results.items()
    ]


def same_varying(operands: Operands) -> Operands:
    """In a shard_map, operands that vary over the same mesh axes.

    This is said before differentiation, so that the cotangent of a replicated operand is summed
    over the shards.
    """
    varying = {n: jax.typeof(x).manual_axis_type.varying for n, x in operands.items()}
    union = frozenset().union(*varying.values())
    missing = {n: tuple(sorted(union - v)) for n, v in varying.items()}
    return {
        n: jax.lax.pcast(x, missing[n], to="varying") if missing[n] else x
        for n, x in operands.items()
    }
