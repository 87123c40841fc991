"""The pages of the site: their code runs, they name all that is public, and their links lead
somewhere. `make docs` builds the site itself."""

import re
from pathlib import Path

import jax
import pytest

import jaxwarp
from jaxwarp import flow, halo, reference

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
INCLUDED = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
INCLUDED += [ROOT / "benchmarks" / "RESULTS.md"]
PEERS = {"torch", "scipy", "cv2", "dm_pix"}  # a block that imports one runs where it is installed


def name(path):
    return str(path.relative_to(ROOT))


def blocks(path):
    """[(line, code)] of a page, the first line at its place."""
    text = path.read_text()
    found = re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [(text.count("\n", 0, match.start(1)), match[1]) for match in found]


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p)], ids=name)
def test_code(page):
    """The blocks of a page, one after the other, as a reader would run them."""
    namespace, missing = {}, []
    with jax.enable_x64(False):  # as for most users
        for line, code in blocks(page):
            try:
                exec(compile("\n" * line + code, str(page), "exec"), namespace)
            except ModuleNotFoundError as error:
                if error.name not in PEERS:
                    raise
                missing.append(error.name)
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")


def test_readme_has_lines_for_any_screen():
    assert max(map(len, (ROOT / "README.md").read_text().splitlines())) <= 100


def test_every_public_name_is_in_the_reference():
    text = (DOCS / "api.rst").read_text()
    listed = set(re.findall(r"^\.\. autofunction:: (\S+)$", text, re.MULTILINE))
    modules = set(
        re.findall(r"^\.\. automodule:: jaxwarp\.(\S+)\n   :members:$", text, re.MULTILINE)
    )
    assert listed | modules == set(jaxwarp.__all__)
    overview = set(re.findall(r"^   ([a-z][\w.]*)$", text, re.MULTILINE))
    parts = {f"{module}.{n}" for module, m in (("flow", flow), ("halo", halo)) for n in m.__all__}
    assert overview == (listed | parts | {"reference"})
    assert set(reference.__all__) <= listed


@pytest.mark.parametrize("page", [*PAGES, *INCLUDED], ids=name)
def test_links(page):
    """Of Markdown, and of the files that a page includes."""
    text = re.sub(r"(?ms)^```python\n.*?^```$|^:\S+: [^\n]*$", "", page.read_text())
    links = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r"(?m)^```\{\w+\} (\S+)$", text)
    for link in links:
        path = link.partition("#")[0]
        if path and "://" not in path and "/build/docs/generated/" not in path:
            assert (page.parent / path).exists(), link


def test_every_page_is_in_the_table_of_contents():
    trees = re.findall(r"```\{toctree\}\n(.*?)```", (DOCS / "index.md").read_text(), re.DOTALL)
    listed = {
        re.sub(r".*<(.*)>", r"\1", line)
        for tree in trees
        for line in tree.splitlines()
        if line and not line.startswith(":")
    }
    assert listed == {path.stem for path in [*PAGES, DOCS / "api.rst"]} - {"index"}
