"""The conventions of the public API: names, signatures, docstrings, examples, version."""

import doctest
import importlib.metadata
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxwarp
from jaxwarp import _formulas, flow, halo, reference

# SPEC: positional arguments, then keyword-only options with their defaults.
OPERATIONS = {
    "gather": (
        ("image", "points"),
        {
            "method": "linear",
            "boundary": "constant",
            "fill_value": 0.0,
            "derivative": None,
            "forward_mode": False,
            "deterministic": None,
        },
    ),
    "splat": (
        ("values", "points", "shape"),
        {
            "method": "linear",
            "boundary": "constant",
            "derivative": None,
            "forward_mode": False,
            "deterministic": None,
        },
    ),
    "backward_warp": (
        ("image", "flow"),
        {
            "method": "linear",
            "boundary": "constant",
            "fill_value": 0.0,
            "forward_mode": False,
            "deterministic": None,
        },
    ),
    "forward_warp": (
        ("values", "flow"),
        {
            "reduce": "average",
            "importance": None,
            "method": "linear",
            "boundary": "constant",
            "fill_value": 0.0,
            "min_coverage": 0.0,
            "return_coverage": False,
            "forward_mode": False,
            "deterministic": None,
        },
    ),
    "reconstruct": (
        ("values", "points", "shape"),
        {"boundary": "constant", "damping": 0.0, "tol": 1e-5, "max_steps": 100},
    ),
    "grid_sample": (
        ("input", "grid"),
        {
            "mode": "bilinear",
            "padding_mode": "zeros",
            "align_corners": False,
            "forward_mode": False,
        },
    ),
}
FUNCTIONS = [*OPERATIONS, "pixel_grid", "to_normalized", "to_pixels"]
DOCUMENTED = [getattr(jaxwarp, name) for name in FUNCTIONS]
DOCUMENTED += [getattr(flow, name) for name in flow.__all__]
DOCUMENTED += [halo.backward_warp]


@pytest.mark.parametrize("module", [jaxwarp, reference], ids=["jaxwarp", "reference"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_signatures(module, name):
    positional, options = OPERATIONS[name]
    parameters = inspect.signature(getattr(module, name)).parameters.values()
    required = [p for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    keywords = [p for p in parameters if p.kind is p.KEYWORD_ONLY]
    assert [(p.name, p.default) for p in required] == [
        (n, inspect.Parameter.empty) for n in positional
    ]
    assert [(p.name, p.default) for p in keywords] == list(options.items())
    assert len(required) + len(keywords) == len(parameters)


@pytest.mark.parametrize("module", [jaxwarp, reference], ids=["jaxwarp", "reference"])
def test_signature_of_pixel_grid(module):
    shape, dtype = inspect.signature(module.pixel_grid).parameters.values()
    assert (shape.name, dtype.name) == ("shape", "dtype")
    assert shape.default is inspect.Parameter.empty
    assert jnp.dtype(dtype.default) == np.float32


def test_public_names():
    assert sorted(jaxwarp.__all__) == sorted(
        [*FUNCTIONS, "export_checks", "flow", "halo", "reference"]
    )
    assert sorted(reference.__all__) == sorted(FUNCTIONS)
    # What a user sees after `jaxwarp.<tab>` is public, and all of it is there.
    assert set(jaxwarp.__all__) <= set(dir(jaxwarp))
    for name in dir(jaxwarp):
        assert name in jaxwarp.__all__ or name.startswith("__"), name
        assert hasattr(jaxwarp, name)
    for module in (flow, halo, reference):
        assert dir(module) == sorted(module.__all__)
    for name in FUNCTIONS:
        assert getattr(jaxwarp, name).__module__.startswith("jaxwarp")


def test_reference_knows_nothing_of_the_kernels():
    for module in (reference, _formulas):
        lines = inspect.getsource(module).splitlines()
        imports = [line for line in lines if line.startswith(("import ", "from "))]
        assert imports
        own = [line for line in imports if "jaxwarp" in line]
        assert own == [line for line in own if "_formulas" in line and module is reference]


def test_version_is_that_of_the_installed_package():
    assert jaxwarp.__version__ == importlib.metadata.version("jaxwarp")


@pytest.mark.parametrize("function", DOCUMENTED, ids=lambda f: f"{f.__module__}.{f.__name__}")
def test_docstrings(function):
    text = inspect.getdoc(function)
    for heading in ("Args:", "Returns:", "Raises:", "Example:"):
        assert f"\n{heading}\n" in text
    for parameter in inspect.signature(function).parameters:
        assert f"{parameter}:" in text or f"{parameter}," in text, parameter
    for fact in ("float32", "H, W", "(x, y", "pixel", "TypeError", "ValueError"):
        assert fact in text, fact
    if function.__name__ in OPERATIONS:
        assert "\nSource: " in text


@pytest.mark.parametrize(
    "function",
    [*DOCUMENTED, jaxwarp.export_checks],
    ids=lambda f: f"{f.__module__}.{f.__name__}",
)
def test_examples_in_docstrings(function):
    with jax.enable_x64(False):  # as for most users
        tests = doctest.DocTestFinder(recurse=False).find(function, function.__name__)
        assert [len(test.examples) > 1 for test in tests] == [True]
        runner = doctest.DocTestRunner()
        runner.run(tests[0])
    assert runner.summarize(verbose=False).failed == 0


def test_options_of_the_package_are_those_of_the_tests():
    # A method or boundary that is added must be added to cases.py, and so be tested.
    import cases

    image, points = np.ones((4, 5, 1)), np.ones((2, 2))
    for option, known in (("method", cases.METHODS), ("boundary", cases.BOUNDARIES)):
        with pytest.raises(ValueError, match="expected one of") as raised:
            jaxwarp.gather(image, points, **{option: "?"})
        listed = str(raised.value).split("expected one of ")[1].split(", got")[0]
        assert listed == ", ".join(map(repr, known))


def test_deterministic_is_accepted(monkeypatch):
    image, flow = np.ones((4, 5, 1)), np.zeros((4, 5, 2))
    for value in ("1", "0", "", "true"):
        monkeypatch.setenv("JAXWARP_DETERMINISTIC", value)
        for deterministic in (None, True, False):
            out = jaxwarp.forward_warp(image, flow, deterministic=deterministic)
            np.testing.assert_array_equal(out, image)


def test_an_environment_variable_that_is_no_flag(monkeypatch):
    monkeypatch.setenv("JAXWARP_DETERMINISTIC", "never")
    with pytest.raises(ValueError, match=r"JAXWARP_DETERMINISTIC: expected 0 or 1, got 'never'"):
        jaxwarp.gather(np.ones((4, 5, 1)), np.zeros((3, 2)))


@pytest.mark.parametrize("part", ["", "nanobind/", "robin_map/"])
def test_licences_are_installed(part):
    """That of the package, and those of what is compiled into its modules."""
    files = importlib.metadata.files("jaxwarp")
    (license,) = (f for f in files if str(f).endswith(f".dist-info/licenses/{part}LICENSE"))
    text = license.read_text()
    assert "Copyright" in text and "WARRANT" in text
