"""All that only a GPU can tell, by one command of seven minutes: `python3 run.py --out FOLDER`.

It needs Python's own library alone, no network, and no more than a wheel of jaxwarp beside it (in
the folder that `make gpu-kit` fills) or an installed jaxwarp (`make gpu-report`). Each step runs in
processes of its own and ends, with all its children, at its limit. report.json and report.md are
written anew whenever a step or a part of it ends, so that a run that is stopped has told the most.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE if (HERE / "benchmarks").is_dir() else HERE.parents[1]
TOOLS = ROOT / "benchmarks/gpu"
# kernels.cu, compiled
KERNELS = Path(os.environ.get("JAXWARP_KERNELS_BENCHMARK", HERE / "kernels")).resolve()
CUDA = "/usr/local/cuda/bin"
CANNOT = 77  # the exit status of a step that can say nothing here: automake's of a skipped test

# The steps, in the order of their worth, and the seconds that each has: seven minutes in all.
LIMITS = {
    "install": 15.0,
    "smoke": 20.0,
    "kernels": 25.0,
    "tests": 100.0,
    "benchmark": 150.0,
    "graph": 15.0,
    "hashes": 15.0,
    "ncu": 40.0,
    "sanitizer": 40.0,
}

SECTIONS = (
    "SpeedOfLight",
    "MemoryWorkloadAnalysis",
    "MemoryWorkloadAnalysis_Tables",
    "SchedulerStats",
    "WarpStateStats",
    "InstructionStats",
    "LaunchStats",
    "Occupancy",
)
# Of ncu's metrics those that tell what limits a kernel.
METRICS = {
    "gpu__time_duration.sum": "time",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed": "SM %",
    "gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed": "DRAM %",
    "l1tex__throughput.avg.pct_of_peak_sustained_active": "L1 %",
    "lts__throughput.avg.pct_of_peak_sustained_elapsed": "L2 %",
    "smsp__issue_active.avg.pct_of_peak_sustained_active": "issue %",
    "smsp__inst_executed.sum": "warp instructions",
    "lts__d_atomic_input_cycles_active.avg.pct_of_peak_sustained_elapsed": "L2 atomics %",
    "lts__xbar2lts_cycles_active.avg.pct_of_peak_sustained_elapsed": "crossbar to L2 %",
    "lts__t_sectors_srcunit_tex_op_red.sum": "sectors of atomics",
    "smsp__average_warps_issue_stalled_long_scoreboard_per_issue_active.ratio": "stalled on memory",
    "dram__bytes_read.sum": "DRAM read",
    "dram__bytes_write.sum": "DRAM written",
    "launch__registers_per_thread": "registers",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "occupancy %",
}


@dataclass
class Step:
    name: str  # of LIMITS
    commands: list[list[str]] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)
    missing: str = ""  # why it cannot run here


def python(*arguments: str) -> list[str]:
    return [sys.executable, "-u", *arguments]  # unbuffered: what is printed is in the log


def tool(name: str) -> str | None:
    return shutil.which(name) or shutil.which(name, path=CUDA)


def steps(options: argparse.Namespace, gpu: bool, earlier: dict) -> list[Step]:
    """In the order of LIMITS."""
    required = {"JAXWARP_REQUIRE_CUDA": "1"} if gpu else {}
    shared = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}  # several processes on one GPU
    wheels = sorted(map(str, HERE.glob("*.whl")))
    install = python("-m", "pip", "install", "-q", "--no-index", "--no-deps", "--force-reinstall")
    checks = str(TOOLS / "checks.py")

    pytest = python("-P", "-m", "pytest", "-q", "-p", "no:cacheprovider")
    one_by_one = [*pytest, "-p", "each_test"]
    many = [*one_by_one, "-n", str(options.processes), "--max-worker-restart=4"]
    tests = earlier.get("tests", {}).get("failed_ids") or ["tests/test_gpu.py"]
    each_test = {"PYTHONPATH": str(TOOLS), "JAXWARP_EACH_TEST": str(options.out / "tests.jsonl")}

    bench = python("-m", "benchmarks", "--out", str(options.out), "--seconds", "0.2")
    if gpu:
        bench += ["--gpu", "--patience", "40"]
    else:
        bench += ["--quick", "--only", "backward_warp"]
        bench += ["--peers", "xla", "torch", "torch.compile", "cupy atomics"]

    once = [str(KERNELS), "--once", "--motion", "smooth"]
    ncu = [tool("ncu") or "", "--clock-control", "none", "--csv", "--page", "raw"]
    ncu += ["--kernel-name", "regex:gather|splat|normalise"]
    ncu += [word for section in SECTIONS for word in ("--section", section)]
    sanitizer = [tool("compute-sanitizer") or "", "--report-api-errors", "no"]
    sanitizer += ["--error-exitcode", "9", "--tool"]
    small = [*once, "--sizes", "61x67x3,33x35x17,40x40x64,16x2x4"]
    three = [f"tests/test_gpu.py::test_any_number_of_channels[{n}-float32]" for n in (3, 17, 64)]
    apart = {"XLA_PYTHON_CLIENT_ALLOCATOR": "platform"}  # so that a step past an array is seen

    binary = "" if KERNELS.exists() else f"no compiled kernels.cu at {KERNELS}"

    def lacking(name: str) -> str:
        if not gpu:
            return "no GPU here"
        return binary or ("" if tool(name) else f"no {name} on PATH or in {CUDA}")

    planned = [
        Step("install", [[*install, *wheels]]),
        Step("smoke", [python(checks, "smoke")], shared),
        Step("kernels", [[str(KERNELS)]], missing=binary),
        Step(
            "tests",
            [
                [*many, "-m", "gpu and not large", *tests],
                [*one_by_one, "-m", "gpu and large", *tests],
            ],
            shared | required | each_test,
        ),
        Step("benchmark", [bench], shared | {"PYTHONPATH": str(ROOT)}),
        Step("graph", [python(checks, "graph")], shared),
        Step("hashes", [python(checks, "hashes")], shared),
        Step("ncu", [[*ncu, *once, "--sizes", "1080x1920x3,1080x1920x64"]], missing=lacking("ncu")),
        Step(
            "sanitizer",
            [
                [*sanitizer, "memcheck", *small],
                [*sanitizer, "racecheck", *small],
                [*sanitizer, "memcheck", "--kernel-name", "kns=jaxwarp", *pytest, *three],
            ],
            apart | required,
            missing=lacking("compute-sanitizer"),
        ),
    ]
    return planned if wheels else planned[1:]  # where there is no kit, jaxwarp is installed


def main() -> int:
    options = arguments()
    options.out.mkdir(parents=True, exist_ok=True)
    earlier = json.loads(options.failed.read_text()) if options.failed else {}
    report = Report(options.out)
    # Whatever a step starts comes to this process when its own parent ends, so that none is lost.
    prctl(36, 1)  # PR_SET_CHILD_SUBREAPER
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped by SIGTERM"))
    gpu = card(report)
    planned = [step for step in steps(options, gpu, earlier) if step.name in options.only]
    report.steps = {step.name: {"status": "not started"} for step in planned}
    try:
        for step in planned:
            execute(step, report, options.limits[step.name])
    finally:
        end_children()
        report.write()
        print(report.text())
    good = ("passed", "could not run")
    return 0 if all(entry["status"] in good for entry in report.steps.values()) else 1


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--only", nargs="+", choices=LIMITS, default=[*LIMITS], metavar="STEP",
                        help="of " + ", ".join(LIMITS))  # fmt: skip
    parser.add_argument("--failed", type=Path, metavar="REPORT",
                        help="run the tests alone that failed in this report.json")  # fmt: skip
    parser.add_argument("--processes", type=int, default=12, help="of the tests")
    parser.add_argument("--limits", nargs="*", default=[], metavar="STEP=SECONDS")
    options = parser.parse_args()
    options.out = options.out.resolve()
    limits = {name: float(s) for name, s in (limit.split("=") for limit in options.limits)}
    if unknown := limits.keys() - LIMITS.keys():
        parser.error(f"--limits: expected steps of {', '.join(LIMITS)}, got {', '.join(unknown)}")
    options.limits = LIMITS | limits
    return options


def card(report: Report) -> bool:
    """Is there a GPU? Its name and driver go into the report."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        return False
    command = [
        "nvidia-smi",
        "--query-gpu=name,driver_version,memory.total",
        "--format=csv,noheader",
    ]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
        name, driver, memory = found.stdout.splitlines()[0].split(", ")
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return False
    report.facts |= {"device": name, "driver": driver, "memory": memory}
    return True


