"""The rendered site: every exported name has its place, no link is broken, no cell failed."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

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


def test_no_cell_failed(site):
    for page in (site / "_proc/_docs").rglob("*.html"):
        assert "Traceback (most recent call last)" not in page.read_text(), page.name
