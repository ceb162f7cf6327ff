"""All ten stages from the sample to the table, headlessly, and what they leave behind."""

import dataclasses
import json
import os
import re
import shutil

import nbformat
import numpy as np
import pandas as pd
import papermill
import pytest
import torch

from av1nb import contract, datasets, pictures, recordings, runs, training
from av1nb.partitions import V6
from conftest import ROOT, av1nb


def test_every_stage_leaves_its_notebook_and_files(small_run):
    for stage in runs.PIPELINE_NOTEBOOKS:
        nb = nbformat.read(small_run / f"notebooks/{stage.name}.ipynb", 4)
        assert all(
            cell.execution_count for cell in nb.cells if cell.cell_type == "code" and cell.source
        ), stage.name
        small_run.require(*stage.makes)
    pictures = {p.stem for p in (small_run / "figures").glob("*.png")}
    assert pictures == {"raw_tree", "samples_RECT", "samples_AB", "predicted_beside_coded"}
    assert len(list((small_run / "figures").glob("*.svg"))) >= 10
    assert not list(small_run.path.rglob("*.part*"))


def test_metrics_hold_the_table_with_split_and_versions(small_run):
    stored = json.loads((small_run / "metrics.json").read_text())
    rows = {row["stage"]: row for row in stored["rows"]}
    assert list(rows) == [*V6.stage_names, "pipeline"]
    test = datasets.read_block_sets(small_run / "dataset")["test"]
    assert stored["split_hash"] == test.split_hash
    assert rows["pipeline"]["blocks"] == rows["stage1"]["blocks"] == len(test)
    for row in rows.values():
        assert (
            0 <= row["low"] <= row["value"] <= row["high"] <= 1
            and row["baseline"] > 0
            and row["seconds"] > 0
        )
    assert {"torch", "imagecodecs", "python"} <= set(stored["versions"])
    predictions = pd.read_csv(small_run / "reports/predictions.csv", keep_default_na=False)
    assert rows["pipeline"]["value"] == pytest.approx(
        (predictions["true"] == predictions["predicted"]).mean()
    )


def test_the_three_sets_share_no_picture_and_cover_everything(small_run):
    sets = datasets.read_block_sets(small_run / "dataset")
    names = [set(blocks.sequence_names) for blocks in sets.values()]
    assert not names[0] & names[1] and not names[0] & names[2] and not names[1] & names[2]
    listed = recordings.list_recordings(small_run / "raw")
    assert set.union(*names) == {r.sequence for r in listed}
    assert sum(map(len, sets.values())) == sum(r.blocks[16] for r in listed)
    assert {len(set(r.qindexes)) for r in listed} == {1} and len(
        {q for r in listed for q in r.qindexes}
    ) == 4


def test_labels_in_the_sets_are_those_of_the_logs(small_run):
    test = datasets.read_block_sets(small_run / "dataset")["test"]
    table = test.table()
    for name, part in table.groupby("recording"):
        logged = (
            contract.read_partition_logs(small_run / f"raw/logs/{name}")
            .query("size == 16")
            .set_index(["frame", "row", "col"])
        )
        found = logged.loc[list(zip(part.frame, part.row, part.col))]
        assert (found["type"].to_numpy() == part["type"].to_numpy()).all() and (
            found.qindex.to_numpy() == part.qindex.to_numpy()
        ).all()


def test_thresholds_come_from_validation_and_checkpoints_know_their_split(small_run):
    settings = json.loads((small_run / "reports/thresholds.json").read_text())
    assert settings["split"] == "val" and 0 < settings["thresholds"]["stage1"] < 1
    for path in (small_run / "models").glob("*_best.pt"):
        content = torch.load(path, weights_only=True)
        assert (
            content["split_hash"] == settings["split_hash"]
            and content["normalisation"] == "uint16/1023"
        ), path.name
    assert (
        torch.load(small_run / "models/stage1_model_best.pt", weights_only=True)["calibration"][
            "temperature"
        ]
        > 0
    )


def test_ensemble_members_differ(small_run):
    members = [
        torch.load(small_run / f"models/stage3_AB_{k}_model_best.pt", weights_only=True)[
            "model_state_dict"
        ]
        for k in (1, 2, 3)
    ]
    key = next(k for k in members[0] if k.startswith("head.") and k.endswith("weight"))
    assert not torch.equal(members[0][key], members[1][key]) and not torch.equal(
        members[1][key], members[2][key]
    )


