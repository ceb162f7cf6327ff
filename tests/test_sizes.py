"""Cascades at 8, 32 and 64 pixels: the same stages, with the classes that a size has."""

import numpy as np
import pandas as pd
import pytest
import torch

from av1nb import cli, datasets, encoding, joint, pictures, runs, sample
from av1nb.files import read_json, save_json
from av1nb.heads import CheckpointError, build_model
from av1nb.partitions import V5, V6, PartitionType, legal_types
from av1nb.pipeline import Pipeline, load_pipeline

ONCE = {"epochs": 1, "batch_size": 64, "frozen_epochs": 0, "excel": False}
SMALL = ["ascent", "brick", "camera", "coffee", "coins", "rocket", "temple", "text"]
# few pictures of the sample have AB blocks of 64×64
PLACED = {"retina": "train", "raccoon": "val", "hurricane": "test"}
# the network of v6 takes a second for thirty blocks of 64×64
HIERARCHY = {8: V6, 32: V6, 64: V5}


@pytest.fixture(scope="module", params=HIERARCHY)
def trained(request, tmp_path_factory):
    "Size, and a run of all stages at it; at 8×8 as a comparison makes it."
    size, run = request.param, runs.RunDirectory(tmp_path_factory.mktemp("size"))
    settings = ONCE | {"size": size, "fractions": [0.5, 0.25, 0.25]}
    if size == 8:
        settings |= {"pictures": SMALL, "batch_size": 512}
        runs.compare(run, ("v6",), (1,), 1, parameters=settings, quiet=True)
        return size, runs.RunDirectory(run / "v6/seed_1")
    save_json({"assignment": PLACED}, run / "keep.json")
    settings |= {"pictures": list(PLACED), "keep": str(run / "keep.json"), "seed": 1}
    settings |= {"hierarchy": HIERARCHY[size].name}
    runs.run_notebooks(runs.PIPELINE, run, settings, quiet=True)
    return size, run


def test_the_stages_are_those_that_have_something_to_decide(trained):
    size, run = trained
    models = {path.name for path in (run / "models").glob("*_model_best.pt")}
    last = {
        8: (),
        32: ("stage3_AB_1", "stage3_AB_2", "stage3_AB_3"),
        64: ("stage3_AB", "stage3_1TO4"),
    }
    names = ("stage1", "stage2", "stage3_RECT", *last[size])
    assert models == {f"{name}_model_best.pt" for name in names}
    tree = HIERARCHY[size].at(size)
    report = read_json(run / "reports/pipeline.json")["report"]
    assert set(report["stages"]) == set(tree.stage_names)
    assert list(report["stages"]["stage2"]["true"]["per_class"]) == list(tree.class_names("stage2"))
    # what cannot occur is not asked, and no block is without a class
    assert (report["comparable"]["AB"] is None) == (size == 8)
    assert list(report["uncovered"]) == (["HORZ_4", "VERT_4"] if size == 32 else [])


def test_blocks_and_answers_are_of_the_size(trained):
    size, run = trained
    test = datasets.read_block_sets(run / "dataset", size)["test"]
    assert test.samples.shape[2:] == (size, size)
    table = pd.read_csv(run / "reports/predictions.csv", keep_default_na=False)
    assert len(table) == len(test) and not (table[["row", "col"]] % size).any().any()
    legal = {ptype.name for ptype in legal_types(size)}
    assert set(table.true) <= legal and set(table.predicted) <= legal


def test_a_checkpoint_says_its_size_and_another_is_refused(trained):
    size, run = trained
    stored = torch.load(run / "models/stage2_model_best.pt", weights_only=True)
    assert stored["provenance"]["size"] == size
    tree, other = HIERARCHY[size], 16 if size != 8 else 32
    assert stored["class_names"] == list(tree.at(size).class_names("stage2"))
    with pytest.raises(CheckpointError, match=f"{size}×{size}, but these are {other}×{other}"):
        Pipeline.from_run(run / "models", tree, size=other, fallback={})


def test_a_film_is_predicted_and_compared_at_the_size(trained, tmp_path):
    size, run = trained
    luma = np.ascontiguousarray(sample.load_sample(["camera"])[0].luma[0, :128, :192])
    chroma = np.full((64, 96), 512, np.uint16)
    pictures.write_y4m(tmp_path / "new.y4m", [(luma, chroma, chroma)])
    encoding.encode([(luma, chroma, chroma)], tmp_path / "new.ivf", cq_level=43, cpu_used=4)
    cli.predict(tmp_path / "new.y4m", 172, tmp_path / "p.csv", run.path)
    table = pd.read_csv(tmp_path / "p.csv", keep_default_na=False)
    assert len(table) == (128 // size) * (192 // size)
    assert set(table.predicted) <= {ptype.name for ptype in PartitionType}
    cascade = load_pipeline(run)
    assert (cascade.size, cascade.hierarchy) == (size, HIERARCHY[size].at(size))
    frames = joint.intra_frames(tmp_path / "new.ivf", tmp_path / "new.y4m")
    report = joint.tree_report(frames, cascade)
    assert report["nodes"] and {row["size"] for row in report["levels"]} == {size}


def test_a_stage_of_another_size_is_no_beginning(trained, tmp_path):
    "Stage 2 starts from the backbone of stage 1, and not from one that saw other blocks."
    from av1nb import recipes

    size, run = trained
    tree, start = HIERARCHY[size], run / "models/stage1_model_best.pt"
    receipt = read_json(run / "notebooks/003_train_stage1.json")["parameters"]
    told = {name: receipt.get(name) for name in ("qindex", "centre")}
    recipe = recipes.recipe_for(tree, "stage2", **told)
    assert recipes.starting_network(tree.at(size), "stage2", recipe, None, start, size=size)
    with pytest.raises(CheckpointError, match=f"{size}×{size}, but these are 16×16"):
        recipes.starting_network(tree, "stage2", recipe, None, start, size=16)


@pytest.mark.parametrize("size", [8, 32, 64])
def test_the_network_of_v6_takes_blocks_of_the_size(size):
    "Features of one length at every size, and a gradient for every weight."
    torch.manual_seed(0)
    network = build_model(V6.at(size), "RECT")
    blocks, labels = torch.rand(8, 1, size, size), torch.arange(8) % 2
    features = network.features(blocks)
    assert features.shape == (8, 512)
    torch.nn.functional.cross_entropy(network.head(features), labels).backward()
    for name, weight in network.named_parameters():
        assert torch.isfinite(weight.grad).all() and weight.grad.any(), name


def test_where_only_none_is_left_training_is_refused():
    "From 2160 lines libaom codes 8×8 nodes as NONE alone."
    from av1nb import recipes
    from av1nb.partitions import encoder_limits

    limits = encoder_limits(3840, 2160, cpu_used=1)
    assert limits[8] == (PartitionType.NONE,)
    with pytest.raises(ValueError, match="stage1 has no training block of PARTITION"):
        recipes.require_every_class("stage1", V6.at(8).class_names("stage1"), torch.tensor([9, 0]))
