"""The CUDA kernels on a GPU, against the reference on the CPU. `make test-gpu` runs this file.

Several processes may share the card: no test takes more than 12 GiB of it, and those that take more
than one are marked `large`, to be run in one process.
"""

from functools import partial

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxwarp
from jaxwarp import reference

pytestmark = pytest.mark.gpu

# Atomic additions come in any order: float64 sums of a few numbers near 1, and what dividing them
# by the least D_j, (1/64)^3, makes of their rounding.
EXACT, AVERAGED = 1e-12, 1e-10
SINGLE = 1e-5
TOLERANCE = {"float32": SINGLE, "bfloat16": 2.0**-8, "float16": 2.0**-11 + 1e-6}


def on_cpu(function, *arrays):
    with jax.default_device(jax.devices("cpu")[0]):
        return jax.jit(function)(*arrays)


def on_gpu(function, *arrays):
    results = jax.jit(function)(*arrays)
    assert {d.platform for r in jax.tree.leaves(results) for d in r.devices()} == {"gpu"}
    return results


@pytest.mark.parametrize("case", cases.ALL, ids=str)
def test_values_and_cotangents(case):
    arrays = case.inputs()
    expected = on_cpu(cases.value_and_cotangents(case.function(reference)), *arrays)
    actual = on_gpu(cases.value_and_cotangents(case.function(jaxwarp)), *arrays)
    tolerance = AVERAGED if case.options.get("reduce", "sum") != "sum" else EXACT
    cases.assert_close(actual, expected, tolerance)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("channels", [1, 2, 3, 4, 6, 8, 12, 17, 64, 1000])
def test_any_number_of_channels(channels, dtype):
    rng = np.random.default_rng(channels)
    image = rng.standard_normal((5, 6, channels)).astype(jnp.dtype(dtype))
    flow = (rng.integers(-192, 192, (5, 6, 2)) / 64).astype(np.float32)

    def warps(module):
        def run(image, flow):
            average = module.forward_warp(image, flow)
            return module.backward_warp(image, flow, boundary="reflect"), average

        return run

    actual = on_gpu(warps(jaxwarp), image, flow)
    expected = on_cpu(warps(reference), image.astype(np.float32), flow)
    cases.assert_close(actual, expected, TOLERANCE[dtype])
    _, (_, ct_flow) = on_gpu(cases.value_and_cotangents(warps(jaxwarp)), image, flow)
    _, (_, expected) = on_cpu(
        cases.value_and_cotangents(warps(reference)), image.astype(np.float64), flow
    )
    # The cotangents are rounded to the dtype of the image, and summed over channels and corners.
    cases.assert_close(ct_flow, expected, 4 * TOLERANCE[dtype])


@pytest.mark.parametrize("reach", [0.5, 64], ids=["smooth", "random"])
def test_large_arrays_and_a_shared_image(reach):
    rng, shape = np.random.default_rng(0), (1080, 1920)
    image = rng.standard_normal((*shape, 3)).astype(np.float32)
    flow = np.round(rng.uniform(-reach, reach, (2, *shape, 2)) * 64).astype(np.float32) / 64
    w = rng.uniform(0.5, 1, shape).astype(np.float32)

    def warps(module):
        def run(image, flow, w):
            return module.backward_warp(image, flow), module.forward_warp(image, flow, importance=w)

        return run

    actual = on_gpu(cases.value_and_cotangents(warps(jaxwarp)), image, flow, w)
    # The CPU kernels are held against the reference in the other files; that one is slow here.
    expected = on_cpu(cases.value_and_cotangents(warps(jaxwarp)), image, flow, w)
    cases.assert_close(actual, expected, SINGLE)


# Arrays of 2^29 elements and more take indices of 64 bits. Such an array is a tile that repeats,
# and so is all that comes of it where the boundaries wrap: every element is compared, those near
# the ends among them, and the host sees only the tile. No power of two is a multiple of its sides,
# so that an index which has lost its upper bits meets another element.
TILE = (125, 129)
MANY, FEWER = (92, 91), (46, 46)  # copies: 2^27 pixels and 2^25, and some more


def tiled(tile, copies):
    (ny, nx), (h, w, channels) = copies, tile.shape
    side_by_side = jnp.broadcast_to(tile[None, :, None], (ny, h, nx, w, channels))
    return side_by_side.reshape(ny * h, nx * w, channels)


def extremes(array, copies):
    """Of each element of the tile, the least and the greatest of its copies."""
    (ny, nx), (h, w) = copies, TILE

    def of_row(row):  # one row of tiles at a time, which takes little memory
        row = row.astype(jnp.float32)
        return row.min(1), row.max(1)

    low, high = jax.lax.map(of_row, array.reshape(ny, h, nx, w, -1))
    return low.min(0), high.max(0)