def execute(step: Step, report: Report, limit: float) -> None:
    entry: dict = {"status": "running"}
    report.steps[step.name] = entry
    report.write()
    start = time.monotonic()
    report.begin(step.name)
    if step.missing:
        entry |= {"status": "could not run", "output": step.missing}
        report.write()
        return
    try:
        statuses: set[int | None] = set()
        for command in step.commands:
            if None not in statuses:
                statuses.add(follow(command, step, report, start + limit))
        report.write()
        if None in statuses:
            kind = f"stopped after {limit:.0f} s"
        elif statuses - {0, CANNOT}:
            kind = "FAILED"
        elif CANNOT in statuses or (step.name == "tests" and not report.any_passed()):
            kind = "could not run"  # of skipped tests it stands with their number why
        else:
            kind = "passed"
    except OSError as error:
        kind = "could not run"
        print(error, file=report.log, flush=True)
    except BaseException as error:
        kind = f"stopped: {error}"
        raise
    finally:
        end_children()
        entry |= {"status": kind, "seconds": round(time.monotonic() - start, 1)}
        if kind != "passed":  # what a good step printed is in the log
            entry["output"] = "\n".join(report.printed().strip().splitlines()[-25:])
        report.write()
        print(f"== {step.name}: {kind}, {entry['seconds']} s", flush=True)


