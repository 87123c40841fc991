"""Instructions of the kernels per point, which no other process disturbs: by Valgrind's callgrind.

`python -m benchmarks.instructions` prints a table in Markdown. Needs valgrind; takes minutes.
"""

import os
import re
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from benchmarks import ROOT, cases
from benchmarks.report import table

CHANNELS = (1, 3, 4, 64)
KERNELS = [
    *cases.of(operation=("backward_warp",), order=("value", "flow gradient", "all gradients")),
    *cases.of(operation=("forward_sum",)),
    *cases.of(operation=("forward_average", "forward_softmax"), order=("value", "all gradients")),
]
MEASURED = [replace(kernel, size=f"256x256x{c}") for kernel in KERNELS for c in CHANNELS]
CALLS = 5


def mark() -> None:
    """A call of a C function that nothing else calls: callgrind writes down what it has counted."""
    os.getpriority(os.PRIO_PROCESS, 0)


def run_all() -> None:
    from benchmarks.peers import with_jax

    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    for case in MEASURED:
        program = with_jax.build(peer="jaxwarp", case=case, threads=1)
        program.cold()  # compiles
        mark()
        for _ in range(CALLS):
            program.cold()
        mark()


def instructions(profile: Path) -> int:
    """Those that a profile counts inside the extension module itself."""
    total, inside, inclusive = 0, False, False
    names: dict[str, str] = {}
    for line in profile.read_text().splitlines():
        if found := re.match(r"(c?)ob=(\(\d+\))(?: (.*))?", line):  # a name is given once
            names.setdefault(found[2], found[3] or "")
            if not found[1]:
                inside = "_cpu." in names[found[2]]
        elif line.startswith("calls="):
            inclusive = True  # the next line is the cost of the function that is called
        elif re.match(r"[-+*\d]", line):
            total += 0 if inclusive or not inside else int(line.split()[1])
            inclusive = False
    return total


def main() -> None:
    if len(sys.argv) > 1:
        return run_all()
    with tempfile.TemporaryDirectory() as folder:
        profile = Path(folder) / "profile"
        command = ["valgrind", "--tool=callgrind", "--dump-before=getpriority"]
        command += [f"--callgrind-out-file={profile}", sys.executable, "-m", __spec__.name, "run"]
        flags = {"XLA_FLAGS": "--xla_cpu_max_isa=AVX2"}  # all that valgrind knows
        subprocess.run(command, cwd=ROOT, check=True, env=os.environ | flags)
        counts = [
            instructions(Path(f"{profile}.{2 * i + 2}")) / CALLS / case.pixels
            for i, case in enumerate(MEASURED)
        ]
    rows = []
    for i, kernel in enumerate(KERNELS):
        own = counts[i * len(CHANNELS) :][: len(CHANNELS)]
        rows.append([kernel.operation, kernel.order, *(f"{count:.0f}" for count in own)])
    print(table(["operation", "result", *(f"C = {c}" for c in CHANNELS)], rows))


if __name__ == "__main__":
    main()
