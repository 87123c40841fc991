"""What an earlier run of the tests has computed: values of the reference, and XLA's programs.

Most of the tests' time would else go into the reference. Both lie in a folder jaxwarp-tests, in
the user's cache folder or in the one that JAXWARP_TEST_CACHE names; JAXWARP_TEST_CACHE=off does
without. What the kernels compute is not remembered.
"""

import ast
import contextlib
import hashlib
import itertools
import os
import pickle
import platform
import shutil
import sys
import tempfile
import time
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from unittest import mock

TESTS = Path(__file__).parent
PACKAGES = ("jax", "jaxlib", "ml_dtypes", "numpy")
DIGEST = hashlib.sha256().digest_size


def _folder():
    chosen = os.environ.get("JAXWARP_TEST_CACHE", "")
    if chosen == "off":
        return None
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(chosen or home, "jaxwarp-tests").absolute()


FOLDER = _folder()


def hash_of(*parts):
    return hashlib.sha256("\n".join(map(repr, parts)).encode()).hexdigest()[:24]


def _processor():
    """XLA compiles for the processor it runs on."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return [line for line in lines if line.startswith(("flags", "Features"))][:1]
    return platform.processor()


@cache
def environment():
    """A hash of what XLA's results depend on, beside the program."""
    settings = {
        name: value
        for name, value in sorted(os.environ.items())
        if name.startswith(("JAX_", "XLA_")) and "CACHE" not in name
    }
    versions = [version(name) for name in PACKAGES]
    return hash_of(sys.version, versions, platform.machine(), _processor(), settings)


def _partitioning():
    """What runs while XLA compiles a sharded program, whose text does not have it."""
    package = Path(find_spec("jaxwarp").origin).parent
    return [(package / name).read_text() for name in ("_primitives.py", "_sharding.py")]


def remember_programs():
    """Has JAX keep the programs it compiles, here and in child processes; before it is imported."""
    if FOLDER is None:
        return
    folder = FOLDER / "xla" / hash_of(environment(), _partitioning())
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder)
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    if "PYTEST_XDIST_WORKER" not in os.environ:
        _delete_old(FOLDER / "xla")
        _delete_old(folder)


def clear():
    """Deletes both: `make clean-cache`."""
    for name in ("reference", "xla") if FOLDER else ():
        shutil.rmtree(FOLDER / name, ignore_errors=True)


def _delete_old(folder, days=30):
    """What has not been written for so long; JAX does not say when it has read a program."""
    with contextlib.suppress(OSError):
        for path in folder.iterdir():
            if time.time() - path.stat().st_mtime > days * 86400:
                shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink()


# ---------------------------------------------------------------------------- values

_count = (None, itertools.count())  # of this test, its calls so far


def remembered(function, *arrays, name=None):
    """`function(*arrays)` as NumPy arrays; an earlier run's, if all it depends on is the same.

    `function` uses jaxwarp.reference and no other part of jaxwarp: tracing a kernel is an error.
    What depends on anything but `arrays`, the parameters of the test, and the sources of the
    reference and of the test's file with what it imports of the tests, says so by its `name`, which
    is that of one result in the file.
    """
    if FOLDER is None:
        return _computed(function, arrays)
    path = _path(arrays, name)
    with contextlib.suppress(OSError):
        data = path.read_bytes()
        if hashlib.sha256(data[DIGEST:]).digest() == data[:DIGEST]:
            return pickle.loads(data[DIGEST:])
    result = _computed(function, arrays)
    payload = pickle.dumps(result)
    with contextlib.suppress(OSError):  # a cache that cannot be written is none
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(hashlib.sha256(payload).digest() + payload)
        os.replace(file.name, path)
    return result


def _computed(function, arrays):
    import jax
    import numpy as np
    from jax.extend.core import Primitive

    from jaxwarp import _primitives

    def refuse(*_, **__):
        raise AssertionError(
            "remembered: expected a function of jaxwarp.reference, got one that calls a kernel; "
            "call it outside: only the reference may be remembered"
        )

    with contextlib.ExitStack() as stack:
        for kernel in vars(_primitives).values():
            if isinstance(kernel, Primitive):
                stack.enter_context(mock.patch.object(kernel, "bind", refuse))
        return jax.tree.map(np.asarray, function(*arrays))


def _path(arrays, name):
    import jax
    import numpy as np

    global _count
    test = os.environ["PYTEST_CURRENT_TEST"]  # with its phase: a fixture's calls are others
    file, _, rest = test.partition("::")
    if name is None:
        if _count[0] != test:
            _count = (test, itertools.count())
        name = (rest, next(_count[1]))
    leaves, tree = jax.tree.flatten(arrays)
    leaves = [np.asarray(leaf) for leaf in leaves]
    content = [(a.shape, str(a.dtype), hashlib.sha256(a.tobytes()).digest()) for a in leaves]
    return _of_file(Path(file).name) / hash_of(name, str(tree), content)


def _sources(path, found=frozenset()):
    """A file of the tests and those that it imports, in the order of their names."""
    found |= {path, TESTS / "conftest.py"}
    for node in ast.walk(ast.parse(path.read_bytes())):
        modules = [node.module] if isinstance(node, ast.ImportFrom) else []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        for module in modules:
            other = TESTS / f"{module}.py"
            if other not in found and other.exists():
                found |= set(_sources(other, found))
    return sorted(found)


@cache
def _of_file(name):
    """Where the values of a test file are, as it and what it depends on are now."""
    import jaxwarp

    package = Path(jaxwarp.__file__).parent
    reference = [package / "reference.py", package / "_formulas.py"]
    texts = [source.read_bytes() for source in (*reference, *_sources(TESTS / name))]
    folder = FOLDER / "reference" / f"{Path(name).stem}-{hash_of(environment(), texts)}"
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        os.utime(folder)
    _delete_old(folder.parent)
    return folder
