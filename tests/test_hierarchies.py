"""The hierarchies are data: v5 and the flat classifier run through the notebooks of v6."""
import json
import shutil

import pandas as pd
import pytest
import torch

from av1nb import runs
from av1nb.partitions import PartitionType
from conftest import av1nb


@pytest.fixture(scope="module")
def compared(small_run, tmp_path_factory):
    run = runs.RunDirectory(tmp_path_factory.mktemp("compare"))
    for name in ("v5", "flat"):
        for room in ("raw", "dataset"): shutil.copytree(small_run / room, run / name / room)
    once = {stage: {"epochs": 1, "batch_size": 256} for stage in runs.PIPELINE[3:7]}
    raw = {"000_raw": json.loads((small_run / "notebooks/000_raw.json").read_text())["parameters"],
           "001_prepare_dataset": {"fractions": [0.5, 0.25, 0.25]}}
    table = runs.compare(run, ("v5", "flat"), seed=1, parameters=once | raw, quiet=True)
    return run, table


def test_one_table_for_all(compared, small_run):
    run, table = compared
    assert list(table.hierarchy) == ["v5", "flat"] and table.split.nunique() == 1
    assert table.split[0] == json.loads((small_run / "metrics.json").read_text())["split_hash"]
    assert (table["blocks per second"] > 0).all() and (table["training seconds"] > 0).all()
    assert table.parameters[0] < 400_000 < 11_000_000 < table.parameters[1]
    assert table[["NONE or not", "groups", "RECT", "AB", "1TO4", "accuracy", "macro-F1"]].notna().all().all()
    stored = json.loads((run / "comparison.json").read_text())["rows"]
    assert [row["accuracy"] for row in stored] == list(table.accuracy)


def test_each_has_its_own_stages_and_predictions(compared):
    run, _ = compared
    assert sorted(p.name for p in (run / "v5/models").glob("*_best.pt")) == [
        "stage1_model_best.pt", "stage2_model_best.pt", "stage3_1TO4_model_best.pt", "stage3_AB_model_best.pt", "stage3_RECT_model_best.pt"]
    assert [p.name for p in (run / "flat/models").glob("*_best.pt")] == ["ten_model_best.pt"]
    for name in ("v5", "flat"):
        predictions = pd.read_csv(run / name / "reports/predictions.csv", keep_default_na=False)
        assert len(predictions) > 100 and set(predictions.predicted) <= {ptype.name for ptype in PartitionType}


def test_v5_specialists_keep_the_backbone_they_started_from(compared):
    run, _ = compared
    load = lambda name: torch.load(run / f"v5/models/{name}_model_best.pt", weights_only=True)["model_state_dict"]  # noqa: E731
    stage2, rect = load("stage2"), load("stage3_RECT")
    assert all(torch.equal(stage2[k], rect[k]) for k in stage2 if k.startswith("backbone."))


def test_an_absent_v5_specialist_falls_back_and_the_report_says_so(compared, tmp_path):
    run, _ = compared
    for room in ("dataset", "models", "reports"): shutil.copytree(run / "v5" / room, tmp_path / room)
    shutil.copytree(run / "v5/raw", tmp_path / "raw")
    (tmp_path / "models/stage3_1TO4_model_best.pt").unlink()
    refused = av1nb("run", "008", "--run-dir", tmp_path, "-p", "hierarchy=v5", check=False)
    assert refused.returncode == 1 and "1TO4" in refused.stderr
    av1nb("run", "008", "009", "--run-dir", tmp_path, "-p", "hierarchy=v5", "-p", "absent=majority")
    report = json.loads((tmp_path / "reports/pipeline.json").read_text())["report"]
    assert report["fallback"]["1TO4"]["type"] in ("HORZ_4", "VERT_4")


def test_a_checkpoint_of_the_other_system_is_refused(compared, small_run, tmp_path):
    run, _ = compared
    for room in ("dataset", "models", "reports"): shutil.copytree(run / "v5" / room, tmp_path / room)
    shutil.copy(small_run / "models/stage1_model_best.pt", tmp_path / "models/stage1_model_best.pt")
    done = av1nb("run", "008", "--run-dir", tmp_path, "-p", "hierarchy=v5", check=False)
    assert done.returncode == 1 and "v6" in done.stderr and "v5" in done.stderr
