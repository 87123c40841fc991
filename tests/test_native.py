"""The handlers under sanitizers, called by tests/native/driver.cc, without Python or XLA.

The builds take minutes, so this runs where JAXWARP_SANITIZE says what to build: "few" kernels, as
CI does, or "all" (`make sanitize`). JAXWARP_SANITIZE_SECONDS is the time of each run. Where nvcc
is, what it compiles for a GPU is interpreted too.
"""

import fcntl
import os
import re
import shutil
import subprocess
from functools import cache
from pathlib import Path

import jax
import pytest

EXTENT = os.environ.get("JAXWARP_SANITIZE")
SECONDS = os.environ.get("JAXWARP_SANITIZE_SECONDS", "10" if EXTENT == "few" else "15")
if EXTENT not in ("few", "all"):
    pytest.skip("needs JAXWARP_SANITIZE=few or all", allow_module_level=True)

NVCC = shutil.which("nvcc")
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="needs nvcc, to compile for a GPU")

ROOT = Path(__file__).resolve().parents[1]
MEMORY, RACES = "address,undefined", "thread"
# What each build has, and what the driver may therefore draw. A race is as likely in one method or
# dtype as in another.
KERNELS = {
    ("few", MEMORY): (("Linear",), (2, 3), True),
    ("few", RACES): (("Linear",), (2,), True),
    ("all", MEMORY): (("Nearest", "Linear", "Cubic"), (2, 3), False),
    ("all", RACES): (("Linear", "Cubic"), (2, 3), True),
}


