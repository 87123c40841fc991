"""The smoke run of `make bench`: right results of every operation, and a missing peer is named."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
OPERATIONS = {
    "backward_warp",
    "grid_sample",
    "forward_average",
    "forward_sum",
    "forward_softmax",
}


def smoke_run(folder, cv2, *options):
    """The finished process, and the folder with its results; cv2: the source of OpenCV there."""
    (folder / "cv2.py").write_text(cv2)
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(folder)]),
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # it is the harness that is tested, not the speed
        "JAX_PLATFORMS": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
    }
    command = [sys.executable, "-m", "benchmarks", "--quick", "--out", str(folder / "out")]
    process = subprocess.run(
        [*command, *options],
        env=environment,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=600,
    )
    return process, folder / "out"


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    return smoke_run(tmp_path_factory.mktemp("bench"), "raise ImportError('no OpenCV here')")


# What a call of OpenCV does, in a process of its own.
@pytest.mark.parametrize(
    ("remap", "error", "left_out"),
    [("os._exit(3)", "ended, status 3", False), ("time.sleep(1000)", "no answer in 30 s", True)],
    ids=["ends", "hangs"],
)
def test_a_failing_peer_costs_no_other_result(tmp_path, remap, error, left_out):
    cv2 = f"""
import os, time
__version__, INTER_LINEAR, BORDER_CONSTANT = "0", 1, 0
def setNumThreads(count): pass
def remap(*arguments): {remap}
"""
    options = ["--only", "3 flows", "--peers", "xla", "opencv", "--patience", "30"]
    process, folder = smoke_run(tmp_path, cv2, *options)
    assert process.returncode == 1, process.stdout + process.stderr
    data = json.loads((folder / "results.json").read_text())
    found = {entry["peer"]: entry for entry in data["results"]}
    assert found["opencv"]["error"] == error
    assert all(found[peer]["correct"] for peer in ("jaxwarp", "xla"))
    assert ("opencv" in data["missing"]) == left_out


def test_every_operation_is_timed_and_right(smoke):
    process, folder = smoke
    assert process.returncode == 0, process.stdout + process.stderr
    results = json.loads((folder / "results.json").read_text())["results"]
    ours = [entry for entry in results if entry["peer"] == "jaxwarp"]
    assert {entry["case"]["operation"] for entry in ours} == OPERATIONS
    assert {entry["case"]["dtype"] for entry in ours} == {"float32", "bfloat16", "float64"}
    for entry in ours:
        assert entry["correct"]
        assert entry["warm"]["median_ms"] > 0
        assert entry["cold"]["to_copy"] > 0
    assert not any("error" in entry for entry in results)


def test_a_missing_peer_is_named(smoke):
    process, folder = smoke
    assert "opencv (ImportError: no OpenCV here)" in process.stdout
    assert "opencv (ImportError: no OpenCV here)" in (folder / "results.md").read_text()
    assert "opencv" in json.loads((folder / "results.json").read_text())["missing"]


def test_a_wrong_result_is_an_error(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks.__main__ import difference

    assert difference([[1.0, 2.0]], [[1.0, 2.0]]) == 0
    assert difference([[1.0, 2.1]], [[1.0, 2.0]]) > 0.02
    assert difference([[1.0, float("nan")]], [[1.0, 2.0]]) == float("inf")
    assert difference([], [[1.0, 2.0]]) == float("inf")