def tiles(dtype, channels, flow_dtype="float32"):
    """Image, flow and cotangent; steps of 1/8 keep what an average divides by from being small."""
    rng = np.random.default_rng(0)
    image, ct = rng.standard_normal((2, *TILE, channels)).astype(jnp.dtype(dtype))
    flow = (rng.integers(-12, 13, (*TILE, 2)) / 8).astype(flow_dtype)
    return image, flow, ct


def assert_each_copy_close(actual, expected, tolerance):
    for (low, high), e in zip(actual, jax.tree.leaves(expected), strict=True):
        cases.assert_close((low, high), (e, e), tolerance)


def pulled(function):
    def run(image, flow, ct):
        out, vjp = jax.vjp(function, image, flow)
        return out, *vjp(ct.astype(out.dtype))

    return run


@pytest.mark.large
def test_a_flow_past_31_bits():
    """More than 2^31 elements in image and result: 4 GiB each."""
    warp = partial(jaxwarp.backward_warp, boundary="wrap")
    image, flow, _ = tiles("float16", 16, "float16")
    assert np.prod(MANY) * image.size > 2**31

    def run(image, flow):
        return [extremes(warp(tiled(image, MANY), tiled(flow, MANY)), MANY)]

    expected = on_cpu(
        partial(reference.backward_warp, boundary="wrap"), image.astype(np.float64), flow
    )
    assert_each_copy_close(on_gpu(run, image, flow), expected, TOLERANCE["float16"])


@pytest.mark.large
def test_points_past_31_bits():
    """More than 2^31 pixels of float32, 8 GiB: sums into the four corners, samples of them, and
    slopes. A small canvas of the corners alone has the same."""
    side, large = 16, (46_400, 46_400)
    assert np.prod(large) > 2**31
    rng = np.random.default_rng(0)
    points = rng.integers(-64, (side + 1) * 64, (4000, 2)) / 64
    half = side // 2
    seam = ((points > half - 2) & (points < half + 1)).any(-1)  # what the canvas has put together
    points = points[~seam].astype(np.float32)
    far = points + (points > half) * (np.float32(large[::-1]) - side)
    values, ct = rng.standard_normal((2, len(points), 1)).astype(np.float32)

    def corners(module, shape):
        def run(values, points, ct):
            image = module.splat(values, points, shape)
            out, vjp = jax.vjp(lambda points: module.gather(image, points), points)
            ends = (slice(None, half), slice(-half, None))
            return jnp.block([[image[y, x, 0] for x in ends] for y in ends]), out, *vjp(ct)

        return run

    expected = on_cpu(
        corners(reference, (side, side)), *(a.astype(np.float64) for a in (values, points, ct))
    )
    cases.assert_close(on_gpu(corners(jaxwarp, large), values, far, ct), expected, SINGLE)


@pytest.mark.large
@pytest.mark.parametrize("op", ["backward_warp", "forward_warp"])
@pytest.mark.parametrize(
    ("dtype", "channels", "copies"),
    [("float32", 2, MANY), ("bfloat16", 16, FEWER)],
    ids=["float32", "bfloat16"],
)
def test_gradients_with_64_bit_indices(op, dtype, channels, copies):
    arrays = tiles(dtype, channels)
    assert np.prod(copies) * np.prod(TILE) * max(channels, 4) >= 2**29

    for options in [{}] if op == "backward_warp" else [{"reduce": "sum"}, {"reduce": "average"}]:

        def warp(module, options=options):
            return pulled(partial(getattr(module, op), boundary="wrap", **options))

        def run(*arrays, warp=warp):
            results = warp(jaxwarp)(*(tiled(a, copies) for a in arrays))
            return [extremes(result, copies) for result in results]

        expected = on_cpu(warp(reference), *(a.astype(np.float64) for a in arrays))
        assert_each_copy_close(on_gpu(run, *arrays), expected, 4 * TOLERANCE[dtype])


@pytest.mark.parametrize("in_axes", [(0, 0), (None, 0), (0, None)], ids=str)
def test_more_batches_than_blocks(in_axes):
    """A grid has 65535 blocks along y: the first of them take the last batch elements as well."""
    rng, shape = np.random.default_rng(0), (65_540, 3, 4, 2)
    arrays = rng.standard_normal(shape), rng.integers(-96, 96, shape) / 64
    arrays = [a if axis == 0 else a[0] for a, axis in zip(arrays, in_axes, strict=True)]

    def warps(module):
        def run(image, flow):
            return (
                module.backward_warp(image, flow, boundary="nearest"),
                module.forward_warp(image, flow, reduce="sum"),
                module.forward_warp(image, flow),
            )

        return cases.value_and_cotangents(jax.vmap(run, in_axes))

    expected = on_cpu(warps(reference), *arrays)
    cases.assert_close(on_gpu(warps(jaxwarp), *arrays), expected, AVERAGED)