@cache
def build(sanitizers):
    methods, dims, float32_only = KERNELS[EXTENT, sanitizers]
    native = ROOT / "build" / "native"
    folder = native / f"{EXTENT}-{sanitizers.replace(',', '-')}"
    definitions = {
        "JAXWARP_XLA_INCLUDE_DIR": jax.ffi.include_dir(),
        "JAXWARP_SANITIZE": sanitizers,
        "JAXWARP_METHODS": ";".join(methods),
        "JAXWARP_DIMS": ";".join(map(str, dims)),
        "JAXWARP_FLOAT32_ONLY": "ON" if float32_only else "OFF",
        "JAXWARP_PTX": "ON" if sanitizers == MEMORY and NVCC else "OFF",
    }
    defined = [f"-D{name}={value}" for name, value in definitions.items()]
    native.mkdir(parents=True, exist_ok=True)
    with (native / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # a build takes all processors
        source = ROOT / "tests" / "native"
        subprocess.run(["cmake", "-S", source, "-B", folder, *defined], check=True)
        jobs = str(os.cpu_count())
        subprocess.run(["cmake", "--build", folder, "--parallel", jobs], check=True)
    return folder


def drive(sanitizers, *, cpu="cpu", cuda=None, fault="", ptx="", **options):
    """(exit status, output) of the driver. `ptx`: how tests/native/ptx_runtime.cc runs."""
    methods, dims, float32_only = KERNELS[EXTENT, sanitizers]
    folder = build(sanitizers)
    options |= {
        "cpu": folder / f"lib{cpu}.so",
        "methods": ",".join(methods).lower(),
        "dims": ",".join(map(str, dims)),
        "dtypes": "float32" if float32_only else "float32,float64,bfloat16,float16",
    }
    if cuda:
        options["cuda"] = folder / f"lib{cuda}.so"
    command = [folder / "driver"]
    for name, value in options.items():
        command += [f"--{name}", str(value)]
    environment = {**os.environ, "JAXWARP_FAULT": fault, "JAXWARP_PTX_MODE": ptx}
    done = subprocess.run(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600 + float(SECONDS),  # so long only if it hangs
    )
    print(done.stdout)
    return done.returncode, done.stdout


def counts(output):
    """Of what the driver did, in the order of its last line."""
    return [int(n) for n in re.findall(r"(\d+) (?:cases|calls|without|compared)", output)]


def test_memory():
    status, output = drive(MEMORY, cuda="cuda_host", seconds=SECONDS)
    assert status == 0
    assert min(counts(output)) > 0  # cases, calls, refused, out of memory, compared with CUDA


@needs_nvcc
@pytest.mark.parametrize("ptx", ["", "races backwards"])
def test_device_code(ptx):
    """What nvcc compiles for a GPU, interpreted, computes what the CPU's kernels do."""
    status, output = drive(MEMORY, cuda="cuda_ptx", ptx=ptx, seconds=SECONDS)
    assert status == 0
    assert counts(output)[-1] > 0


@pytest.mark.parametrize("callers", [1, 3])
def test_races(callers):
    status, output = drive(RACES, seconds=SECONDS, threads=callers)
    assert status == 0
    assert min(counts(output)[:3]) > 0


@pytest.mark.parametrize(
    ("sanitizers", "fault", "report"),
    [
        (MEMORY, "too long", "AddressSanitizer: heap-buffer-overflow"),
        (MEMORY, "overflow", "runtime error: signed integer overflow"),
        (MEMORY, "too short", "values differs: another thread count, other memory"),
        (MEMORY, "threads", "values differs: another thread count, other memory"),
        (MEMORY, "input", "an input was written to"),
        (MEMORY, "no name", "an error that does not name the handler"),
        (MEMORY, "throws", "refused: jaxwarp_gather: not enough memory for its scratch"),
        (RACES, "race", "ThreadSanitizer: data race"),
    ],
)
def test_faults_are_found(sanitizers, fault, report):
    """A handler with a fault; and without one, nothing is found in it."""
    status, output = drive(sanitizers, cpu="faulty", fault=fault, calls=4000)
    assert status != 0
    assert report in output
    status, output = drive(sanitizers, cpu="faulty", calls=500)
    assert status == 0, output


def test_faults_between_cpu_and_cuda():
    """What the CUDA kernels compute is compared: a faulty handler in their place is found."""
    status, output = drive(MEMORY, cpu="cpu", cuda="faulty", calls=4000)
    assert status != 0
    assert re.search(r"driver: case \d+: (values differs: CPU and CUDA|CUDA: another)", output)


def test_faults_between_machines(tmp_path):
    """What differs from another machine's results, to the last bit, or is missing: it is found."""
    file = tmp_path / "results"
    calls = {"cpu": "faulty", "calls": 500}
    assert drive(MEMORY, **calls, write=file)[0] == 0
    status, output = drive(MEMORY, **calls, expect=file)
    assert status == 0
    assert re.search(r"another machine: [1-9]\d* with the same bits, [1-9]\d* close", output)
    status, output = drive(MEMORY, **calls, fault="last bit", expect=file)
    assert status != 0
    assert "differs: another machine" in output
    there = file.read_bytes()
    for changed, report in [
        (change(there, 1000), "of 0xfa as a float: 0x377a0000, expected 0x377a0040"),
        (change(there, 300_001), "as a half: "),
        (change(there, -1), "differs: another machine"),
        (there[:-1], "expected a file with the results of these calls"),
    ]:
        file.write_bytes(changed)
        status, output = drive(MEMORY, **calls, expect=file)
        assert status != 0
        assert report in output
    assert drive(MEMORY, **calls, write=file, expect=file)[0] != 0


def test_no_case_is_a_failure():
    status, output = drive(MEMORY, cpu="faulty", calls=0)
    assert status != 0
    assert "expected cases, got none" in output


def change(data, place):
    changed = bytearray(data)
    changed[place] ^= 0x40
    return changed


@needs_nvcc
@pytest.mark.parametrize(
    ("fault", "report"),
    [
        ("misaligned", "a misaligned address for an access of 2 bytes at `st.global"),
        ("outside", "an access outside of a heap block at `st.global"),
        ("mask", "a shuffle from a lane that is not in the mask at `shfl.sync"),
        ("missing lane", "a shuffle that not all lanes of its mask come to at `shfl.sync"),
        ("wrong lane", "values differs: CPU and CUDA"),
        ("zero", "a division by zero at `div"),
        ("unwritten", "an operand that was never written at `st.global"),
        ("race", "a race: what a thread writes is accessed by another one at `st.global"),
    ],
)
def test_faults_in_device_code(fault, report):
    """A kernel with a fault, interpreted; and without one, nothing is found in it."""
    faulty = {"cpu": "faulty", "cuda": "faulty_ptx", "ptx": "races", "calls": 500}
    status, output = drive(MEMORY, fault=fault, **faulty)
    assert status != 0
    assert report in output
    status, output = drive(MEMORY, **faulty)
    assert status == 0, output
    assert counts(output)[-1] > 0
