"""One library's process: builds, runs and times the programs that the parent asks for.

A request and its reply are one line of JSON each, so that the parent can take repetitions of all
libraries in turn. Of every timed result a sample of values goes back with its times.
"""

import ctypes
import gc
import importlib
import json
import os
import sys
import time
import traceback

import numpy as np

from benchmarks.cases import Case
from benchmarks.peers import LIBRARIES, Program, Unsupported

SAMPLES = 1000  # values of each result that are compared
WARM_SECONDS = 0.1  # of one warm measurement, unless a single call is longer or the limit shorter


def sample(results: list[np.ndarray]) -> list[list[float]]:
    """The same elements of each result in every process."""
    rng = np.random.default_rng(1)
    taken = []
    for result in results:
        at = rng.integers(0, result.size, SAMPLES)
        values = result[np.unravel_index(at, result.shape)].astype(np.float64)
        taken.append(values.tolist())
    return taken


def keep_memory(keep: bool) -> None:
    """With glibc, whether freed memory is used again, or comes from the kernel anew (default)."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:
        return
    trim_threshold, mmap_max = -1, -4
    mallopt(mmap_max, 0 if keep else 65536)
    mallopt(trim_threshold, -1 if keep else 128 * 1024)
    if not keep:
        ctypes.CDLL(None).malloc_trim(0)


def measure(program: Program, *, warm: bool, seconds: float, count: int, last: float) -> dict:
    """Up to `count` measurements, as many as begin within so many seconds; at least one.

    last: seconds of the last call of this program, by which a warm measurement gets its length.
    """
    keep_memory(warm)
    times: list[float] = []
    work = program.work if warm else 1
    end = time.perf_counter() + seconds
    while not times or (time.perf_counter() < end and len(times) < count):
        calls = max(1, min(10000, int(min(WARM_SECONDS, seconds) / last / work))) if warm else 1
        result = None  # freed before the clock starts
        start = time.perf_counter()
        result = program.warm(calls) if warm else program.cold()
        last = (time.perf_counter() - start) / calls / work
        times.append(last)
    return {"times": times, "sample": sample(program.read(result))}


def serve(library: str, threads: int) -> None:
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print goes to stderr

    def reply(**message) -> None:
        print(json.dumps(message), file=replies)

    try:
        module = importlib.import_module(f"benchmarks.peers.{LIBRARIES[library][0]}")
        reply(versions=module.versions())
    except Exception as error:  # also a library that is there and does not load
        reply(missing=f"{type(error).__name__}: {error}".splitlines()[0])
        return
    programs: dict[str, Program] = {}
    last: dict[str, float] = {}
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if request["do"] == "drop":
                programs.clear()
                gc.collect()
                keep_memory(False)
                reply()
            elif request["do"] == "build":
                case, peer = Case(**request["case"]), request["peer"]
                program = module.build(peer=peer, case=case, threads=threads)
                program.cold()  # compiles
                if request["timed"]:
                    program.warm(1)
                programs[peer] = program
                reply()
            else:
                peer = request["peer"]
                options = {name: request[name] for name in ("warm", "seconds", "count")}
                result = measure(programs[peer], **options, last=last.get(peer, 1.0))
                last[peer] = result["times"][-1]
                reply(**result)
        except Unsupported as reason:
            reply(unsupported=str(reason))
        except Exception as error:
            traceback.print_exc()
            reply(error=f"{type(error).__name__}: {error}".splitlines()[0])


if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]))
