"""The stage notebooks agree with the one list of them, and every stored output is fit to be shown."""

import json
import re
from pathlib import Path

import nbformat
import pandas as pd
import pytest

from av1nb import runs
from av1nb.files import repository

ROOT = Path(__file__).parent.parent
NOTEBOOKS = {notebook.name: notebook for notebook in runs.NOTEBOOKS}
PAGES = sorted(p for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)


def code_of(name):
    cells = nbformat.read(runs.find_notebook(name), 4).cells
    return "\n".join(cell.source for cell in cells if cell.cell_type == "code")


def test_the_list_holds_the_notebooks_of_the_folder_and_of_the_sidebar():
    assert set(NOTEBOOKS) == {path.stem for path in (ROOT / "nbs/stages").glob("*.ipynb")}
    listed = re.findall(r"- stages/(\w+)\.ipynb", (ROOT / "_quarto.yml").read_text())
    assert listed == list(NOTEBOOKS)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_asks_for_what_the_list_says_it_needs(name):
    needs = [need.rstrip("*") for need in NOTEBOOKS[name].needs]
    for call in re.findall(r"run\.require\(([^)]*)\)", code_of(name)):
        for asked in re.findall(r'"([^"]*)"', call):
            begins = asked.partition("{")[0]  # the rest of a name that a parameter ends
            assert any(
                asked.startswith(need) or (begins != asked and need.startswith(begins))
                for need in needs
            ), f"{name} asks for {asked}"


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_every_parameter_says_what_it_means(name):
    table = runs.parameter_table(name)
    assert len(table) and table["meaning"].str.strip().all(), table
    taken = runs.parameters_of(runs.find_notebook(name))
    assert taken.get("run_dir", "'runs/default'").strip("'\"") == "runs/default"


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_relative_folders_begin_at_the_root(name):
    "Each parameter that names a folder goes through the one function; a run directory by itself."
    code, notebook = code_of(name), NOTEBOOKS[name]
    for parameter in (*notebook.writes, *(parameter for parameter, _ in notebook.reads)):
        mapped = re.search(rf"map\(\s*from_root, \([^)]*\b{parameter}\b", code)
        assert mapped or re.search(rf"from_root\({parameter}\)", code), f"{name}: {parameter}"
    assert not re.search(r"Path\((out|cache|corpus|costs|work|photographs|run_dir)\)", code), name


def test_the_guide_shows_the_list_as_it_is():
    guide = nbformat.read(ROOT / "nbs/guide.ipynb", 4)
    [cell] = [cell for cell in guide.cells if "runs.notebook_table()" in cell.source]
    tables = [o["data"]["text/html"] for o in cell.outputs if "text/html" in o["data"]]
    expected = [runs.notebook_table(), *map(runs.parameter_table, NOTEBOOKS)]
    assert tables == [table.to_html(index=False) for table in expected], "execute nbs/guide.ipynb"
    titles = [o["data"]["text/markdown"] for o in cell.outputs if "text/markdown" in o["data"]]
    assert titles == [f"**{notebook.name}**: {notebook.title}" for notebook in runs.NOTEBOOKS]


def texts_of(cell):
    for output in cell.get("outputs", []):
        yield output.get("text", "")
        for kind, content in output.get("data", {}).items():
            if kind.startswith("text"):
                yield content if isinstance(content, str) else json.dumps(content)


@pytest.mark.parametrize("path", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_stored_outputs_are_fit_to_be_shown(path):
    """No representation of a path object, no place of a machine, no bar in more than its last
    state, no error.
    """
    for number, cell in enumerate(nbformat.read(path, 4).cells):
        said = "\n".join(texts_of(cell))
        where = f"{path.name}, cell {number}"
        assert not re.search(r"(Posix|Windows|Pure)\w*Path\(", said), where
        place = re.search(r"(?<![\w.])/(home|root|work|tmp|mnt|Users)/[^\s<'\"]*", said)
        assert not place, f"{where}: {place}"
        assert str(repository()) not in said, where
        assert len(re.findall(r"\d+%\|", said)) <= 1, where
        assert all(o.output_type != "error" for o in cell.get("outputs", [])), where


@pytest.mark.parametrize("path", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_notebook_is_valid_and_its_stored_pictures_are_small(path):
    "By nbformat's schema, whose breach other tools complain of; no picture over 300 kB."
    nbformat.validate(json.loads(path.read_text()))
    for number, cell in enumerate(nbformat.read(path, 4).cells):
        for output in cell.get("outputs", []):
            for kind, content in output.get("data", {}).items():
                if kind.startswith("image"):
                    assert len(content) <= 300_000, f"{path.name}, cell {number}: {kind}"


def test_one_list_makes_the_messages(tmp_path):
    run = runs.RunDirectory(tmp_path)
    for notebook in runs.NOTEBOOKS:
        for made in notebook.makes:
            with pytest.raises(FileNotFoundError, match=f"{notebook.name} makes it"):
                run.require(made)
    assert isinstance(runs.notebook_table(), pd.DataFrame) and len(runs.notebook_table()) == 23


def test_the_architecture_names_every_room():
    page = (ROOT / "nbs/architecture.ipynb").read_text()
    rooms = [path.name for path in sorted((ROOT / "nbs").glob("[0-9][0-9]_*.ipynb"))]
    table = re.findall(r"^ *\"\| \[(\w+)\]\((\d\d_\w+\.ipynb)\) \|", page, re.M)
    assert [target for _, target in table] == rooms
    assert all(target == f"{target[:2]}_{name}.ipynb" for name, target in table)