@pytest.mark.parametrize("case", cases.FEW, ids=str)
def test_under_vmap_scan_and_second_order(case):
    arrays = case.inputs("inside")

    def run(module):
        function = case.function(module)

        def loss(*arrays):
            return sum(jnp.sum(jnp.sin(o)) for o in jax.tree.leaves(function(*arrays)))

        gradient = jax.grad(loss, 1)

        def step(points, _):
            return points + 0.01 * jnp.tanh(gradient(arrays[0], points, *arrays[2:])), None

        def everything(points):
            shifted = points + jnp.arange(3.0).reshape(3, *(1,) * points.ndim) / 128
            return (
                jax.vmap(lambda p: gradient(arrays[0], p, *arrays[2:]))(shifted),
                # A loop, so that XLA records the calls in a CUDA graph.
                jax.lax.scan(step, points + 1 / 256, None, length=5)[0],
                jax.jvp(
                    lambda p: gradient(arrays[0], p, *arrays[2:]),
                    (points + 1 / 128,),
                    (jnp.cos(points),),
                ),
            )

        return everything

    expected = on_cpu(run(reference), arrays[1])
    cases.assert_close(on_gpu(run(jaxwarp), arrays[1]), expected, 1e-9)


def test_values_alone_are_the_same_in_every_run():
    # A gather has no sum whose order could vary.
    rng = np.random.default_rng(0)
    image = rng.standard_normal((300, 400, 3)).astype(np.float32)
    flow = rng.uniform(-40, 40, (300, 400, 2)).astype(np.float32)
    warp = jax.jit(jaxwarp.backward_warp)
    first = np.asarray(warp(image, flow))
    for _ in range(3):
        np.testing.assert_array_equal(warp(image, flow), first)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("channels", [1, 2, 4])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_subnormal_numbers_are_kept_or_zero(dtype, channels, deterministic):
    """Of float32 numbers below 2^-126 nothing else may come. A GPU's atomic additions take such
    parts and sums as 0; on the CPU, XLA's threads take them so in every operation."""
    parts = np.random.default_rng(0).integers(1, 100, (2, 6, channels)) * 2.0**-133
    points = np.broadcast_to(np.stack([np.arange(6), np.zeros(6)], -1), (2, 6, 2)).astype("float32")

    def run(parts):
        image, gather = parts[:1], partial(jaxwarp.gather, deterministic=deterministic)
        sums = jaxwarp.splat(parts, points, (1, 6), deterministic=deterministic)
        out, vjp = jax.vjp(lambda image: gather(image, points[0]), image)
        return sums[0], out, vjp(parts[1])[0][0]

    actual = on_gpu(run, parts.astype(jnp.dtype(dtype)))
    for a, e in zip(actual, (parts.sum(0), parts[0], parts[1]), strict=True):
        e = e.astype(jnp.dtype(dtype)).astype(np.float64)
        a = np.asarray(a).astype(np.float64)
        np.testing.assert_array_equal(a, np.where(a == 0, 0, e))


@pytest.mark.parametrize("reduce", ["sum", "average", "softmax"])
def test_deterministic(reduce):
    """One set of bits in 20 runs, and without it at least two, or nothing is shown."""
    rng = np.random.default_rng(0)
    image = rng.standard_normal((200, 300, 3)).astype(np.float32)
    flow = rng.uniform(-40, 40, (200, 300, 2)).astype(np.float32)
    w = None if reduce == "sum" else rng.uniform(0.5, 1, (200, 300)).astype(np.float32)

    def results(deterministic):
        def run(image, flow):
            warped = jaxwarp.backward_warp(image, flow, deterministic=deterministic)
            moved = jaxwarp.forward_warp(
                image, flow, reduce=reduce, importance=w, deterministic=deterministic
            )
            return warped, moved

        compiled = jax.jit(cases.value_and_cotangents(run))
        runs = [compiled(image, flow) for _ in range(20)]
        return {b"".join(np.asarray(x).tobytes() for x in jax.tree.leaves(r)) for r in runs}, runs

    fixed, runs = results(True)
    assert len(fixed) == 1
    free, others = results(False)
    assert len(free) > 1
    cases.assert_close(runs[0], others[0], SINGLE)
