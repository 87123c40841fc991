"""The training example over two processes on this machine: the gradients of one process."""

import socket
import subprocess
import sys
from pathlib import Path

import numpy as np

SCRIPT = Path(__file__).resolve().parents[1] / "examples" / "train_distributed.py"


def start(*arguments):
    command = [sys.executable, "-P", str(SCRIPT), *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(*processes):
    outputs = []
    try:
        for process in processes:
            outputs.append(process.communicate(timeout=240)[0])
    finally:
        for process in processes:
            process.kill()  # a process whose peer has died would wait for it
    assert [p.returncode for p in processes] == [0] * len(processes), "\n".join(outputs)
    return outputs


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def results(path):
    with np.load(path) as file:
        return [file[name] for name in file.files]


def test_two_processes_have_the_gradients_of_one(tmp_path):
    finish(start("--gradients", tmp_path / "one.npz"))
    coordinator = f"127.0.0.1:{free_port()}"
    finish(
        *(
            start(
                *("--processes", 2, "--process", i, "--coordinator", coordinator),
                *("--gradients", tmp_path / f"two{i}.npz"),
            )
            for i in (0, 1)
        )
    )
    one = results(tmp_path / "one.npz")
    assert len(one) == 9 and all(np.any(x != 0) for x in one)
    for i in (0, 1):
        for a, b in zip(results(tmp_path / f"two{i}.npz"), one, strict=True):
            # float32, summed in another order
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max())


def test_training_lowers_the_loss():
    (output,) = finish(start("--steps", 41))
    shares = [int(line.split()[2].rstrip("%")) for line in output.splitlines() if "step" in line]
    assert shares[-1] < 85 < shares[0], output
