"""The rendered site: every exported name has its place, no link is broken, no cell failed."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from av1nb.pages import cited_keys, read_references, resolve_citations

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    tree = tmp_path_factory.mktemp("site") / "tree"
    shutil.copytree(
        ROOT,
        tree,
        symlinks=True,
        ignore=shutil.ignore_patterns(
            ".venv", "runs", "_docs", "_proc", ".git", "*.egg-info", "__pycache__"
        ),
    )
    subprocess.run(
        [sys.executable, "-c", "from nbdev.serve import proc_nbs; proc_nbs(force=True)"],
        cwd=tree,
        check=True,
        capture_output=True,
    )
    resolve_citations(tree / "_proc")
    done = subprocess.run(
        [BIN / "smalldocs", "render", "_proc"], cwd=tree, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return tree


def complaints(text):
    """What smalldocs says, but for the page names that nbdev writes for Quarto and smalldocs does
    not need.
    """
    return [
        line
        for line in text.splitlines()
        if re.search("warning|error|broken", line, re.I) and "output-file is not read" not in line
    ]


def test_links_hold(site):
    done = subprocess.run(
        [BIN / "smalldocs", "check", "_proc"], cwd=site, capture_output=True, text=True
    )
    assert not complaints(done.stdout + done.stderr)


def test_every_exported_name_is_documented(site):
    missing = []
    for path in sorted((ROOT / "nbs").glob("[0-9][0-9]_*.ipynb")):
        module = path.stem[3:]
        source = (ROOT / f"av1nb/{module}.py").read_text()
        exported = eval(re.search(r"__all__ = (\[.*?\])", source, re.S)[1])
        page = next(
            iter(
                p for p in (site / "_proc/_docs").rglob("*.html") if p.stem in (module, path.stem)
            ),
            None,
        )
        assert page is not None, f"{path.name} has no page"
        text = page.read_text()
        missing += [f"{module}.{name}" for name in exported if name not in text]
    assert not missing, missing


def cells_of(path, kind):
    cells = json.loads(path.read_text())["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == kind]


def test_first_cells_hold_what_becomes_front_matter():
    "nbdev takes title and description of a page from its first cell, and drops what else is there."
    for path in (ROOT / "nbs").rglob("*.ipynb"):
        if ".ipynb_checkpoints" not in path.parts:
            first = cells_of(path, "markdown")[0]
            assert re.fullmatch(r"# [^\n]+\n\n(> [^\n]+\n?)+", first), f"{path.name}: {first[:200]}"


def test_citations_hold(site):
    works = read_references(ROOT / "nbs/references.bib")
    assert all(re.fullmatch(r"[a-z]+\d{4}[a-z]?", key) for key in works)
    paths = [p for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts]
    cited = {path: cited_keys("\n\n".join(cells_of(path, "markdown"))) for path in paths}
    for path, keys in cited.items():
        assert set(keys) <= works.keys(), f"{path.name}: {set(keys) - works.keys()}"
        page = site / "_proc/_docs" / path.relative_to(ROOT / "nbs").with_suffix(".html")
        text = page.read_text()
        for key in keys:
            assert f'href="#ref-{key}"' in text and f'id="ref-{key}"' in text, (page.name, key)
        shown = re.sub(r"<(pre|code)\b.*?</\1>", "", text, flags=re.S)
        assert "[@" not in shown and "{#refs}" not in shown, page.name
    assert works.keys() == set().union(*cited.values())


def test_no_cell_failed(site):
    for page in (site / "_proc/_docs").rglob("*.html"):
        assert "Traceback (most recent call last)" not in page.read_text(), page.name
