"""The record of the AB collapse at toy size, from frames to verdicts: every switch changes the
training, what is there is kept, and the ceiling is libaom's own second answer.
"""

import json
import re
from dataclasses import asdict
from pathlib import Path

import nbformat
import numpy as np
import pytest

from av1nb import material, runs
from av1nb.files import save_json, sha256_of_file
from av1nb.partitions import children

RECORD = Path(__file__).resolve().parent.parent / "nbs/thesis/ab_collapse.ipynb"
SIDE = 128
PLACES = np.mgrid[0:SIDE:16, 0:SIDE:16].reshape(2, -1).T


def write_frame(folder, name, split, rng):
    "A frame whose nodes are all of an AB type, painted part by part; its types, and those one on."
    types = rng.permutation(np.resize(np.arange(4, 8), len(PLACES)))
    luma = np.zeros((SIDE, SIDE), np.uint16)
    for (row, col), ptype in zip(PLACES, types):
        for top, left, height, width in children(ptype, 16, row, col):
            luma[top : top + height, left : left + width] = rng.integers(100, 900)
    chroma = np.full((SIDE // 2, SIDE // 2), 512, np.uint16)

    def tree(own):
        table = np.column_stack([np.full(len(own), 16), PLACES[: len(own)], own])
        return table.astype(np.int16)

    later = np.where(rng.random(len(types)) < 0.5, types, rng.integers(0, 8, len(types)))
    arrays = dict(y=luma, u=chroma, v=chroma, nodes0=tree(types))
    if split == "test":
        arrays |= dict(level0=tree(later), preset0=tree(types[:-3]))
    np.savez(folder / f"{name}.npz", **arrays)
    told = dict(mode="allintra", cpu_used=1, qindex=128, superblock=64)
    plan = material.FramePlan(name, name, split, "native", (SIDE, SIDE), (), (told,), 0)
    entry = dict(format="av1nb material 1", plan=asdict(plan), encodes=[told | {"seconds": 1.0}])
    entry |= dict(noise=None, sha256=sha256_of_file(folder / f"{name}.npz"))
    save_json(entry, folder / f"{name}.json")
    return types, later


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    "Parameters of the toy record, its executed notebook, its results, and types one level on."
    folder, run = tmp_path_factory.mktemp("material"), tmp_path_factory.mktemp("run")
    rng = np.random.default_rng(1)
    names = dict(a="train", b="train", c="val", d="test", e="test")
    types = {name: write_frame(folder, name, split, rng) for name, split in names.items()}
    parameters = dict(
        folder=str(folder),
        run_dir=str(run),
        train=True,
        seeds=[1, 2],
        epochs={"v5": 1, "v6": 1},
        each=48,
        each_judged=64,
    )
    runs.run_notebook(RECORD, run / "record.ipynb", parameters, quiet=True)
    notebook = nbformat.read(run / "record.ipynb", 4)
    return parameters, notebook, json.loads((run / "results.json").read_text()), types


def test_every_switch_changes_the_training(record):
    _, _, results, _ = record
    trainings = results["trainings"]
    assert len(trainings) == 23
    for seed in ("1", "2"):
        weights = [known[seed]["weights"] for known in trainings.values()]
        assert len(set(weights)) == len(trainings)
    for known in trainings.values():
        assert known["1"]["weights"] != known["2"]["weights"]
        assert len(known["1"]["decided"]) == len(results["labels"]) == 128
    members = trainings["three equal members"]["1"]["members"]
    assert len(members) == 3 and trainings["reference"]["1"]["members"] == []
    assert results["counts"]["train"] and sum(results["counts"]["train"]) == 96


def test_the_ceiling_is_the_second_answer_of_libaom(record):
    _, _, results, types = record
    first, later = (np.concatenate([types[name][k] for name in "de"]) for k in (0, 1))
    assert results["labels"] == "".join(str(t - 4) for t in first)
    assert results["repeats"]["level"] == "".join(map(str, later))
    one = "".join(map(str, first[:61])) + "---"
    assert results["repeats"]["preset"][:64] == one


def test_the_notebook_ends_in_verdicts(record):
    _, notebook, _, _ = record
    text = "\n".join(
        output["data"].get("text/plain", "")
        for cell in notebook.cells
        if cell.cell_type == "code"
        for output in cell.outputs
        if "data" in output
    )
    for words in ("2. every tool within", "prior-random", "libaom one preset on", "p, Holm"):
        assert words in text, words
    assert "not measured" not in text


def test_what_is_there_is_kept_and_the_same_again(record, tmp_path):
    parameters, _, results, _ = record
    path = Path(parameters["run_dir"]) / "results.json"
    fewer = json.loads(json.dumps(results))
    fewer["trainings"]["reference"]["1"]["weights"] = "not trained again"
    gone = fewer["trainings"]["CutMix by lines"].pop("2")
    save_json(fewer, path)
    runs.run_notebook(RECORD, tmp_path / "again.ipynb", parameters, quiet=True)
    again = json.loads(path.read_text())["trainings"]
    assert again["reference"]["1"]["weights"] == "not trained again"
    assert again["CutMix by lines"]["2"]["weights"] == gone["weights"]
    assert again["CutMix by lines"]["2"]["decided"] == gone["decided"]


def test_what_the_analysis_says_stands_in_the_tables():
    cells = nbformat.read(RECORD, 4).cells
    shown = "\n".join(
        str(output["data"])
        for cell in cells
        if cell.cell_type == "code"
        for output in cell.outputs
        if "data" in output and "image/svg+xml" not in output["data"]
    )
    [prose] = [cell.source for cell in cells if cell.source.startswith("**The labels make")]
    numbers = re.findall(r"\d\.\d{3}", prose)
    assert len(numbers) > 10 and not [one for one in numbers if one not in shown]
