"""The record of negative transfer at toy size: every defect that it injects is one."""

from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch

from av1nb.backbones import ResNet18
from av1nb.datasets import BlockSet
from av1nb.files import read_json

RECORD = Path(__file__).parent.parent / "nbs/thesis/negative_transfer.ipynb"
TYPES = [0, 1, 2, 3, 4, 5, 6, 7]


def toy_blocks(split, groups, seed):
    "A frame of 8×8 blocks a group, noise with a brightness for each type."
    rng = np.random.default_rng(seed)
    count = 64 * groups
    types = rng.choice(TYPES, count)
    samples = rng.integers(0, 200, (count, 1, 16, 16)) + 100 * types[:, None, None, None]
    place = np.arange(count) % 64
    group = torch.arange(count) // 64
    columns = [group, group, torch.zeros_like(group)]
    columns += [torch.from_numpy(16 * place // 128 * 16), torch.from_numpy(16 * (place % 8))]
    names = tuple(f"{split}{number}" for number in range(groups))
    return BlockSet(
        torch.from_numpy(samples.astype(np.uint16)),
        torch.from_numpy(types),
        torch.full((count,), 80),
        *columns,
        names,
        names,
        split,
        assignment={"toy": split},
        split_hash="toy",
    )


def defined(**parameters):
    "The names that the record's cells define with these parameters, without its results."
    cells = nbformat.read(RECORD, 4).cells
    first = next(cell for cell in cells if "import functools" in cell.source)
    tagged = [c for c in cells if {"parameters", "experiment"} & set(c.metadata.get("tags", ()))]
    names = {}
    imports = first.source.replace("%matplotlib inline", "")
    for source in (imports, *(cell.source for cell in tagged)):
        exec(compile(source, str(RECORD), "exec"), names)
        names |= parameters  # as papermill does, after those of the notebook
    return names


@pytest.fixture(scope="module")
def experiment():
    return defined()


@pytest.fixture(scope="module")
def results(experiment, tmp_path_factory):
    "Every arm, two epochs on the light backbone, and what is kept of them."
    torch.set_num_threads(1)
    blocks = {
        split: toy_blocks(split, n, n) for split, n in (("train", 6), ("val", 2), ("test", 3))
    }
    plan = experiment["Plan"](
        "v5",
        patch=24,
        stage1_epochs=1,
        epochs=2,
        frozen_epochs=1,
        batch_size=32,
        probed=16,
        lr_head=0.01,
        lr_backbone=0.001,
    )
    folder = tmp_path_factory.mktemp("transfer")
    experiment["run_all"](lambda: blocks, plan, [1], folder)
    read = {path.stem: read_json(path) for path in (folder / "reports").glob("*.json")}
    arms = {one["arm"]: one for one in read.values()}
    assert set(arms) == set(experiment["ARMS"]) and len(read) == len(arms)
    written = {path: path.stat().st_mtime_ns for path in folder.rglob("*.json")}
    experiment["run_all"](lambda: blocks, plan, [1], folder)
    assert written == {path: path.stat().st_mtime_ns for path in folder.rglob("*.json")}
    return arms


def losses(result):
    "What the trainings show of themselves: loss of each epoch, and that of the validation."
    return [(row["train_loss"], row["val"]["val_loss"]) for row in result["rows"]]


def test_every_defect_changes_the_training_where_it_can(results):
    plain = losses(results["no defect"])
    frozen = {
        "training normalised twice",
        "training normalised twice, rate / 100",
        "all together",
        "statistics drift",
        "stage 2 normalised twice",
        "one-cycle by epoch",
        "all but the normalisation",
        "stage 1 normalised twice",
        "from scratch, open",
        "from scratch, frozen first",
    }
    opened = {"never opened", "optimiser loses the head", "a hundredth of the rate"}
    opened |= {"ten times the rate"}
    for arm in frozen:
        assert losses(results[arm])[0] != plain[0], arm
    for arm in opened:
        assert losses(results[arm])[0] == plain[0] and losses(results[arm])[1] != plain[1], arm
    stage2 = {arm for arm, result in results.items() if result["stage"] == "stage2"}
    assert stage2 == frozen | opened | {"no defect"}


def test_labels_that_do_not_turn_hurt_only_stages_that_they_can(experiment, results):
    right, wrong = (losses(results[f"RECT, {arm}"]) for arm in ("no defect", "labels do not turn"))
    assert right != wrong
    Faults, recipe = experiment["Faults"], experiment["recipe_of"]("stage2", experiment["Plan"]())
    for stage, same in (("stage2", True), ("RECT", False), ("AB", False)):
        tables = [
            experiment["augmentation"](recipe, stage, Faults(labels=fault)).augmentations[0].labels
            for fault in (False, True)
        ]
        assert torch.equal(*tables) == same, stage


def test_frozen_statistics_move_only_with_their_defect(results):
    assert results["never opened"]["similarity"]["blocks.2"]["cka"] == pytest.approx(1, abs=1e-6)
    opened = results["no defect"]["similarity"]["blocks.2"]["cka"]
    assert opened < 1 - 1e-7


def test_a_probe_leaves_the_training_as_it_was(experiment, results, tmp_path):
    "The arm whose gradients are looked at trains as one that nobody looks at."
    shared = results["optimiser loses the head"]
    assert shared["rows"][0]["train_loss"] == results["no defect"]["rows"][0]["train_loss"]
    assert "conflict" in results["no defect"]["rows"][1] and "conflict" not in shared["rows"][1]
    cosines = results["no defect"]["rows"][1]["conflict"]
    assert all(-1 <= value <= 1 for value in cosines.values())


def test_a_file_of_weights_is_one_more_start(tmp_path):
    """The path of an ImageNet start, with a file of that form: a ResNet-18 for colour
    pictures, its weights at random, for the real ones cannot ship.
    """
    torch.manual_seed(0)
    state = ResNet18().state_dict()  # under the names that torchvision gives
    torch.save(state, tmp_path / "resnet18.pth")
    names = defined(pretrained=str(tmp_path / "resnet18.pth"))
    small = dict(patch=12, stage1_each=10, stage1_epochs=1, epochs=2, frozen_epochs=1)
    plan = names["Plan"](judged_each=4, batch_size=16, **small)
    start = names["ARMS"]["from ImageNet"].start
    backbone = names["network"]("stage2", plan, 1, start).backbone
    assert torch.equal(backbone.layer4[1].conv2.weight, state["layer4.1.conv2.weight"])
    grey = state["conv1.weight"].mean(1, keepdim=True)
    torch.testing.assert_close(backbone.conv1.weight.detach(), grey)

    blocks = {split: toy_blocks(split, 2, n) for n, split in enumerate(("train", "val", "test"))}
    names["run_all"](lambda: blocks, plan, [1], tmp_path, ["from ImageNet"])
    result = read_json(tmp_path / "reports/v6_from_imagenet_1.json")
    assert result["start"] == "resnet18.pth" and len(result["rows"]) == 2
    assert result["rows"][0]["val"]["val_loss"] != result["rows"][1]["val"]["val_loss"]
    # the light backbone has no such weights, and does not fail over them
    light = names["arms_of"](names["PLANS"]["v5"])
    assert "from ImageNet" in names["arms_of"](plan) and "from ImageNet" not in light


def test_neighbours_lie_beside_what_is_trained_on(experiment):
    blocks = {split: toy_blocks(split, 4, 1) for split in ("train", "val", "test")}
    sets = experiment["draw_sets"](blocks, 1, experiment["Plan"](patch=24))["stage2"]
    (train, _), (beside, _) = sets["train"], sets["neighbours"]
    assert experiment["share_with_neighbour"](beside, train) > 0.7
    places = [
        set(part.table()[["recording", "row", "col"]].itertuples(index=False, name=None))
        for part in (train, beside)
    ]
    assert places[0] and places[1] and not places[0] & places[1]
    assert not set(sets["test"][0].table()["sequence"]) & set(train.table()["sequence"])


def test_stored_results_are_whole(experiment):
    content = read_json(RECORD.parents[2] / "av1nb/data/records/negative_transfer/results.json")
    found = {}
    for one in content["runs"]:
        found.setdefault((one["plan"]["architecture"], one["arm"]), []).append(one["seed"])
    assert all(sorted(seeds) == experiment["seeds"] for seeds in found.values())
    for architecture in experiment["architectures"]:
        for arm in ("no defect", "training normalised twice", "all together"):
            assert (architecture, arm) in found
    Faults, arms = experiment["Faults"], experiment["ARMS"].items()
    wrong = {arm for arm, how in arms if how.stage == "stage2" and how.faults != Faults()}
    assert wrong <= {arm for _, arm in found}
    assert content["joint"]["blocks"] == content["constant"]["blocks"] > 1000
