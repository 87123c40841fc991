"""benchmarks/gpu/kernels.cu, compiled for the host over tests/cuda_shim: its lines and options, and
its checksums against the reference. Its times say nothing here.
"""

import fcntl
import json
import math
import os
import re
import shlex
import shutil
import subprocess
from itertools import product
from pathlib import Path

import jax
import numpy as np
import pytest
from remembered import remembered

from jaxwarp import reference

ROOT = Path(__file__).resolve().parents[1]
# Single channels and packs of four; large enough for points of the random motion to stay inside.
SIZES = [(45, 67, 3), (32, 40, 4)]
MOTIONS = ["smooth", "random"]
# By result: how many arrays of (H, W, C), (H, W, 2) and (H, W) the kernel reads and writes.
KERNELS = {
    "gather": (("values",), (2, 1, 0)),
    "gather_vjp": (("ct_image", "ct_points"), (3, 2, 0)),
    "gather_vjp flow": (("ct_points",), (2, 2, 0)),
    "splat average": (("image", "coverage"), (2, 1, 1)),
    "splat_vjp average": (("ct_values", "ct_points"), (4, 2, 1)),
}
# A result is a few float32 operations away from the reference in float64. The adjoint of an average
# may divide what is left of numbers that cancel by little; a tenth of this has been seen there.
TOLERANCE = 1e-6

compiler = shlex.split(os.environ.get("CXX", "c++"))
if shutil.which(compiler[0]) is None and not os.environ.get("CI"):
    pytest.skip(f"needs a C++ compiler, found no {compiler[0]}", allow_module_level=True)


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """The benchmark; the processes of pytest-xdist share one."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    built = folder / "kernels"
    options = ["-std=c++17", "-O0", "-Wall", "-Wextra", "-Wno-psabi", "-ffp-contract=off"]
    options += shlex.split(os.environ.get("CXXFLAGS", ""))
    options += ["-DJAXWARP_CUDA_SHIM=900", f"-I{ROOT / 'tests' / 'cuda_shim'}"]
    options += ["-isystem", jax.ffi.include_dir()]
    launcher = shlex.split(os.environ.get("CMAKE_CXX_COMPILER_LAUNCHER", ""))
    with open(folder / "kernels.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not built.exists():
            source = ROOT / "benchmarks" / "gpu" / "kernels.cu"
            compiled = folder / "kernels.o"
            options += ["-c", "-x", "c++", source, "-o", compiled]
            subprocess.run([*launcher, *compiler, *options], check=True)
            subprocess.run([*compiler, compiled, "-o", built], check=True)
    return built


def run(program, *options):
    """(exit status, the lines of its output, its errors)."""
    done = subprocess.run([program, *options], capture_output=True, text=True, timeout=300)
    return done.returncode, [json.loads(line) for line in done.stdout.splitlines()], done.stderr


def size_text(size):
    return "x".join(map(str, size))


@pytest.fixture(scope="module")
def lines(program):
    sizes = ",".join(map(size_text, SIZES))
    status, lines, errors = run(program, "--sizes", sizes, "--copy-bytes", "1000000")
    assert status == 0, errors
    return lines


def key(line):
    return line["kernel"], line["size"], line["motion"]


def test_every_kernel_is_timed(lines):
    device, copy, *kernels = lines
    assert set(device) == {"device", "compute_capability", "driver", "runtime"}
    assert set(copy) == {"copy_gb_per_s"}
    expected = product(KERNELS, map(size_text, SIZES), MOTIONS)
    assert sorted(map(key, kernels)) == sorted(expected)
    for line in kernels:
        names, counts = KERNELS[line["kernel"]]
        height, width, channels = map(int, line["size"].split("x"))
        pixel = np.dot(counts, (channels, 2, 1))
        assert line["bytes"] == 4 * height * width * pixel
        assert line["ms"] > 0
        assert line["gb_per_s"] == pytest.approx(line["bytes"] / line["ms"] / 1e6, rel=1e-4)
        assert line["to_copy"] == pytest.approx(copy["copy_gb_per_s"] / line["gb_per_s"], rel=1e-4)
        for checksums in line["sums"], line["norms"]:
            assert tuple(checksums) == names
            assert all(map(math.isfinite, checksums.values()))


def hashed(count, seed):
    """MurmurHash3's last step, of every element's number."""
    h = np.arange(count, dtype=np.uint32) + np.uint32(seed * 0x9E3779B9 % 2**32)
    h = (h ^ h >> 16) * np.uint32(0x85EBCA6B)
    h = (h ^ h >> 13) * np.uint32(0xC2B2AE35)
    return h ^ h >> 16


def inputs(size, motion):
    """The benchmark's image, flow and cotangent, in float64."""
    height, width, _ = size
    image, ct = ((hashed(np.prod(size), s) >> 8).reshape(size) / 2**24 for s in (0, 1))
    if motion == "random":
        step = (hashed(height * width * 2, 2) >> 21).reshape(height, width, 2) - 1024.0
    else:
        y, x = np.mgrid[:height, :width]
        angle = 2 * np.pi * (x / width + y / height)[..., None] + [1, 3]
        step = np.floor(128 * np.sin(angle))
    return image, (2 * step + 1) / 32, ct - 0.5


