"""Runs the cases: one process for each library, repetitions of all of them in turn, every timed
result compared with the reference; then writes the report."""

import argparse
import contextlib
import json
import os
import platform
import select
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np

from benchmarks import ROOT, cases, report
from benchmarks.cases import Case
from benchmarks.peers import LIBRARIES, PEERS

REFERENCE = "reference"  # jaxwarp.reference, with which all others are compared
ROUNDS = 3
NORMALISED = ("torch", "torch channels_last", "torch.compile")  # the positions that they take
PATIENCE = 600.0  # seconds for an answer, unless --patience says otherwise
ON_GPU = tuple(p for p in PEERS if p not in (REFERENCE, "map_coordinates", "opencv"))


class Worker:
    """A process of benchmarks/worker.py; ended where an answer takes longer than `patience`.

    strikes: two for an answer that did not come, one for a process that ended by itself.
    """

    def __init__(self, library: str, threads: list[int], patience: float) -> None:
        self.library, self.threads, self.patience = library, threads, patience
        self.strikes = 0
        self.start()

    def start(self) -> None:
        library, threads = self.library, self.threads
        self.read, self.late = b"", ""  # what came and was not asked for yet; why no more comes
        path = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        pools = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
        environment = {
            **os.environ,
            **dict.fromkeys(pools, str(len(threads))),
            "PYTHONPATH": os.pathsep.join(path),
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # several processes share a GPU
        }
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.worker", library, str(len(threads))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
        )
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(self.process.pid, threads)  # XLA counts its threads by this

    def send(self, **request) -> None:
        with contextlib.suppress(BrokenPipeError):  # receive() says so
            self.process.stdin.write(json.dumps(request).encode() + b"\n")
            self.process.stdin.flush()

    def receive(self) -> dict:
        """The next reply. Those that follow it may have come with it, and wait in self.read."""
        while b"\n" not in self.read and not self.late:
            if not select.select([self.process.stdout], [], [], self.patience)[0]:
                self.process.kill()
                self.late = f"no answer in {self.patience:.0f} s"
                self.strikes += 2
            elif part := os.read(self.process.stdout.fileno(), 2**20):
                self.read += part
            else:
                self.late = f"ended, status {self.process.wait()}"
                self.strikes += 1
        if b"\n" not in self.read:
            return {"error": self.late}
        line, _, self.read = self.read.partition(b"\n")
        return json.loads(line)

    def renew(self) -> None:
        """A new process: an error on a GPU can spoil all that the old one would do later."""
        self.process.kill()
        self.process.wait()
        self.start()
        self.receive()

    @property
    def given_up(self) -> bool:
        """It costs more time than it gives; not so jaxwarp and the reference, which all need."""
        needed = self.library in ("jaxwarp", PEERS[REFERENCE])
        return not needed and self.strikes > 1

    def ask(self, **request) -> dict:
        self.send(**request)
        return self.receive()


def difference(sample: list, expected: list) -> float:
    """The largest deviation, relative to the size of the value plus the typical size (rms)."""
    if [len(values) for values in sample] != [len(values) for values in expected]:
        return float("inf")
    worst = 0.0
    for actual, wanted in zip(map(np.array, sample), map(np.array, expected), strict=True):
        size = np.abs(wanted) + np.sqrt(np.mean(wanted**2)) + 1e-30
        worst = max(worst, float(np.nan_to_num(np.abs(actual - wanted) / size, nan=np.inf).max()))
    return worst


def tolerance(case: Case, peer: str) -> float:
    """What float32 positions in normalised coordinates (peers, grid_sample) cost, 2^-22 of a size
    of thousands; sums in another order; one rounding to bfloat16 and one of its cotangents."""
    if case.dtype == "bfloat16":
        return 2.0**-6
    single = 5e-3 if case.operation == "grid_sample" or peer in NORMALISED else 1e-4
    return single if case.dtype == "float32" else 1e-9


def summary(times: list[float]) -> dict:
    low, middle, high = np.percentile(times, [25, 50, 75]) * 1e3
    return {"median_ms": middle, "quartiles_ms": [low, high], "times": len(times)}


