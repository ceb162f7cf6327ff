"""The joint network from end to end: its stage on a few pictures, the shipped weights, `av1nb
predict` right after installation.
"""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from av1nb import datasets, frames, joint, pictures, runs
from av1nb.partitions import PartitionType, mi_arrays
from av1nb.sample import load_sample

AV1NB = Path(sys.executable).parent / "av1nb"
FEW = {"pictures": ["coffee", "text", "rocket", "coins", "flower"], "excel": False}


@pytest.fixture(scope="module")
def joint_run(tmp_path_factory):
    "The stage on five small pictures, two epochs."
    run = runs.RunDirectory(tmp_path_factory.mktemp("joint"))
    runs.run_notebooks(
        ["000_raw", "001_prepare_dataset", "010_joint"],
        run,
        {"seed": 42},
        {
            "000_raw": FEW,
            "001_prepare_dataset": {"fractions": [0.4, 0.3, 0.3]},
            "010_joint": {"epochs": 2, "device": "cpu"},
        },
        quiet=True,
    )
    return run


def test_the_stage_hands_on_how_a_step_is_captured(joint_run, tmp_path):
    asked = {"capture": "graph", "name": "captured", "epochs": 1, "device": "cpu"}
    with pytest.raises(runs.RunError, match="capture='graph' needs a CUDA device, but this is cpu"):
        runs.run_notebook(
            runs.find_notebook("010_joint"),
            tmp_path / "captured.ipynb",
            asked | {"run_dir": str(joint_run.path)},
            quiet=True,
        )
    assert not list((joint_run / "models").glob("captured*"))


def test_stage_writes_what_a_comparison_reads(joint_run):
    row, full = runs.read_result(joint_run.path)
    assert row["parameters"] <= 1_500_000
    assert (
        full["hierarchy"] == "joint"
        and not full["uncovered"]
        and row["split"] == datasets.read_metadata(joint_run / "dataset")["split_hash"]
    )
    levels = pd.DataFrame(json.loads((joint_run / "reports/joint.json").read_text())["levels"])
    assert set(levels["size"]) == {64, 32, 16, 8} and set(levels["qindex"]) == {
        "all",
        80,
        128,
        172,
        220,
    }
    table = pd.read_csv(joint_run / "reports/joint_predictions.csv")
    blocks = datasets.read_block_sets(joint_run / "dataset")["test"]
    assert (table["true"] == [PartitionType(t).name for t in blocks.types.tolist()]).all()


def test_a_block_is_answered_with_its_own_place(joint_run):
    "Predictions at blocks are the maps at (row, col) of the block's frame and quantiser."
    sets = datasets.read_block_sets(joint_run / "dataset")
    pictures = frames.split_pictures(
        frames.recorded_pictures(joint_run / "raw"), sets["test"].assignment
    )["test"]
    predictor = joint.JointPredictor.load(
        joint_run / "models/joint_model_best.pt", sets["test"].split_hash
    )
    predictions = joint.predict_blocks(predictor, pictures, sets["test"])
    table, rng = sets["test"].table(), np.random.default_rng(0)
    for i in rng.choice(len(table), 20, replace=False):
        row = table.iloc[i]
        luma = dict(frames.numbered(next(p for p in pictures if p.name == row["sequence"])))[
            row["frame"]
        ]
        assert (
            predictions.types[i]
            == predictor.maps(luma, int(row["qindex"]))[16][
                row["row"] // 16, row["col"] // 16
            ].argmax()
        )


def test_a_training_that_was_interrupted_goes_on_exactly(joint_run, tmp_path):
    pictures = load_sample(["text", "coins"])
    crops = [frames.FrameSet([p], 64) for p in pictures]
    small = dict(widths=(16, 16, 16, 16), depths=(1, 1, 1, 1), progress=False)
    config = joint.joint_config("cpu", epochs=3, batch_size=8)
    whole, _ = joint.train_joint(*crops, tmp_path / "whole", {"split_hash": "x"}, config, **small)

    class Killed(Exception):
        pass

    class Dies(joint.TreeLikelihood):
        steps = 0

        def forward(self, *args):
            Dies.steps += self.training
            if Dies.steps > len(frames.CropBatches(crops[0], 8)) * 1.5:
                raise Killed
            return super().forward(*args)

    with pytest.raises(Killed):
        joint.train_joint(
            *crops, tmp_path / "part", {"split_hash": "x"}, config, objective=Dies(), **small
        )
    resumed, _ = joint.train_joint(*crops, tmp_path / "part", {"split_hash": "x"}, config, **small)
    for a, b in zip(whole.state_dict().values(), resumed.state_dict().values()):
        assert torch.equal(a, b)


def test_shipped_weights_are_small_and_know_something():
    """On test sequences of the sample the shipped network is better than the most frequent type, at
    32 and 16 by far.
    """
    path = joint.shipped_weights()
    assert path.stat().st_size <= 6_000_000 and (path.parent / "CARD.md").is_file()
    predictor, pictures = joint.JointPredictor.load(), load_sample(
        ["ascent", "coins", "earth", "gravel", "tissue"]
    )
    content = joint.JointModel.load(path)[1]
    assert content["provenance"]["split_hash"] and content["seed"] == 42
    levels = joint.level_report(predictor, pictures)
    own = levels[levels["qindex"] == "all"].set_index("size")
    types = frames.FrameSet(pictures, 64).counts()
    for size, least in ((32, 0.02), (16, 0.02), (8, 0)):
        assert own.accuracy[size] > types[size].max() / types[size].sum() + least, size


def test_predict_works_right_after_installation(tmp_path):
    luma = load_sample(["coffee"])[0].luma[:, :160, :200]
    pictures.write_y4m(tmp_path / "new.y4m", luma)
    said = subprocess.run(
        [
            AV1NB,
            "predict",
            tmp_path / "new.y4m",
            "--qindex",
            "128",
            "--out",
            tmp_path / "p.csv",
            "--confidence",
            "0.8",
        ],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    assert "200×160" in said and (tmp_path / "p.png").is_file()
    table = pd.read_csv(tmp_path / "p.csv", keep_default_na=False)
    tree = table.assign(type=[int(PartitionType[name]) for name in table["type"]])
    mi_arrays(tree, 200, 160)
    probabilities = table[[f"p_{t.name}" for t in PartitionType]].to_numpy()
    assert np.allclose(probabilities.sum(1), 1, atol=1e-3)
    reached = [
        sum(row[f"p_{name}"] for name in row["set"].split("|")) for _, row in table.iterrows()
    ]
    assert min(reached) >= 0.8 - 1e-3


def test_the_quantiser_matters(tmp_path):
    "A coarser quantiser gives larger blocks: the encoder does it, and so does the network."
    picture = load_sample(["coffee"])[0]
    predictor = joint.JointPredictor.load()
    nodes = [
        len(joint.decode_tree(predictor.maps(picture.luma[0], q), *picture.luma.shape[:0:-1], q))
        for q in (80, 220)
    ]
    coded = [len(picture.nodes[q]) for q in (80, 220)]
    assert nodes[0] > 1.2 * nodes[1] and coded[0] > coded[1]