def expected_results(size, motion):
    """By kernel, its results in the order of KERNELS, from the reference."""
    image, flow, ct = inputs(size, motion)
    values, gather_vjp = jax.vjp(reference.backward_warp, image, flow)
    (splatted, coverage), splat_vjp = jax.vjp(
        lambda *arrays: reference.forward_warp(*arrays, return_coverage=True), image, flow
    )
    gradients = gather_vjp(ct)
    return {
        "gather": (values,),
        "gather_vjp": gradients,
        "gather_vjp flow": gradients[1:],
        "splat average": (splatted, coverage),
        "splat_vjp average": splat_vjp((ct, np.zeros_like(coverage))),
    }


@pytest.mark.parametrize("motion", MOTIONS)
@pytest.mark.parametrize("size", SIZES, ids=size_text)
def test_checksums(lines, size, motion):
    found = {key(line): line for line in lines[2:]}
    expected = remembered(lambda: expected_results(size, motion))
    for kernel, results in expected.items():
        line = found[kernel, size_text(size), motion]
        for name, result in zip(KERNELS[kernel][0], results, strict=True):
            absolute = float(np.abs(result).sum())
            assert absolute > 0
            sums, norm = float(np.sum(result)), float(np.linalg.norm(np.ravel(result)))
            assert line["sums"][name] == pytest.approx(sums, rel=0, abs=TOLERANCE * absolute)
            assert line["norms"][name] == pytest.approx(norm, rel=TOLERANCE)


def test_once(program, lines):
    """No times; and what reads the results of a kernel that is left out still has them."""
    kernels = ["splat_vjp average", "gather"]
    options = ["--once", "--motion", "smooth", "--sizes", size_text(SIZES[0])]
    status, [_, *found], _ = run(program, *options, "--kernels", ",".join(kernels))
    assert status == 0
    assert sorted(line["kernel"] for line in found) == sorted(kernels)
    timed = {key(line): line for line in lines[2:]}
    for line in found:
        same = timed[key(line)]
        assert line == {name: same[name] for name in same if name in line}
        assert set(same) - set(line) == {"ms", "gb_per_s", "to_copy"}


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (["--sizes", "16x24x3,16x24"], "--sizes: expected HxWxC, .* received '16x24'"),
        (["--sizes", "16x0x3"], "--sizes: expected HxWxC, .* received '16x0x3'"),
        (["--sizes", "65536x65536x3"], "at most 2.31 elements, received '65536x65536x3'"),
        (["--kernels", "gather,splat"], "--kernels: expected some of gather, .* received 'splat'"),
        (["--motion", "still"], "--motion: expected smooth or random, received 'still'"),
        (["--copy-bytes", "1e9"], "--copy-bytes: expected a number .* received '1e9'"),
        (["--motion"], "--motion: expected a value, received none"),
        (["--twice"], "expected --sizes, .* received '--twice'"),
    ],
)
def test_bad_options(program, options, error):
    status, [line], errors = run(program, *options)
    assert status == 1
    assert re.search(error, line["error"])
    assert errors == f"kernels: {line['error']}\n"
