"""The repository agrees with itself: notebooks, package, README, import order, stored outputs."""

import ast
import configparser
import filecmp
import io
import re
import shutil
import subprocess
import sys
import tokenize
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
    lists = ("requirements", "dev_requirements", "cluster_requirements", "explore_requirements")
    wanted = " ".join(settings["DEFAULT"][name] for name in lists).split()
    assert {re.split(r"[<>=]", w)[0].lower() for w in wanted} <= locked


# Exported cells of more than 70 lines that stay whole, by module and first name, with the reason.
WHOLE = {
    ("joint", "JointPredictor"): "one class: what it keeps between frames is used by every method",
    ("libaom", "Libaom"): "one class: the calls of one library",
    ("partitions", "Hierarchy"): "one class: labels, routes and final types undo each other",
    ("steering", "encode_masked"): "one function, a third of it documented parameters",
    ("streams", "Trees"): "one class: an iterator and the state of its decoder",
}


def exported_cells():
    "Module, name of the first definition and source of every cell that was exported."
    for path in sorted((ROOT / "av1nb").glob("[a-z]*.py")):
        for source in re.split(r"^# %% .*\n", path.read_text(), flags=re.M)[1:]:
            tree = ast.parse(source)
            if source.startswith("__all__"):
                continue  # generated
            names = (getattr(node, "name", None) for node in tree.body)
            yield path.stem, next((name for name in names if name), ""), source.strip("\n"), tree


def comment_rows(source):
    "Row → whether a comment is all that stands there."
    tokens = tokenize.generate_tokens(io.StringIO(source + "\n").readline)
    lines = source.split("\n")
    return {
        token.start[0]: not lines[token.start[0] - 1][: token.start[1]].strip()
        for token in tokens
        if token.type == tokenize.COMMENT
    }


def public_functions(tree):
    "Name and node of public functions, and of the public methods of public classes."
    for node in tree.body:
        if getattr(node, "name", "_").startswith("_"):
            continue
        if isinstance(node, ast.FunctionDef):
            yield node.name, node
        elif isinstance(node, ast.ClassDef):
            for method in node.body:
                if isinstance(method, ast.FunctionDef) and (
                    method.name == "__init__" or not method.name.startswith("_")
                ):
                    yield f"{node.name}.{method.name}", method


def test_public_parameters_are_typed_and_documented():
    found = []
    for module, _, source, tree in exported_cells():
        if module == "cli":  # the help of its options is shown to users
            continue
        comments = comment_rows(source)
        for name, node in public_functions(tree):
            listed = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
            defaults = node.args.defaults + [d for d in node.args.kw_defaults if d is not None]
            for parameter in listed:
                if parameter.arg in ("self", "cls"):
                    continue
                ends = [d.end_lineno for d in defaults if d.lineno == parameter.end_lineno]
                beside = comments.get(max([parameter.end_lineno, *ends])) is False
                if parameter.annotation is None:
                    found.append(f"{module}.{name}: {parameter.arg} has no type")
                if not beside and not comments.get(parameter.lineno - 1):
                    found.append(f"{module}.{name}: {parameter.arg} has no comment")
    assert not found, "\n".join(found)


def test_exported_cells_fit_a_glance():
    long = {
        (module, first): source.count("\n") + 1
        for module, first, source, _ in exported_cells()
        if source.count("\n") >= 70
    }
    assert long.keys() <= WHOLE.keys(), {k: n for k, n in long.items() if k not in WHOLE}
    assert WHOLE.keys() <= set(long), f"no longer long: {WHOLE.keys() - set(long)}"


def test_cells_import_or_compute():
    "nbdev warns of hidden cells that do both, because pages are rendered without running them."
    for path in LIBRARY:
        for number, cell in enumerate(nbformat.read(path, 4).cells):
            if cell.cell_type != "code" or re.search(
                r"#\| *(exports?|eval: *false)\b", cell.source
            ):
                continue
            tree = ast.parse(re.sub(r"^%", "#", cell.source, flags=re.M))
            kinds = {type(node) for node in ast.walk(tree)}
            mixed = kinds & {ast.Import, ast.ImportFrom} and kinds & {ast.Expr, ast.Assign}
            assert not mixed, f"{path.name}, cell {number}: split its imports off"


def test_lines_of_code_fit_the_page():
    for path in NOTEBOOKS:
        for number, cell in enumerate(nbformat.read(path, 4).cells):
            if cell.cell_type == "code":
                wide = [line for line in cell.source.split("\n") if len(line) > 100]
                # a row of a list of files ends with its SHA-256
                wide = [line for line in wide if not re.search(r"\| [0-9a-f]{64}$", line)]
                assert not wide, f"{path.relative_to(ROOT)}, cell {number}: {wide[0]}"
    for module, _, source, _ in exported_cells():
        assert all(len(line) <= 100 for line in source.split("\n")), module


def test_comprehensions_are_at_most_two_deep():
    kinds = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)

    def depth(node):
        below = max(map(depth, ast.iter_child_nodes(node)), default=0)
        return below + isinstance(node, kinds)

    for module, first, _, tree in exported_cells():
        assert depth(tree) <= 2, f"{module}, the cell of {first}"


def test_no_import_is_unused():
    for path in sorted((ROOT / "av1nb").glob("[a-z]*.py")):
        tree = ast.parse(path.read_text())
        imported = {
            (alias.asname or alias.name).split(".")[0]: node.lineno
            for node in ast.walk(tree)
            if isinstance(node, (ast.Import, ast.ImportFrom))
            for alias in node.names
        }
        used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        listed = set()  # names that __all__ hands on
        for node in tree.body:
            if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
                listed = set(ast.literal_eval(node.value))
        assert not set(imported) - used - listed, f"{path.name}: {set(imported) - used - listed}"
