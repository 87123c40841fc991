"""What a call needs beside its inputs and outputs: peak resident set, each case in its own process.

`python -m benchmarks.memory` prints a table in Markdown. Needs Linux, which tells the peak.
"""

import json
import math
import subprocess
import sys
from pathlib import Path

from benchmarks import ROOT, cases
from benchmarks.cases import Case

MEASURED = cases.of(
    operation=("backward_warp", "forward_average", "forward_softmax"),
    order=("value", "all gradients"),
    size=("2160x3840x4",),
)


def resident(which: str) -> int:
    """Bytes of this process: VmRSS now, VmHWM at the highest."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(which)))


def measure(case: Case) -> dict:
    """Peak of one call, above what is resident with inputs alone, and the bytes of the results."""
    from benchmarks.peers import with_jax

    program = with_jax.build(peer="jaxwarp", case=case, threads=1)
    program.cold()  # compiles; arrays so large go back to the operating system when freed
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    results = program.cold()
    peak = resident("VmHWM") - before
    return {"peak": peak, "results": sum(result.nbytes for result in results)}


def main() -> None:
    if len(sys.argv) > 1:
        print(json.dumps(measure(Case(**json.loads(sys.argv[1])))))
        return
    head = ("case", "results (MB)", "peak of the call (MB)", "beside the results (MB)", "in planes")
    rows = [head, ("---",) * len(head)]
    for case in MEASURED:
        command = [sys.executable, "-m", "benchmarks.memory", json.dumps(vars(case))]
        out = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
        found = json.loads(out.splitlines()[-1])
        beside = found["peak"] - found["results"]
        plane = 4 * math.prod(case.spatial)  # of float32
        megabytes = [f"{x / 1e6:.0f}" for x in (found["results"], found["peak"], beside)]
        rows.append((str(case), *megabytes, f"{beside / plane:.1f}"))
    print(*("| " + " | ".join(row) + " |" for row in rows), sep="\n")


if __name__ == "__main__":
    main()
