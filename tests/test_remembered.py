"""What tests/remembered.py may give back, and when the reference is asked again."""

import dataclasses
import os
import shutil
from functools import cache, partial
from pathlib import Path

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import remembered as module
from remembered import remembered

import jaxwarp
from jaxwarp import _formulas, reference


@dataclasses.dataclass
class Counted:
    """A function that counts its calls."""

    calls: int = 0
    factor: float = 2.0

    def __call__(self, *arrays):
        self.calls += 1
        return jax.tree.map(lambda a: jnp.asarray(a) * self.factor, arrays)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """An empty cache, and copies of the sources that its keys depend on."""
    tests = tmp_path / "tests"
    tests.mkdir()
    for name in ("remembered.py", "conftest.py", "cases.py", Path(__file__).name):
        shutil.copy(module.TESTS / name, tests)
    package = tmp_path / "jaxwarp"
    package.mkdir()
    for source in (reference, _formulas):
        shutil.copy(source.__file__, package)
    monkeypatch.setattr(jaxwarp, "__file__", str(package / "__init__.py"))
    monkeypatch.setattr(module, "TESTS", tests)
    monkeypatch.setattr(module, "FOLDER", tmp_path / "cache")
    for name in ("_of_file", "environment"):  # what is known of the true sources stays known
        monkeypatch.setattr(module, name, cache(getattr(module, name).__wrapped__))
    return module.FOLDER


def again():
    """As if this test ran in a new process."""
    module._count = (None, iter(()))
    module._of_file.cache_clear()
    module.environment.cache_clear()


def files(folder):
    return [path for path in folder.rglob("*") if path.is_file()]


def test_a_second_run_gets_the_same_values():
    function = Counted()
    values = {"a": np.arange(3, dtype=np.float16), "b": (np.float64(np.nan), jnp.ones(2))}
    first = remembered(function, values)
    assert remembered(Counted(factor=5.0), values)[0]["a"][1] == 5  # another call of this test
    again()
    second = remembered(function, values)
    assert function.calls == 1
    assert jax.tree.structure(first) == jax.tree.structure(second)
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        assert isinstance(a, np.ndarray)
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("file", ["jaxwarp/reference.py", "jaxwarp/_formulas.py",
                                  "tests/cases.py", "tests/conftest.py",
                                  "tests/remembered.py", "tests/test_remembered.py"])  # fmt: skip
def test_a_changed_source_is_computed_anew(tmp_path, file):
    function = Counted()
    remembered(function, 1.0)
    with (tmp_path / file).open("a") as source:
        source.write("# another comment\n")
    again()
    remembered(function, 1.0)
    assert function.calls == 2


@pytest.mark.parametrize(
    "other", [2.0, np.float32(1), np.ones(1), np.ones((1, 1)), [1.0], jnp.bfloat16(1)], ids=repr
)
def test_other_operands_are_computed_anew(other):
    remembered(Counted(), 1.0)
    again()
    function = Counted()
    remembered(function, other)
    assert function.calls == 1


@pytest.mark.parametrize("name", ["XLA_FLAGS", "JAX_ENABLE_X64"])
def test_another_setting_is_computed_anew(monkeypatch, name):
    remembered(Counted(), 1.0)
    monkeypatch.setenv(name, os.environ.get(name, "") + " ")
    again()
    function = Counted()
    remembered(function, 1.0)
    assert function.calls == 1


def test_another_version_is_computed_anew(monkeypatch):
    remembered(Counted(), 1.0)
    monkeypatch.setattr(module, "version", lambda package: f"{package} of tomorrow")
    again()
    function = Counted()
    remembered(function, 1.0)
    assert function.calls == 1


def test_names_tell_results_apart():
    functions = {name: Counted(factor=float(name)) for name in "23"}
    for _ in range(2):
        for name, function in functions.items():
            (value,) = remembered(function, 1.0, name=name)
            assert value == float(name)
        again()
    assert [function.calls for function in functions.values()] == [1, 1]


def damages():
    yield "empty", lambda data: b""
    yield "cut", lambda data: data[:-1]
    yield "digest alone", lambda data: data[: module.DIGEST]
    yield "longer", lambda data: data + b"\0"
    yield "a bit of a value", lambda data: data[:-20] + bytes([data[-20] ^ 1]) + data[-19:]
    yield "a bit of the digest", lambda data: bytes([data[0] ^ 1]) + data[1:]
    yield "not ours", lambda data: b"cos\nsystem\n(S'false'\ntR." * 9


@pytest.mark.parametrize("damage", [pytest.param(d, id=name) for name, d in damages()])
def test_a_damaged_file_is_computed_anew_and_mended(folder, damage):
    function = Counted()
    remembered(function, np.arange(9.0))
    (file,) = files(folder)
    whole = file.read_bytes()
    file.write_bytes(damage(whole))
    again()
    np.testing.assert_array_equal(remembered(function, np.arange(9.0))[0], 2 * np.arange(9.0))
    assert function.calls == 2
    assert [path.read_bytes() for path in files(folder)] == [whole]


def test_a_folder_that_cannot_be_written_is_none(folder):
    folder.write_text("a file where the folder should be")
    function = Counted()
    for _ in range(2):
        assert remembered(function, 1.0)[0] == 2
        again()
    assert function.calls == 2


def test_off_reads_and_writes_nothing(folder, monkeypatch):
    remembered(Counted(), 1.0)
    before = files(folder)
    again()
    monkeypatch.setattr(module, "FOLDER", None)
    function = Counted()
    remembered(function, 1.0)
    remembered(function, 2.0)
    assert function.calls == 2
    assert files(folder) == before


@pytest.mark.parametrize("transform", [lambda f: f, jax.jit, jax.grad], ids=["-", "jit", "grad"])
def test_no_kernel_is_remembered(folder, transform):
    image, flow = jnp.ones((4, 5, 1)), jnp.zeros((4, 5, 2))
    function = transform(lambda image: jaxwarp.backward_warp(image, flow).sum())
    with pytest.raises(AssertionError, match="calls a kernel"):
        remembered(function, image)
    assert not files(folder)


def test_wrong_kernels_and_wrong_references_are_found(tmp_path, monkeypatch):
    """A comparison as the other files make them, with what an earlier run has left."""

    def compare(kernel):
        again()
        image, flow = cases.Case("backward_warp").inputs("random")
        expected = remembered(partial(reference.backward_warp, image), flow)
        cases.assert_close(kernel(image, flow), expected, 1e-12)

    compare(jaxwarp.backward_warp)
    compare(jaxwarp.backward_warp)
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        compare(lambda image, flow: jaxwarp.backward_warp(image, flow + 1e-9))

    right = reference.gather
    monkeypatch.setattr(reference, "gather", lambda *a, **k: right(*a, **k) * (1 + 1e-9))
    with (tmp_path / "jaxwarp" / "reference.py").open("a") as source:
        source.write("# ... which is now wrong\n")
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        compare(jaxwarp.backward_warp)


def test_folders_that_nothing_asked_for_are_deleted(folder):
    remembered(Counted(), 1.0)
    (kept,) = (folder / "reference").iterdir()
    old = folder / "reference" / "test_values-of-long-ago"
    old.mkdir()
    (old / "value").write_text("")
    os.utime(old, (0, 0))
    again()
    remembered(Counted(), 1.0)
    assert [*(folder / "reference").iterdir()] == [kept]