def run(case: Case, peers: list[str], workers: dict[str, Worker], *, seconds: float) -> list[dict]:
    """The entries of a case, one for each peer."""
    entries = {peer: {"case": asdict(case), "peer": peer} for peer in peers}
    everyone = [REFERENCE, *(peer for peer in peers if peer != REFERENCE)]
    for peer in everyone:  # all at once: compiling takes longer than measuring
        timed = peer in peers
        workers[PEERS[peer]].send(do="build", peer=peer, timed=timed, case=asdict(case))
    built = {peer: workers[PEERS[peer]].receive() for peer in everyone}
    for peer in peers:
        entries[peer] |= built[peer]
    times: dict = {peer: {"cold": [], "warm": []} for peer in peers}
    once = {"warm": False, "seconds": 0, "count": 1}
    expected = workers[PEERS[REFERENCE]].ask(do="measure", peer=REFERENCE, **once).get("sample")
    for mode in ("cold", "warm"):
        for _ in range(ROUNDS):
            for peer in peers:
                entry, past = entries[peer], times[peer][mode]
                if entry.keys() & {"error", "unsupported"} or sum(past) > 3 * seconds:
                    continue
                options = {"warm": mode == "warm", "seconds": seconds / ROUNDS, "count": 5}
                result = workers[PEERS[peer]].ask(do="measure", peer=peer, **options)
                if "error" in result:
                    entry["error"] = result["error"]
                    continue
                past += result["times"]
                if peer == "copy":
                    continue
                if expected is None:
                    entry["error"] = "the reference failed, so that nothing can be compared"
                    continue
                found = difference(result["sample"], expected)
                entry["difference"] = max(found, entry.get("difference", 0.0))
                entry["correct"] = entry["difference"] <= tolerance(case, peer)
                if not entry["correct"]:
                    entry["error"] = f"wrong result ({mode}): off by {found:.2g}"
    # A wrong result says nothing against the process that it comes from.
    wrong = {peer for peer, entry in entries.items() if not entry.get("correct", True)}
    failed = {PEERS[p] for p, entry in entries.items() if "error" in entry and p not in wrong}
    for library, worker in workers.items():
        failed |= {library} if "error" in worker.ask(do="drop") else set()
        if library in failed and not worker.given_up:
            worker.renew()
    for peer, entry in entries.items():
        entry |= {mode: summary(found) for mode, found in times[peer].items() if found}
    return list(entries.values())


def machine(threads: int) -> dict:
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), cpu)
    date = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    return {"cpu": cpu, "threads": threads, "python": platform.python_version(), "date": date}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    many = parser.add_mutually_exclusive_group()
    many.add_argument("--full", action="store_true", help="all products of the cases")
    many.add_argument("--quick", action="store_true", help="a smoke run on tiny images")
    many.add_argument("--gpu", action="store_true", help="the twelve cases of a GPU's report")
    parser.add_argument("--only", default="", metavar="TEXT", help="cases whose name contains TEXT")
    parser.add_argument(
        "--peers", nargs="+", choices=PEERS, metavar="PEER", help="of " + ", ".join(PEERS)
    )
    parser.add_argument(
        "--out", type=Path, default=ROOT / "build" / "bench", help="folder to write"
    )
    parser.add_argument("--threads", type=int, help="of every peer; default: all processors")
    parser.add_argument("--seconds", type=float, default=0.3, help="per peer, case and figure")
    parser.add_argument("--minutes", type=float, help="start no further case after this time")
    parser.add_argument(
        "--patience", type=float, default=PATIENCE, help="seconds that a library has to answer"
    )
    parser.add_argument("--list", action="store_true", help="print the cases and stop")
    return parser.parse_args()


def main() -> int:
    options = arguments()
    choices = {cases.full: options.full, cases.quick: options.quick, cases.gpu: options.gpu}
    listed = next((listed for listed, asked in choices.items() if asked), cases.default)
    chosen = [case for case in listed() if options.only in str(case)]
    if options.list:
        print(*chosen, sep="\n")
        return 0
    affinity = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))
    threads = sorted(affinity(0))[: options.threads]
    usual = [p for p in PEERS if options.full or p != REFERENCE] if not options.gpu else ON_GPU
    peers = list(dict.fromkeys(["jaxwarp", "copy", *(options.peers or usual)]))

    start, workers = time.monotonic(), {}
    data = {"machine": machine(len(threads)), "missing": {}, "not run": [], "results": []}
    for library in dict.fromkeys(["jaxwarp", PEERS[REFERENCE], *map(PEERS.get, peers)]):
        workers[library] = Worker(library, threads, options.patience)
        if library == "jaxwarp":  # an editable install builds on import, once
            hello = {library: workers[library].receive()}
    hello |= {name: worker.receive() for name, worker in workers.items() if name not in hello}
    for library, message in hello.items():
        data["machine"] |= message.get("versions", {})
        if "versions" not in message:
            del workers[library]
            names = [peer for peer in LIBRARIES[library][1] if peer in peers]
            data["missing"] |= dict.fromkeys(names, message.get("missing", message.get("error")))
    peers = [peer for peer in PEERS if peer in peers and peer not in data["missing"]]
    if "jaxwarp" not in workers or PEERS[REFERENCE] not in workers:
        sys.exit(f"jaxwarp does not load: {data['missing']}")
    print(report.header(data), flush=True)

    for case in chosen:
        if options.minutes and time.monotonic() - start > 60 * options.minutes:
            data["not run"].append(str(case))
            continue
        entries = run(case, peers, workers, seconds=0.02 if options.quick else options.seconds)
        data["results"] += [report.relate(entry, entries, case) for entry in entries]
        for library in [name for name, worker in workers.items() if worker.given_up]:
            lost = workers.pop(library)
            lost.process.kill()
            names = [peer for peer in peers if PEERS[peer] == library]
            data["missing"] |= dict.fromkeys(names, f"{lost.late}; left out after {case}")
            peers = [peer for peer in peers if peer not in names]
        data["seconds"] = time.monotonic() - start
        report.write(data, options.out)
        print(report.line(case, entries), flush=True)
    for worker in workers.values():
        worker.process.stdin.close()
        worker.process.wait()
    data["seconds"] = time.monotonic() - start
    report.write(data, options.out)
    if not options.gpu:
        report.draw(data, options.out)
    print(report.footer(data, options.out))
    return 1 if report.errors(data) else 0


if __name__ == "__main__":
    sys.exit(main())