def follow(command: list[str], step: Step, report: Report, end: float) -> int | None:
    """The exit status; None where the command was still running at the end."""
    print("$", *command, file=report.log, flush=True)
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | {"JAXWARP_TEST_CACHE": "off"} | step.environment,
        stdin=subprocess.DEVNULL,
        stdout=report.log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        preexec_fn=lambda: prctl(1, signal.SIGKILL),  # PR_SET_PDEATHSIG: it ends with this process
    )
    while time.monotonic() < end:
        try:
            status = process.wait(timeout=min(1.0, max(end - time.monotonic(), 0.01)))
            if status not in (0, CANNOT):
                print(f"exit status {status}", file=report.log, flush=True)
            return status
        except subprocess.TimeoutExpired:
            report.refresh()
    return None


def end_children() -> None:
    """Ends all that descends from this process: first politely, so that logs are written."""
    for what, patience in ((signal.SIGTERM, 2.0), (signal.SIGKILL, 2.0)):
        end = time.monotonic() + patience
        for pid in descendants():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, what)
        while time.monotonic() < end:
            try:
                if os.waitpid(-1, os.WNOHANG)[0] == 0:
                    time.sleep(0.05)
            except ChildProcessError:  # there is none left
                return


def descendants() -> list[int]:
    """Of this process: children after those that they have themselves."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = stat.read_text(errors="replace").rpartition(")")[2].split()[1]
        except OSError:  # it has ended
            continue
        children.setdefault(int(parent), []).append(int(stat.parent.name))
    found = [os.getpid()]
    for pid in found:
        found += children.get(pid, [])
    return found[:0:-1]


def prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value)


class Report:
    """What is known so far; report.json and report.md are always whole."""

    def __init__(self, out: Path) -> None:
        self.out, self.steps, self.facts = out, {}, {"device": None}
        self.seen: tuple = ()
        self.log = open(out / "log.txt", "w")  # noqa: SIM115 - open until the end
        self.step, self.first = "", 0
        for name in ("tests.jsonl", "results.json", "results.md"):
            (out / name).unlink(missing_ok=True)

    def begin(self, step: str) -> None:
        print(f"== {step}", file=self.log, flush=True)
        self.step, self.first = step, (self.out / "log.txt").stat().st_size

    def printed(self) -> str:
        """What the step has printed."""
        with open(self.out / "log.txt", "rb") as log:
            log.seek(self.first)
            return log.read().decode(errors="replace")

    def collect(self) -> None:
        """The figures that the step has printed."""
        lines = self.printed().splitlines()
        if self.step == "kernels":
            told = list(filter(None, map(parsed, lines)))
            self.facts["kernels"] = [entry for entry in told if "kernel" in entry]
            copies = [entry["copy_gb_per_s"] for entry in told if "copy_gb_per_s" in entry]
            self.facts |= {"copy_gb_per_s": copies[0]} if copies else {}
        elif self.step == "ncu":
            self.facts["ncu"] = list(profiled(lines))
        elif self.step == "smoke":
            told = [parsed(line.removeprefix("versions: ")) for line in lines]
            self.facts["versions"] = next(filter(None, told), None)

    def any_passed(self) -> bool:
        return self.facts.get("tests", {}).get("passed", 0) > 0

    def refresh(self) -> None:
        """Writes where a step has printed or a test or a case has ended since the last time."""
        paths = [self.out / name for name in ("log.txt", "tests.jsonl", "results.json")]
        seen = tuple(path.stat().st_mtime_ns if path.exists() else 0 for path in paths)
        if seen != self.seen:
            self.seen = seen
            self.write()

    def write(self) -> None:
        self.collect()
        if (self.out / "tests.jsonl").exists():
            self.facts["tests"] = tested(self.out / "tests.jsonl")
        if (self.out / "results.json").exists():
            results = json.loads((self.out / "results.json").read_text())
            self.facts |= {"cases": results.pop("results"), "benchmark": results}
        data = self.facts | {"steps": self.steps}
        for name, text in (("report.json", json.dumps(data, indent=1)), ("report.md", self.text())):
            (self.out / (name + ".part")).write_text(text)
            (self.out / (name + ".part")).replace(self.out / name)

    def text(self) -> str:
        facts = self.facts
        card = ", ".join(
            str(facts[name]) for name in ("device", "driver", "memory") if name in facts
        )
        parts = [f"# GPU report\n\ndevice: {card}; versions: {facts.get('versions')}"]
        rows = []
        for name, step in self.steps.items():
            last = step.get("output", "").splitlines()[-1:]
            why = f": {last[0]}" if last and step["status"] == "could not run" else ""
            rows.append([name, step["status"] + why, step.get("seconds", "")])
        parts.append(table(["step", "result", "seconds"], rows))
        if tests := facts.get("tests"):
            counts = ", ".join(f"{tests[key]} {key}" for key in ("passed", "failed", "skipped"))
            parts.append(f"GPU tests: {counts}")
            parts += [f"- skipped: {number}: {why}" for why, number in tests["reasons"].items()]
            parts += [
                f"- {name}: {why.splitlines()[-1:]}" for name, why in tests["failures"].items()
            ]
        if "copy_gb_per_s" in facts:
            parts.append(f"Copy of 1 GiB: {facts['copy_gb_per_s']:.0f} GB/s")
        if facts.get("kernels"):
            keys = ["kernel", "size", "motion", "ms", "gb_per_s", "to_copy"]
            parts.append(
                table(keys, [[short(k.get(key, "")) for key in keys] for k in facts["kernels"]])
            )
        if facts.get("cases"):
            parts.append(compared(facts["cases"]))
            missing = facts["benchmark"].get("missing", {})
            parts += [f"- not measured: {peer}: {why}" for peer, why in missing.items()]
            parts += [
                f"- {entry['peer']}, {', '.join(entry['case'].values())}: {entry['error']}"
                for entry in facts["cases"]
                if "error" in entry
            ]
        if facts.get("ncu"):
            keys = ["kernel", "grid", *METRICS.values()]
            parts.append(table(keys, [[row.get(key, "") for key in keys] for row in facts["ncu"]]))
        return "\n\n".join(parts) + "\n"


def parsed(line: str) -> dict | None:
    """The object in a line of JSON, unless that is something else, or being written."""
    if line.startswith("{"):
        with contextlib.suppress(ValueError):
            return json.loads(line)
    return None


def tested(path: Path) -> dict:
    found: dict = {
        "passed": 0,
        "failed": 0,
        "skipped": 0,
        "failed_ids": [],
        "failures": {},
        "reasons": {},
    }
    for line in path.read_text().splitlines():
        if (entry := parsed(line)) is None:
            continue
        found[entry["outcome"]] += 1
        if entry["outcome"] == "failed":
            found["failed_ids"].append(entry["test"])
            found["failures"][entry["test"]] = entry["why"]
        elif entry["outcome"] == "skipped":
            found["reasons"][entry["why"]] = found["reasons"].get(entry["why"], 0) + 1
    return found


def compared(entries: list[dict]) -> str:
    """jaxwarp's time of each case, its share of the copy's bandwidth, its peers' times by it."""
    grouped: dict[str, dict[str, dict]] = {}
    for entry in entries:
        grouped.setdefault(", ".join(entry["case"].values()), {})[entry["peer"]] = entry
    peers = [p for p in dict.fromkeys(e["peer"] for e in entries) if p not in ("jaxwarp", "copy")]
    rows = []
    for case, found in grouped.items():
        ours = timed(found.get("jaxwarp", {}))
        row = [case]
        for value in ("median_ms", "gb_per_s"):
            row.append(short(ours[value]) if ours else "failed")
        row.append(f"{100 / ours['to_copy']:.0f} %" if ours and "to_copy" in ours else "")
        for peer in peers:
            theirs = timed(found.get(peer, {}))
            row.append(short(theirs["median_ms"] / ours["median_ms"]) if theirs and ours else "")
        rows.append(row)
    return table(["case", "ms", "GB/s", "of the copy", *[f"{p} / jaxwarp" for p in peers]], rows)


def timed(entry: dict) -> dict | None:
    return None if "error" in entry else entry.get("warm")


def profiled(lines: list[str]) -> Iterator[dict]:
    """ncu's rows, one for each kernel: a head, a line of units, then values."""
    rows = list(csv.reader(line for line in lines if line.startswith('"')))
    if len(rows) < 3:
        return
    head, units = rows[0], rows[1]
    for row in rows[2:]:
        values = dict(zip(head, row, strict=False))
        unit = dict(zip(head, units, strict=False))
        name = values.get("Kernel Name", "").partition("<")[0].rpartition("::")[2]
        metrics = {
            known: f"{values[metric]} {unit[metric]}".replace(" %", "").strip()
            for metric, known in METRICS.items()
            if metric in values
        }
        yield {"kernel": name, "grid": values.get("Grid Size"), **metrics}


def short(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def table(head: list[str], rows: list[list]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in lines)


if __name__ == "__main__":
    sys.exit(main())
