"""The GPU's report where there is none: what it says, also when a step hangs or the run is killed.

`make gpu-rehearse` runs this file on a kit (JAXWARP_KIT), with a Python of its own
(JAXWARP_KIT_PYTHON).
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
KIT = Path(os.environ.get("JAXWARP_KIT", ROOT)).resolve()
RUN = next(path for path in (KIT / "run.py", KIT / "benchmarks/gpu/run.py") if path.exists())
PYTHON = os.environ.get("JAXWARP_KIT_PYTHON", sys.executable)
ENVIRONMENT = {**os.environ, "JAX_PLATFORMS": "", "CUDA_VISIBLE_DEVICES": ""}
ENVIRONMENT |= {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}  # it is the runner that is tested
FEW_FILES = 8  # they have to be copied back from the machine with the GPU

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="ends processes as Linux does")


def report_in(folder):
    """report.json, which must be whole at any time."""
    return json.loads((folder / "report.json").read_text())


def test_the_whole_report_without_a_gpu(tmp_path):
    command = [PYTHON, RUN, "--out", tmp_path, "--processes", "2", "--limits"]
    limits = [f"{step}=300" for step in ("smoke", "tests", "benchmark", "graph", "hashes")]
    run = subprocess.run(
        [*command, *limits], env=ENVIRONMENT, cwd=tmp_path, capture_output=True, text=True
    )
    report = report_in(tmp_path)
    steps = {name: step["status"] for name, step in report["steps"].items()}
    in_kit = {"install": "passed"} if KIT != ROOT else {}
    assert steps == in_kit | {
        "smoke": "could not run",
        "kernels": "FAILED" if KIT != ROOT else "could not run",  # there is no driver
        "tests": "could not run",
        "benchmark": "passed",
        "graph": "could not run",
        "hashes": "could not run",
        "ncu": "could not run",
        "sanitizer": "could not run",
    }, run.stdout + run.stderr
    assert report["tests"]["skipped"] > 500
    assert report["tests"]["reasons"] == {"needs a GPU": report["tests"]["skipped"]}
    assert report["tests"]["failed"] == 0
    ours = [entry for entry in report["cases"] if entry["peer"] == "jaxwarp"]
    assert len(ours) >= 2
    assert all(entry["correct"] for entry in ours)
    assert "cupy atomics" in report["benchmark"]["missing"]
    assert "JAX sees no GPU" in report["steps"]["smoke"]["output"]
    text = (tmp_path / "report.md").read_text()
    assert "not measured: cupy atomics: ModuleNotFoundError" in text
    assert "| tests | could not run" in text
    assert len([path for path in tmp_path.rglob("*") if path.is_file()]) <= FEW_FILES


KERNELS = """#!/bin/sh
echo '{"copy_gb_per_s": 3000.0}'
echo '{"kernel": "gather", "size": "16x24x3", "motion": "smooth", "ms": 1.5}'
"""
FOREVER = "setsid sleep 1001 & sleep 1002\n"  # a child that leaves its group
CHECK = "import sys; print('JAX sees no GPU'); sys.exit(77)\n"
TESTS = """
import pytest, time
pytestmark = pytest.mark.gpu
def test_right(): pass
def test_wrong(): assert 1 == 2
def test_last(): time.sleep({seconds})
"""
BENCHMARK = """
import json, sys, time
from pathlib import Path
out = Path(sys.argv[sys.argv.index("--out") + 1])
entry = {"peer": "jaxwarp", "case": {"operation": "backward_warp"}, "warm": {"median_ms": 1.0}}
entry["warm"] |= {"gb_per_s": 10.0, "to_copy": 2.0}
failed = {"peer": "torch", "case": {"operation": "backward_warp"}, "error": "ended, status -11"}
data = {"results": [entry, failed], "missing": {}}
(out / "results.json").write_text(json.dumps(data))
time.sleep(%d)
"""


@pytest.fixture
def small_kit(tmp_path):
    """A kit whose steps take no time; each can be made to hang."""

    def make(hanging=None):
        kit = tmp_path / "kit"
        (kit / "benchmarks/gpu").mkdir(parents=True)
        (kit / "tests").mkdir()
        shutil.copy(RUN, kit / "run.py")
        shutil.copy(KIT / "benchmarks/gpu/each_test.py", kit / "benchmarks/gpu")
        shutil.copy(KIT / "pyproject.toml", kit)
        (kit / "kernels").write_text(KERNELS + FOREVER * (hanging == "kernels"))
        (kit / "kernels").chmod(0o755)
        (kit / "benchmarks/__init__.py").write_text("")
        seconds = 1003 if hanging == "benchmark" else 0
        (kit / "benchmarks/__main__.py").write_text(BENCHMARK % seconds)
        (kit / "benchmarks/gpu/checks.py").write_text(CHECK)
        seconds = 1004 if hanging == "tests" else 0
        (kit / "tests/test_gpu.py").write_text(TESTS.format(seconds=seconds))
        return kit, tmp_path / "out"

    return make


def started(kit, out, *options):
    command = [PYTHON, kit / "run.py", "--out", out, "--processes", "2", *options]
    return subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.DEVNULL)


def until(condition, seconds=150):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "what was waited for did not come"
        time.sleep(0.05)


def running_in(folder):
    """The processes whose working directory is this folder, or one below it."""
    found = []
    for link in Path("/proc").glob("[0-9]*/cwd"):
        try:
            inside = Path(os.readlink(link)).is_relative_to(folder)
        except OSError:  # it has ended
            continue
        if inside:
            found.append(int(link.parent.name))
    return found


# Seconds that a step has; on a slow machine pytest takes some to start.
@pytest.mark.parametrize(("step", "limit"), [("kernels", 4), ("tests", 20), ("benchmark", 8)])
def test_a_step_that_hangs_is_ended_with_its_children(small_kit, step, limit):
    kit, out = small_kit(hanging=step)
    process = started(kit, out, "--limits", f"{step}={limit}")
    assert process.wait(timeout=200) == 1
    report = report_in(out)
    assert report["steps"][step]["status"] == f"stopped after {limit} s"
    assert running_in(kit) == []
    assert_what_was_done(report)
    assert report["tests"]["failed_ids"] == ["tests/test_gpu.py::test_wrong"]
    assert "assert 1 == 2" in report["tests"]["failures"]["tests/test_gpu.py::test_wrong"]
    assert report["steps"]["hashes"]["status"] == "could not run"  # the steps after it have run
    assert "torch, backward_warp: ended, status -11" in (out / "report.md").read_text()


def assert_what_was_done(report, last="sanitizer"):
    """All up to a step, and what it had done when it was stopped."""
    order = list(report["steps"])
    reached = order.index(last)
    if reached >= order.index("kernels"):
        assert report["copy_gb_per_s"] == 3000
        assert [entry["kernel"] for entry in report["kernels"]] == ["gather"]
    if reached >= order.index("tests"):
        assert report["tests"]["passed"] >= 1
    if reached >= order.index("benchmark"):
        assert [entry["peer"] for entry in report["cases"]] == ["jaxwarp", "torch"]


@pytest.mark.parametrize("kill", [signal.SIGTERM, signal.SIGKILL], ids=["TERM", "KILL"])
@pytest.mark.parametrize("step", ["kernels", "tests", "benchmark"])
def test_a_killed_run_has_told_what_it_did(small_kit, step, kill):
    kit, out = small_kit(hanging=step)
    process = started(kit, out)

    def told():
        if not (out / "report.json").exists():
            return False
        report = report_in(out)  # whole, at every moment
        key = {"kernels": "kernels", "tests": "tests", "benchmark": "cases"}[step]
        reached = report["steps"][step]["status"] == "running" and report.get(key)
        return reached and (step != "tests" or report["tests"]["passed"])

    until(told)
    process.send_signal(kill)
    process.wait(timeout=30)
    report = report_in(out)
    assert_what_was_done(report, last=step)
    stopped = "running" if kill == signal.SIGKILL else "stopped: stopped by SIGTERM"
    assert report["steps"][step]["status"] == stopped
    assert report["steps"]["hashes"]["status"] == "not started"
    if kill == signal.SIGTERM:
        assert running_in(kit) == []
    for pid in running_in(kit):  # of a child that no longer had a parent to end it
        os.kill(pid, signal.SIGKILL)


def test_a_missing_package_fails_its_step_alone(small_kit):
    kit, out = small_kit()
    (kit / "benchmarks/gpu/xdist.py").write_text("raise ImportError('no xdist here')")
    process = started(kit, out)
    assert process.wait(timeout=200) == 1
    report = report_in(out)
    assert report["steps"]["tests"]["status"] == "FAILED"
    assert "no xdist here" in report["steps"]["tests"]["output"]
    assert report["steps"]["benchmark"]["status"] == "passed"


def test_a_second_call_runs_what_failed(small_kit):
    kit, out = small_kit()
    assert started(kit, out).wait(timeout=200) == 1
    again = out.parent / "again"
    options = ["--only", "tests", "--failed", out / "report.json"]
    assert started(kit, again, *options).wait(timeout=200) == 1
    report = report_in(again)
    assert list(report["steps"]) == ["tests"]
    assert (report["tests"]["passed"], report["tests"]["failed"]) == (0, 1)
