"""Everything that only a GPU can tell, by one command of at most eight minutes: `make gpu-report`.

Needs an installed wheel and no network. Tests, compute-sanitizer, CUDA graphs, repeated runs, then
the benchmark with its peers; report.json, and a short table last that says what could not run.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks import ROOT

MINUTES = 8.0
TESTS = [sys.executable, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu"]
SHORT = ["tests/test_gpu.py", "-k", "test_any_number_of_channels and float32"]


class CannotRun(Exception):
    """Why a step says nothing: neither passed nor failed."""


def execute(command: list[str], *, limit: float, **environment: str) -> tuple[bool, str]:
    """Whether it succeeded, and its last lines."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    try:
        process = subprocess.run(
            command,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": path, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=limit,
        )
    except subprocess.TimeoutExpired:
        raise CannotRun(f"not finished after {limit:.0f} s") from None
    lines = process.stdout.strip().splitlines()
    if "No module named" in " ".join(lines[-1:]):
        raise CannotRun(lines[-1])
    return process.returncode == 0, "\n".join(lines[-15:])


def itself(step: str) -> Callable[[float], tuple[bool, str]]:
    """A step in a process of its own: what it does to the GPU ends with it."""
    return lambda limit: execute(
        [sys.executable, "-m", "benchmarks.gpu_report", "--step", step], limit=limit
    )


def tests(limit: float) -> tuple[bool, str]:
    return execute([*TESTS, "tests/test_gpu.py"], limit=limit, JAXWARP_REQUIRE_CUDA="1")


def sanitizer(limit: float) -> tuple[bool, str]:
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        raise CannotRun("no compute-sanitizer on PATH")
    command = [tool, "--tool", "memcheck", "--error-exitcode", "9", *TESTS, *SHORT]
    # One allocation for each array, so that a step past the end of one is seen.
    own = {"XLA_PYTHON_CLIENT_ALLOCATOR": "platform", "JAXWARP_REQUIRE_CUDA": "1"}
    return execute(command, limit=limit, **own)


def graph() -> bool:
    """Does XLA put the calls into a CUDA graph (a command buffer)?"""
    dump = Path(tempfile.mkdtemp())
    os.environ["XLA_FLAGS"] = (
        f"--xla_gpu_graph_min_graph_size=1 --xla_dump_to={dump} --xla_dump_hlo_as_text "
        "--xla_gpu_enable_command_buffer=FUSION,CUSTOM_CALL"
    )
    import jax
    import jax.numpy as jnp

    import jaxwarp

    image, flow = jnp.ones((64, 64, 3)), jnp.full((64, 64, 2), 1.5)
    run = jax.jit(lambda i, f: jaxwarp.forward_warp(jaxwarp.backward_warp(i, f), f))
    text = run.lower(image, flow).compile().as_text()
    for _ in range(3):  # a graph is recorded in a later call than the first
        run(image, flow).block_until_ready()
    blocks = [text, *(path.read_text(errors="ignore") for path in dump.glob("*.txt"))]
    blocks = [block for whole in blocks for block in whole.split("\n}\n")]
    found = [b for b in blocks if "command_buffer" in b.split("{")[0] and "jaxwarp_" in b]
    thunks = "".join(p.read_text(errors="ignore") for p in dump.glob("*thunk*"))
    shutil.rmtree(dump)
    print(f"{len(found)} computations named command_buffer with calls of jaxwarp")
    # An XLA that forms graphs after HLO shows them here alone.
    counts = {name: thunks.count(name) for name in ("CommandBuffer", "CustomCall")}
    print(f"in the sequence of thunks: {counts}")
    return bool(found)


def hashes() -> bool:
    """How many different results do ten equal runs have? One, where that is promised."""
    import jax
    import numpy as np

    import jaxwarp

    rng = np.random.default_rng(0)
    image = rng.random((256, 256, 3), np.float32)
    flow = rng.random((256, 256, 2), np.float32) * 64 - 32
    right = True
    for name, function, promised in (
        ("backward_warp", jaxwarp.backward_warp, True),
        ("forward_warp", jaxwarp.forward_warp, False),
        ("deterministic", lambda i, f: jaxwarp.forward_warp(i, f, deterministic=True), True),
    ):
        run = jax.jit(function)
        try:
            found = {
                hashlib.sha256(np.asarray(run(image, flow)).tobytes()).hexdigest()
                for _ in range(10)
            }
        except Exception as error:
            print(f"{name}: {type(error).__name__}: {error}".splitlines()[0])
            right = False
            continue
        print(f"{name}: {len(found)} different results in 10 runs")
        right &= len(found) == 1 or not promised
    return right


def device() -> str:
    """The name of the GPU; CannotRun where JAX sees none."""
    code = "import jax; print('GPU', jax.devices('gpu')[0].device_kind)"
    _, text = execute([sys.executable, "-c", code], limit=60)
    names = [line for line in text.splitlines() if line.startswith("GPU ")]
    if not names:
        raise CannotRun("JAX sees no GPU")
    return names[0].removeprefix("GPU ")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_report", description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "build/gpu", help="folder to write")
    parser.add_argument("--step", choices=["graph", "hashes"], help="this one, in this process")
    options = parser.parse_args()
    if options.step:
        return 0 if {"graph": graph, "hashes": hashes}[options.step]() else 1

    end = time.monotonic() + 60 * MINUTES
    out = options.out.resolve()

    def benchmark(limit: float) -> tuple[bool, str]:
        # It ends a case after its time, and the plot takes some; so a minute is left to it.
        command = [sys.executable, "-m", "benchmarks", "--out", str(out)]
        return execute([*command, "--minutes", str(max(limit - 60, 30) / 60)], limit=limit)

    # name: what to run, and the share of the time that is left then
    steps = {
        "GPU tests": (tests, 0.35),
        "compute-sanitizer": (sanitizer, 0.25),
        "calls in a CUDA graph": (itself("graph"), 0.2),
        "hashes of repeated runs": (itself("hashes"), 0.2),
        "benchmark": (benchmark, 1.0),
    }
    report: dict = {"steps": {}}
    try:
        report["device"] = device()
    except CannotRun as reason:
        report["device"], steps = None, dict.fromkeys(steps, (None, str(reason)))
    for name, (run, share) in steps.items():
        start = time.monotonic()
        try:
            if run is None:
                raise CannotRun(share)
            passed, text = run((end - start) * share)
            status = "passed" if passed else "FAILED"
        except CannotRun as reason:
            status, text = "could not run", str(reason)
        seconds = round(time.monotonic() - start, 1)
        report["steps"][name] = {"status": status, "seconds": seconds, "output": text}
        print(f"== {name}: {status}\n{text}\n", flush=True)
    if (out / "results.json").exists() and report["steps"]["benchmark"]["status"] == "passed":
        report["benchmark"] = json.loads((out / "results.json").read_text())
        figures = report["benchmark"]["results"]
        copies = [e["warm"]["gb_per_s"] for e in figures if e["peer"] == "copy" and "warm" in e]
        report |= {"copy_gb_per_s": max(copies)} if copies else {}
    out.mkdir(parents=True, exist_ok=True)
    (out / "report.json").write_text(json.dumps(report, indent=1))
    print(
        f"device: {report['device']}; copy: {report.get('copy_gb_per_s')} GB/s; {out}/report.json"
    )
    print("| step | result | seconds |\n| --- | --- | --- |")
    for name, step in report["steps"].items():
        why = f": {step['output']}" if step["status"] == "could not run" else ""
        print(f"| {name} | {step['status']}{why} | {step['seconds']} |")
    return 0 if all(step["status"] == "passed" for step in report["steps"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
