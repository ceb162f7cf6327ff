"""The hierarchies are data: v5 and the flat classifier run through the notebooks of v6."""

import json
import shutil

import pandas as pd
import pytest
import torch

from av1nb import runs
from av1nb.partitions import PartitionType
from conftest import av1nb

SETTINGS = {
    "pictures": ["ascent", "brick", "camera", "coffee", "coins", "rocket", "temple", "text"],
    "fractions": [0.5, 0.25, 0.25],
    "epochs": 1,
    "batch_size": 256,
}


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    run = runs.RunDirectory(tmp_path_factory.mktemp("compare"))
    table = runs.compare(
        run, ("v5", "flat"), seeds=(1,), split_seed=1, parameters=SETTINGS, quiet=True
    )
    return run, table


def copied(run, to):
    "A copy of one model's directory whose files a test may spoil."
    for room in ("dataset", "models", "reports", "raw"):
        shutil.copytree(run / room, to / room)


def test_one_table_for_all(compared, small_run):
    run, table = compared
    assert (
        list(table.model) == ["v5", "flat"] and table.split.nunique() == table.blocks.nunique() == 1
    )
    assert table.split[0] == json.loads((small_run / "metrics.json").read_text())["split_hash"]
    assert (table["blocks per second"] > 0).all() and (table["training seconds"] > 0).all()
    assert table.parameters[0] < 400_000 < 11_000_000 < table.parameters[1]
    assert table[list(runs.MEASURES)].notna().all().all()
    stored = json.loads((run / "comparison.json").read_text())
    assert [row["ten-way, accuracy"] for row in stored["rows"]] == list(table["ten-way, accuracy"])
    assert set(stored["baselines"]) == set(runs.MEASURES)
    assert {(e["model"], e["class"]) for e in stored["per_class"]} == {
        (m, t.name) for m in ("v5", "flat") for t in PartitionType
    }


def test_the_numbers_are_those_of_the_predictions(compared):
    run, table = compared
    for row in table.to_dict("records"):
        found = pd.read_csv(
            run / row["model"] / "seed_1/reports/predictions.csv", keep_default_na=False
        )
        assert len(found) == row["blocks"] and set(found.predicted) <= {
            ptype.name for ptype in PartitionType
        }
        assert row["ten-way, accuracy"] == pytest.approx((found.true == found.predicted).mean())
        assert row["stage 1, accuracy"] == pytest.approx(
            ((found.true == "NONE") == (found.predicted == "NONE")).mean()
        )


def test_each_has_its_own_stages_and_reports(compared):
    run, _ = compared
    assert sorted(p.name for p in (run / "v5/seed_1/models").glob("*_best.pt")) == [
        "stage1_model_best.pt",
        "stage2_model_best.pt",
        "stage3_1TO4_model_best.pt",
        "stage3_AB_model_best.pt",
        "stage3_RECT_model_best.pt",
    ]
    assert [p.name for p in (run / "flat/seed_1/models").glob("*_best.pt")] == ["ten_model_best.pt"]
    for name, stages in (("v5", {"stage1", "stage2", "RECT", "AB", "1TO4"}), ("flat", {"ten"})):
        own = run / name / "seed_1"
        attribution = json.loads((own / "reports/confusion.json").read_text())["attribution"]
        assert (
            set(attribution) == stages | {"right", "uncovered"}
            and attribution["uncovered"]["blocks"] == 0
        )
        figures = {p.name for p in (own / "figures").iterdir()}
        assert {"confusion_ten.svg", "error_flow.svg", "predicted_beside_coded.png"} <= figures
        assert ("thresholds_stage1.svg" in figures) == (name == "v5")
    assert set(
        json.loads((run / "v5/seed_1/reports/thresholds.json").read_text())["thresholds"]
    ) == {"stage1"}


