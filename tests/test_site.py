"""The rendered site: every exported name has its place, no link is broken, no cell failed."""

import hashlib
import html
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from av1nb.pages import cited_keys, print_site, read_references, resolve_citations

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


RECORDS = sorted(
    path
    for path in (ROOT / "nbs/thesis").glob("*.ipynb")
    if path.stem not in ("bibliography", "changelog")
)


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.stem)
def test_a_record_says_where_its_numbers_come_from(path):
    "Command, commit and hashes: stored in words, or made by the cell that does it on every run."
    text = "\n\n".join(cells_of(path, "markdown"))
    assert "runs.provenance(" in "\n".join(cells_of(path, "code"))
    assert re.search(r"^```(ba)?sh\n", text, re.M), "no command"
    cells = json.loads(path.read_text())["cells"]
    ran = [cell for cell in cells if "runs.provenance(" in "".join(cell["source"])]
    if shown := "".join(json.dumps(cell["outputs"]) for cell in ran).partition("commit")[2]:
        assert re.search(r"[0-9a-f]{40}", shown), "no commit"
        named, whole = (
            re.findall(f"SHA-256 of {rest}", shown) for rest in ("", r".*?[0-9a-f]{64}")
        )
        assert named and len(named) == len(whole), "a hash is cut off"
        return
    stored = text[text.index("### Provenance") :]
    commit = re.search(r"Commit `([0-9a-f]{12})`", stored)[1]
    hashes = re.findall(r"\| `([\w./]+)` \| `([0-9a-f]{64})` \|", stored)
    assert hashes
    for name, said in hashes:
        git = ["git", "-C", ROOT, "show", f"{commit}:{name}"]
        done = subprocess.run(git, capture_output=True)
        if done.returncode == 0:  # a clone with the whole history
            assert hashlib.sha256(done.stdout).hexdigest() == said, name


SAID = """
<script>
  const table = document.querySelector("table");
  const buttons = document.querySelectorAll(".copy-table button");
  document.body.textContent =
    "said" + JSON.stringify([buttons.length, tableAs.csv(table), tableAs.latex(table)]);
</script>
"""


def test_tables_can_be_copied(site, tmp_path):
    for path in RECORDS:
        assert "window.tableAs" in (site / f"_proc/_docs/thesis/{path.stem}.html").read_text()
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("needs Chromium: apt-get install chromium")
    table = """<main><table><thead><tr><th></th><th>macro_F1</th><th>a, "b"</th></tr></thead>
      <tbody><tr><th rowspan="2">v6</th><td>0.5 ± 0.1</td><td>x &amp; y</td></tr>
      <tr><td>−0.2</td><td>50 %</td></tr></tbody></table></main>"""
    page = tmp_path / "page.html"
    script = (ROOT / "nbs/tables.html").read_text()
    page.write_text(f'<!doctype html><meta charset="utf-8"><body>{table}{script}{SAID}')
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    shown = subprocess.run(
        [browser, *flags, page.as_uri()], capture_output=True, text=True, timeout=300
    ).stdout
    said = json.loads(html.unescape(re.search(r"said(\[.*\])", shown)[1]))
    assert said == [
        2,
        ',macro_F1,"a, ""b"""\nv6,0.5 ± 0.1,x & y\n,−0.2,50 %\n',
        (
            '\\begin{tabular}{lrl}\n\\toprule\n & macro\\_F1 & a, "b" \\\\\n\\midrule\nv6 & 0.5'
            " $\\pm$ 0.1 & x \\& y \\\\\n & $-$0.2 & 50 \\% \\\\\n\\bottomrule\n\\end{tabular}\n"
        ),
    ]


def test_a_book_is_printed(tmp_path):
    "Links between chapters, formulas and numbers of pages, in a book of three pages."
    (tmp_path / "site").mkdir()
    for name, body in {
        "index": '<h1>First</h1><p>See <a href="b.html#x">there</a>.</p>',
        "b": r'<h1>Second</h1><p id="x"><span class="math inline">\(n_i\)</span></p>',
    }.items():
        (tmp_path / f"site/{name}.html").write_text(f"<main>{body}</main>")
    settings = """website: {title: A book, description: Of two,
      sidebar: {contents: [index.ipynb, {section: Rest, contents: [b.ipynb]}]}}"""
    (tmp_path / "_quarto.yml").write_text(settings)
    out = tmp_path / "book.pdf"
    try:
        n = print_site(tmp_path / "site", tmp_path / "_quarto.yml", ROOT / "nbs/book.css", out)
    except RuntimeError as error:
        pytest.skip(str(error))
    assert n == 4 and out.read_bytes().startswith(b"%PDF")


def test_no_cell_failed(site):
    for page in (site / "_proc/_docs").rglob("*.html"):
        assert "Traceback (most recent call last)" not in page.read_text(), page.name