def test_a_finished_stage_is_kept_and_the_same_seed_gives_the_same_weights(
    small_run, tmp_path, capsys
):
    receipt = json.loads((small_run / "notebooks/003_train_stage1.json").read_text())
    run = runs.RunDirectory(tmp_path / "again")
    shutil.copytree(small_run / "dataset", run / "dataset")
    runs.run_notebooks(["003"], run, receipt["parameters"], quiet=True)
    first, second = (
        torch.load(r / "models/stage1_model_best.pt", weights_only=True)["model_state_dict"]
        for r in (small_run, run)
    )
    assert all(torch.equal(first[k], second[k]) for k in first)
    runs.run_notebooks(["003"], run, receipt["parameters"], keep=True, quiet=True)
    assert "kept" in capsys.readouterr().out


@pytest.mark.parametrize(
    "folder, notebook",
    [("nbs/stages", "003_train_stage1.ipynb"), ("nbs/thesis", "v6_on_the_sample.ipynb")],
)
def test_a_notebook_opened_in_its_own_folder_finds_the_run(small_run, tmp_path, folder, notebook):
    "As JupyterLab does: the kernel starts in the notebook's folder, the run directory is relative."
    relative = os.path.relpath(small_run.path, ROOT)  # from the repository's root
    assert not os.path.isabs(relative) and not (ROOT / folder / relative).exists()
    parameters = {"run_dir": relative}
    if notebook.startswith("003"):
        receipt = runs.read_json(small_run / "notebooks/003_train_stage1.json")
        parameters |= receipt["parameters"]
    before = training.History.load(small_run / "models/stage1_history.pt")
    papermill.execute_notebook(
        ROOT / folder / notebook,
        tmp_path / notebook,
        parameters,
        cwd=ROOT / folder,
        progress_bar=False,
        start_timeout=600,
    )
    assert not (ROOT / folder / "runs").exists()  # nothing was made beside the notebook
    # seconds included: it was not trained again
    assert training.History.load(small_run / "models/stage1_history.pt") == before


def test_pages_show_the_results_of_a_run_without_bars(small_run, tmp_path, monkeypatch, capsys):
    shutil.copytree(ROOT / "nbs/stages", tmp_path / "nbs/stages")
    monkeypatch.setenv("AV1NB_NOTEBOOKS", str(tmp_path / "nbs"))
    elsewhere = [
        dataclasses.replace(notebook, shown=str(tmp_path / "joint"))
        for notebook in runs.NOTEBOOKS[len(runs.PIPELINE) :]
    ]
    monkeypatch.setattr(runs, "NOTEBOOKS", (*runs.PIPELINE_NOTEBOOKS, *elsewhere))
    runs.publish_pages(small_run.path)
    assert capsys.readouterr().out.count("its page stays as it is") == len(elsewhere)
    for name in runs.PIPELINE:
        page = nbformat.read(tmp_path / f"nbs/stages/{name}.ipynb", 4)
        outputs = [o for cell in page.cells for o in cell.get("outputs", [])]
        assert outputs, name
        for output in outputs:
            said = output.get("text", "") + output.get("data", {}).get("text/plain", "")
            assert not re.search(r"\d+%\||Path\(", said) and str(small_run.path) not in said, said


def test_predict_and_evaluate_on_a_new_video(small_run, tmp_path):
    from av1nb import encoding, sample, streams

    picture = next(p for p in sample.load_sample() if p.luma.shape[1] >= 96)
    luma = np.ascontiguousarray(picture.luma[0, :96, :160])
    chroma = np.full((48, 80), 512, np.uint16)
    pictures.write_y4m(tmp_path / "new.y4m", [(luma, chroma, chroma)])
    encoding.encode([(luma, chroma, chroma)], tmp_path / "new.ivf", cq_level=20, cpu_used=4)
    said = av1nb(
        "predict", tmp_path / "new.y4m", "--run-dir", small_run.path, "--out", tmp_path / "p.csv"
    ).stdout
    assert (
        "1 frame of 160×96" in said
        and "60 blocks of 16×16: " in said
        and (tmp_path / "p.png").stat().st_size > 1000
    )
    table = pd.read_csv(tmp_path / "p.csv", keep_default_na=False)
    assert len(table) == 60 and set(zip(table.row, table.col)) == {
        (r, c) for r in range(0, 96, 16) for c in range(0, 160, 16)
    }
    said = av1nb(
        "evaluate",
        tmp_path / "new.ivf",
        "--run-dir",
        small_run.path,
        "--video",
        tmp_path / "new.y4m",
        "--out",
        tmp_path / "e.json",
    ).stdout
    nodes = next(iter(streams.read_trees(tmp_path / "new.ivf"))).nodes().query("size == 16")
    report = json.loads((tmp_path / "e.json").read_text())
    assert report["nodes"] == len(nodes) and f"{len(nodes)} nodes of 1 intra frame" in said
    assert "the cascade v6" in said and {row["size"] for row in report["levels"]} == {16}
    assert (tmp_path / "e.png").stat().st_size > 1000
