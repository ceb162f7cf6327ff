"""The repository agrees with itself: notebooks, package, README, import order, stored outputs."""

import ast
import configparser
import filecmp
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parent.parent
LIBRARY = sorted(p for p in (ROOT / "nbs").glob("[0-9][0-9]_*.ipynb"))
NOTEBOOKS = sorted(
    p for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts
)
BIN = Path(sys.executable).parent


def test_exporting_the_notebooks_changes_nothing(tmp_path):
    tree = tmp_path / "tree"
    shutil.copytree(
        ROOT,
        tree,
        symlinks=True,
        ignore=shutil.ignore_patterns(
            ".venv", "runs", "_docs", "_proc", ".git", "*.egg-info", "__pycache__"
        ),
    )
    subprocess.run([BIN / "nbdev_export"], cwd=tree, check=True, capture_output=True)
    names = sorted(p.name for p in (tree / "av1nb").glob("*.py"))
    assert names == sorted(p.name for p in (ROOT / "av1nb").glob("*.py"))
    _, different, errors = filecmp.cmpfiles(tree / "av1nb", ROOT / "av1nb", names, shallow=False)
    assert not different and not errors, f"run make export: {different + errors}"


def test_readme_follows_from_the_index():
    made = subprocess.run(
        [
            BIN / "jupyter",
            "nbconvert",
            "--log-level=ERROR",
            "--to",
            "markdown",
            "--stdout",
            ROOT / "nbs/index.ipynb",
        ],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    made = re.sub(r"\]\((images/|[a-z0-9_/]+\.ipynb)", r"](nbs/\1", made)  # as seen from the top
    assert made.strip() == (ROOT / "README.md").read_text().strip(), "run make readme"
    missing = [link for link in re.findall(r"\]\(([^)#:]+)\)", made) if not (ROOT / link).exists()]
    assert not missing, missing


def test_a_module_imports_only_lower_numbers():
    order = {p.stem[3:]: int(p.stem[:2]) for p in LIBRARY}
    assert len(order) > 10
    for module, number in order.items():
        tree = ast.parse((ROOT / f"av1nb/{module}.py").read_text())
        for node in ast.walk(tree):
            names = []
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("av1nb"):
                tail = node.module.removeprefix("av1nb").lstrip(".")
                names = [tail.split(".")[0]] if tail else [alias.name for alias in node.names]
            elif isinstance(node, ast.Import):
                names = [
                    alias.name.split(".")[1]
                    for alias in node.names
                    if alias.name.startswith("av1nb.")
                ]
            for name in names:
                assert (
                    name == module or name == "__version__" or order[name] < number
                ), f"{module} ({number}) imports {name}"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_stored_output_is_an_error(path):
    for number, cell in enumerate(nbformat.read(path, 4).cells):
        for output in cell.get("outputs", []):
            assert output.output_type != "error", f"cell {number}: {output.get('evalue')}"


def test_traps_in_the_source():
    "Loose loading, unsafe loading and swallowed errors do not come back."
    for path in sorted((ROOT / "av1nb").glob("*.py")):
        source = path.read_text()
        assert not re.search(r"strict\s*=\s*False", source), path
        assert not re.search(r"weights_only\s*=\s*False", source), path
        assert not re.search(r"except[^\n]*:\s*(#[^\n]*)?\n?\s*pass\b", source), path
        for call in re.finditer(r"torch\.load\(.*", source):
            assert "weights_only=True" in call[0], f"{path}: {call[0]}"


def test_every_page_stands_in_the_sidebar():
    listed = set(re.findall(r"- ([\w/]+\.ipynb)", (ROOT / "_quarto.yml").read_text()))
    assert listed == {str(p.relative_to(ROOT / "nbs")) for p in NOTEBOOKS}
    assert (ROOT / "nbs/_quarto.yml").resolve() == ROOT / "_quarto.yml"


def test_lock_covers_what_settings_ask_for():
    settings = configparser.ConfigParser(delimiters=["="])
    settings.read(ROOT / "settings.ini")
    locked = {
        line.split("==")[0].lower() for line in (ROOT / "requirements.lock").read_text().split()
    }
    wanted = (
        settings["DEFAULT"]["requirements"].split()
        + settings["DEFAULT"]["dev_requirements"].split()
    )
    assert {re.split(r"[<>=]", w)[0].lower() for w in wanted} <= locked
