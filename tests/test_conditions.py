"""The cascade that is told how a frame is encoded, through all stages: block sets of whole frames,
training, thresholds, evaluation, and the two commands that ask it.
"""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from av1nb import cli, datasets, encoding, material, pictures, runs
from av1nb.files import read_json
from av1nb.heads import told_conditions
from av1nb.partitions import random_tree
from av1nb.pipeline import load_pipeline

STAGES = runs.PIPELINE[1:9]  # 001 to 008
ENCODES = (
    dict(qindex=80, mode="allintra", cpu_used=1, superblock=64),
    dict(qindex=160, mode="good", cpu_used=4, superblock=128),
)


def drawn_tree(planes, mode, cpu_used, qindex, superblock=0, **_):
    "In the place of an encoder: a random legal tree of the frame."
    height, width = planes[0].shape
    nodes = random_tree(width, height, superblock or 64, seed=qindex, split=0.6, qindex=qindex)
    return nodes[["size", "row", "col", "type"]].to_numpy().astype(np.int16), superblock or 64, 0.0


def depend_on_conditions(models):
    "Checkpoints whose modulations are as large as if they had been trained for long."
    torch.manual_seed(42)
    for path in models.glob("*_model_best.pt"):
        stored = torch.load(path, weights_only=True)
        for name, weight in stored["model_state_dict"].items():
            if name.startswith("backbone.modulations") and name.endswith("weight"):
                # a first step has moved what was the identity
                assert weight.any(), (path.name, name)
                torch.nn.init.normal_(weight)
            if name == "head.temperature":
                weight.fill_(0.1)
        torch.save(stored, path)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    "All stages from a set of three whole frames on, one epoch each."
    folder = tmp_path_factory.mktemp("conditions")
    plans = material.plan_frames([], drawings=24, further=False)
    chosen = [
        next(p for p in plans if (p.material, p.split) == ("screen", s)) for s in datasets.SPLITS
    ]
    chosen = [replace(plan, size=(320, 192), encodes=ENCODES) for plan in chosen]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(material, "frame_tree", drawn_tree)
        material.build_material(chosen, folder, folder / "set", jobs=1)
    settings = dict(material=str(folder / "set"), each=80, conditions=True, centre=True)
    settings |= dict(epochs=1, batch_size=64, frozen_epochs=0, schedule="constant")
    directory = runs.RunDirectory(folder / "run")
    runs.run_notebooks(STAGES[:6], directory, settings, quiet=True)
    depend_on_conditions(directory / "models")
    runs.run_notebooks(STAGES[6:], directory, quiet=True)
    return directory


def test_conditions_travel_from_the_encode_to_every_checkpoint(run):
    described = datasets.read_metadata(run / "dataset")["splits"]
    names = ["allintra 1, superblocks of 64, class 0", "good 4, superblocks of 128, class 0"]
    assert {split: sorted(own["encodes"]) for split, own in described.items()} == dict.fromkeys(
        datasets.SPLITS, names
    )
    train = datasets.read_block_sets(run / "dataset", splits=["train"])["train"]
    told = train.told.unique(dim=0).tolist()
    assert told == [[80, 1, 0, 0, 0], [160, 4, 1, 1, 0]]
    paths = sorted((run / "models").glob("*_model_best.pt"))
    assert len(paths) == 6
    for path in paths:
        stored = torch.load(path, weights_only=True)
        assert (
            stored["provenance"]["conditions"] and sorted(stored["provenance"]["encodes"]) == names
        )


def test_the_evaluation_tells_every_block_its_own(run):
    test = datasets.read_block_sets(run / "dataset", splits=["test"])["test"]
    cascade = load_pipeline(run.path)
    assert all(map(told_conditions, cascade.models.values()))
    table = pd.read_csv(run / "reports/predictions.csv", keep_default_na=False)
    p = cascade.stage_output("stage1", test.samples, test.told).probabilities[:, 1]
    np.testing.assert_allclose(table["stage1_PARTITION"], p, atol=1e-4)
    alone = cascade.stage_output("stage1", test.samples, test.qindex).probabilities[:, 1]
    assert not np.allclose(alone, p, atol=1e-4)


def test_the_commands_tell_what_the_user_says(run, tmp_path):
    rng = np.random.default_rng(0)
    rows, cols = np.mgrid[:64, :96]
    wave = 300 * np.sin(rows / 9) * np.cos(cols**1.4 / 25)
    luma = (512 + wave + rng.integers(-60, 60, wave.shape) * (cols > 48)).astype(np.uint16)
    chroma = np.full((32, 48), 512, np.uint16)
    pictures.write_y4m(tmp_path / "a.y4m", [(luma, chroma, chroma)])
    encoding.encode(
        [(luma, chroma, chroma)],
        tmp_path / "a.ivf",
        cq_level=30,
        cpu_used=6,
        options={"sb-size": 128},
    )
    said, nll = [], []
    for preset in (1, 4):
        out = tmp_path / f"{preset}.csv"
        cli.predict(tmp_path / "a.y4m", 120, out, run.path, preset=preset)
        said.append(pd.read_csv(out)["stage1_PARTITION"])
        out = tmp_path / f"{preset}.json"
        cli.evaluate(tmp_path / "a.ivf", run_dir=run.path, cpu_used=preset, out=out)
        nll.append(read_json(out)["levels"][0]["nll"])
    assert not np.allclose(*said, atol=1e-4) and nll[0] != nll[1]
