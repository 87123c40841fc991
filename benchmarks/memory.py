"""What a call needs beside its inputs and outputs: peak resident set, each case in its own process.

`python -m benchmarks.memory` prints a table in Markdown. Needs Linux, which tells what is resident.
"""

import gc
import json
import math
import resource
import subprocess
import sys
import threading
import time
from pathlib import Path

from benchmarks import ROOT, cases
from benchmarks.cases import Case
from benchmarks.report import table

MEASURED = cases.of(
    operation=("backward_warp", "forward_average", "forward_softmax"),
    order=("value", "all gradients"),
    size=("2160x3840x4",),
)


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def measure(case: Case) -> dict:
    """The highest of a call above what is resident with inputs alone, and the bytes of results."""
    from benchmarks.peers import with_jax

    program = with_jax.build(peer="jaxwarp", case=case, threads=1)
    program.cold()  # compiles
    gc.collect()
    time.sleep(1)  # arrays so large go back to the operating system, a while after the last use
    before, peak, ended = resident(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not ended.wait(5e-4):
            peak = max(peak, resident() - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    results = program.cold()
    ended.set()
    watcher.join()
    return {"peak": peak, "results": sum(result.nbytes for result in results)}


def main() -> None:
    if len(sys.argv) > 1:
        print(json.dumps(measure(Case(**json.loads(sys.argv[1])))))
        return
    head = ["case", "results (MB)", "peak of the call (MB)", "beside the results (MB)", "in planes"]
    rows = []
    for case in MEASURED:
        command = [sys.executable, "-m", "benchmarks.memory", json.dumps(vars(case))]
        out = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
        found = json.loads(out.splitlines()[-1])
        beside = found["peak"] - found["results"]
        plane = 4 * math.prod(case.spatial)  # of float32
        megabytes = [f"{x / 1e6:.0f}" for x in (found["results"], found["peak"], beside)]
        rows.append([str(case), *megabytes, f"{beside / plane:.1f}"])
    print(table(head, rows))


if __name__ == "__main__":
    main()