def test_what_is_done_is_not_run_again_and_seeds_are_added(compared):
    run, table = compared
    before = {
        path: path.stat().st_mtime_ns
        for path in run.path.rglob("*")
        if path.is_file() and path.name != "comparison.json"
    }
    joint = json.loads((run / "flat/seed_1/reports/pipeline.json").read_text()) | {"seconds": 5.0}
    (run / "joint/seed_1").mkdir(parents=True)
    (run / "joint/seed_1/report.json").write_text(json.dumps(joint))
    settings = [
        part for name, value in SETTINGS.items() for part in ("-p", f"{name}={json.dumps(value)}")
    ]
    done = av1nb(
        "compare",
        "--run-dir",
        run.path,
        "--hierarchy",
        "flat",
        "--seed",
        1,
        "--seed",
        2,
        "--split-seed",
        1,
        *settings,
    )
    # nothing of seed 1 was made again
    assert {path: path.stat().st_mtime_ns for path in before} == before
    rows = pd.DataFrame(json.loads((run / "comparison.json").read_text())["rows"])
    assert list(zip(rows.model, rows.seed)) == [("flat", 1), ("flat", 2), ("joint", 1)]
    assert (
        rows["ten-way, accuracy"][0]
        == rows["ten-way, accuracy"][2]
        == table["ten-way, accuracy"][1]
    )
    one, other = (
        torch.load(run / f"flat/seed_{seed}/models/ten_model_best.pt", weights_only=True)
        for seed in (1, 2)
    )
    assert (one["seed"], other["seed"]) == (1, 2) and one["split_hash"] == other["split_hash"]
    assert not torch.equal(
        one["model_state_dict"]["backbone.conv1.weight"],
        other["model_state_dict"]["backbone.conv1.weight"],
    )
    assert "±" in done.stdout and "ten-way, accuracy" in done.stdout and "joint" in done.stdout
    shutil.rmtree(run / "joint")


def test_v5_specialists_keep_the_backbone_they_started_from(compared):
    run, _ = compared
    # noqa: E731
    load = lambda name: torch.load(
        run / f"v5/seed_1/models/{name}_model_best.pt", weights_only=True
    )["model_state_dict"]
    stage1, stage2 = load("stage1"), load("stage2")
    for name in ("RECT", "AB", "1TO4"):  # running means and variances of the normalisation too
        specialist = load(f"stage3_{name}")
        assert all(
            torch.equal(stage2[k], specialist[k]) for k in stage2 if k.startswith("backbone.")
        )
    # stage 1 keeps its own
    assert not torch.equal(stage1["backbone.stem.conv.weight"], stage2["backbone.stem.conv.weight"])


def test_an_absent_v5_specialist_falls_back_and_the_report_says_so(compared, tmp_path):
    run, _ = compared
    copied(runs.RunDirectory(run / "v5/seed_1"), tmp_path)
    (tmp_path / "models/stage3_1TO4_model_best.pt").unlink()
    refused = av1nb(
        "run",
        "008",
        "--run-dir",
        tmp_path,
        "-p",
        "hierarchy=v5",
        "-p",
        "absent=refuse",
        check=False,
    )
    assert (
        refused.returncode == 1
        and "1TO4" in refused.stderr
        and "006_train_stage3_ab" in refused.stderr
    )
    done = av1nb("run", "007", "008", "009", "--run-dir", tmp_path, "-p", "hierarchy=v5")
    report = json.loads((tmp_path / "reports/pipeline.json").read_text())["report"]
    said = report["fallback"]["1TO4"]
    assert (
        said["type"] in ("HORZ_4", "VERT_4")
        and f"Specialist 1TO4 is absent: its blocks are given {said['type']}" in done.stdout
    )
    predicted = set(
        pd.read_csv(tmp_path / "reports/predictions.csv", keep_default_na=False).predicted
    )
    assert {"HORZ_4": "VERT_4", "VERT_4": "HORZ_4"}[said["type"]] not in predicted
    shutil.copy(run / "v5/seed_1/models/stage3_1TO4_model_best.pt", tmp_path / "models")
    (tmp_path / "models/stage2_model_best.pt").unlink()
    # only specialists can be replaced
    refused = av1nb("run", "008", "--run-dir", tmp_path, "-p", "hierarchy=v5", check=False)
    assert (
        refused.returncode == 1
        and "stage2" in refused.stderr
        and "004_train_stage2" in refused.stderr
    )


def test_a_checkpoint_of_the_other_system_is_refused(compared, small_run, tmp_path):
    run, _ = compared
    copied(runs.RunDirectory(run / "v5/seed_1"), tmp_path)
    # as this code writes it, and as the original did: nothing but weights
    for strip in (False, True):
        content = torch.load(small_run / "models/stage1_model_best.pt", weights_only=True)
        torch.save(
            {"model_state_dict": content["model_state_dict"]} if strip else content,
            tmp_path / "models/stage1_model_best.pt",
        )
        done = av1nb("run", "008", "--run-dir", tmp_path, "-p", "hierarchy=v5", check=False)
        assert (
            done.returncode == 1
            and "a v6 checkpoint" in done.stderr
            and "expected a v5 checkpoint" in done.stderr
        )
