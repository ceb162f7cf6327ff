"""Each remedy changes the training of a stage in the way that it claims."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from av1nb import recipes
from av1nb.datasets import BlockSet, stage_subset
from av1nb.files import read_json, repository
from av1nb.heads import build_model, find_hierarchy, read_checkpoint, load_backbone
from av1nb.losses import Strays, Taught, TwoTasks, project_conflicts
from av1nb.partitions import V6, V6_REJECT, PartitionType, children
from av1nb.pages import read_references
from av1nb.pipeline import load_stages
from conftest import av1nb

SHORT = dict(epochs=1, batch_size=32, patience=0)


def drawn_set(split, count, seed):
    "Blocks of all types, each part in a grey of its own."
    rng = np.random.default_rng(seed)
    types, samples = rng.permutation(np.arange(count) % 10), np.empty((count, 1, 16, 16))
    for block, ptype in zip(samples[:, 0], types):
        greys = rng.permutation(np.linspace(200, 800, 4))
        for (row, col, height, width), grey in zip(children(PartitionType(ptype), 16), greys):
            block[row : row + height, col : col + width] = grey
    zeros = torch.zeros(count, dtype=torch.int64)
    where = torch.arange(count) % 2
    return BlockSet(
        torch.from_numpy(samples.astype(np.uint16)),
        torch.from_numpy(types),
        zeros + 80,
        *(where, where, zeros, zeros, zeros),
        *(((f"{split} a", f"{split} b"),) * 2),
        split,
        assignment={f"{s} {n}": s for s in ("train", "val", "test") for n in "ab"},
    )


SETS = {name: drawn_set(name, n, i) for i, (name, n) in enumerate(dict(train=160, val=60).items())}


def trained(stage, folder, remedy=None, tree=V6, start=None, **given):
    recipe = recipes.recipe_for(tree, stage, **SHORT)
    recipe = replace(recipes.with_remedy(recipe, stage, remedy), members=1)
    settings = dict(start=start, device="cpu", progress=False, sets=SETS) | given
    data = recipes.stage_data(None, tree, stage, sets=SETS)
    return recipes.train_stage(data, tree, stage, recipe, folder, **settings)[0]


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    "The file of a stage 1."
    folder = tmp_path_factory.mktemp("first")
    trained("stage1", folder)
    return folder / "stage1_model_best.pt"


def backbone_in(path):
    state = read_checkpoint(path)["model_state_dict"]
    return {name: value for name, value in state.items() if name.startswith("backbone.")}


@pytest.mark.parametrize("remedy", ["residual_adapters", "convolutional_adapters"])
def test_adapters_learn_and_the_backbone_stays(first, tmp_path, remedy):
    fresh = build_model(V6, "stage2", adapter=recipes.REMEDIES[remedy].changes["stage2"]["adapter"])
    plain = build_model(V6, "stage2").eval()
    for model in (fresh.eval(), plain):
        load_backbone(model, first)
    x = torch.rand(5, 1, 16, 16)
    assert torch.equal(fresh.features(x), plain.features(x))
    trained("stage2", tmp_path, remedy, start=first)
    before, after = backbone_in(first), backbone_in(tmp_path / "stage2_model_final.pt")
    grown = {name for name in after if name.startswith("backbone.adapters.")}
    assert set(after) - grown == set(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert any(after[name].any() for name in grown)


def beside(stage, first, **changes):
    recipe = replace(recipes.recipe_for(V6, stage, **SHORT), **changes)
    model = build_model(V6, stage)
    if first:
        load_backbone(model, first)
    alone = recipes.make_objective(recipe, [9] * len(model.class_names), model)
    return model, alone, recipes.beside(alone, recipe, model, V6, SETS, first, 42, "cpu")


def test_a_pull_keeps_the_backbone_near_its_start(first, tmp_path):
    trained("stage2", tmp_path / "free", "fine_tuning", start=first)
    for remedy in ("pull_to_start", "elastic_weights"):
        change = recipes.REMEDIES[remedy].changes["stage2"] | dict(pull_weight=1000.0)
        model, _, objective = beside("stage2", first, **change)
        recipe = replace(recipes.recipe_for(V6, "stage2", **SHORT), **change)
        data = recipes.stage_data(None, V6, "stage2", sets=SETS)
        folder = tmp_path / remedy
        settings = dict(start=first, device="cpu", progress=False, sets=SETS)
        recipes.train_stage(data, V6, "stage2", recipe, folder, **settings)
        assert objective.pull(model.backbone) == 0
        gone = []
        for name in (remedy, "free"):
            content = read_checkpoint(tmp_path / name / "stage2_model_final.pt")
            model.load_state_dict(content["model_state_dict"])
            gone.append(objective.pull(model.backbone).item())
        assert 0 < gone[0] < 0.7 * gone[1], remedy


def test_a_second_task_is_that_of_the_stage_before(first):
    for weighting in ("uncertainty", "surgery"):
        _, _, both = beside("stage2", first, together=weighting)
        assert isinstance(both, TwoTasks) and both.weighting == weighting
        x, labels = both.draw()
        assert set(labels.tolist()) == {0, 1} and both.head(torch.rand(2, 512)).shape == (2,)


def test_surgery_leaves_no_step_against_either_task(first):
    model, alone, both = beside("stage2", first, together="surgery")
    blocks, labels = stage_subset(SETS["train"], V6, "stage2")
    x = blocks.samples[:32].float() / 1023
    model.eval()  # without dropout: the same features each time
    parameters = list(model.backbone.parameters())

    def gradient(loss):
        found = torch.autograd.grad(loss, parameters, materialize_grads=True, allow_unused=True)
        return torch.cat([one.flatten() for one in found])

    own = gradient(alone(model, x, labels[:32])[0])
    others, theirs = both.draw()
    other = gradient(both.criterion(both.head(model.features(others)), theirs))
    both.drawn = 0
    both.train().head.eval()
    operated = gradient(both(model, x, labels[:32])[0])
    expected = sum(project_conflicts(own, other))
    assert torch.allclose(operated, expected, atol=1e-4 * expected.abs().max())
    assert operated @ own >= -1e-4 and operated @ other >= -1e-4


def test_a_rejecting_stage_learns_from_what_arrives(first, tmp_path):
    data = recipes.stage_data(None, V6_REJECT, "stage2", sets=SETS)
    assert data["train"][1].bincount().tolist() == [16, 32, 64, 16]  # NONE comes last
    content = read_checkpoint(first)
    other, bias = tmp_path / "stage1_model_best.pt", "head.head.3.bias"
    for sent in (10.0, -10.0):
        state = content["model_state_dict"] | {bias: torch.tensor([sent])}
        torch.save(content | {"hierarchy": "v6_reject", "model_state_dict": state}, other)
        if sent > 0:
            said = torch.rand(128, 4)
            kept, taught = recipes.arriving_blocks(
                data, V6_REJECT, "stage2", other, taught=said, device="cpu"
            )
            assert len(kept["train"][0]) == len(taught) == 128
        else:
            with pytest.raises(ValueError, match="sends none of the train blocks"):
                recipes.arriving_blocks(data, V6_REJECT, "stage2", other, device="cpu")
    decided = {"stage1": np.array([1, 1]), "stage2": np.array([3, 0])}
    assert V6_REJECT.final(decided | {"RECT": [0, 0], "AB": [0, 0]}).tolist() == [0, 3]


def test_strays_are_blocks_of_other_groups(first):
    _, _, both = beside("RECT", None, strays=0.5)
    assert isinstance(both, Strays)
    assert not set(both.batches.blocks.types.tolist()) & {int(t) for t in (1, 2)}
    with pytest.raises(ValueError, match="looks at other blocks"):
        recipes.beside(both.objective, replace(recipes.Recipe(), strays=1.0), build_model(V6, "AB"), V6)


def test_a_teacher_is_heard(first, tmp_path):
    model, alone, both = beside("stage2", first, taught=1.0)
    assert isinstance(both, Taught)
    blocks, labels = stage_subset(SETS["train"], V6, "stage2")
    recipe = recipes.recipe_for(V6, "stage2", **SHORT, taught=1.0)
    with pytest.raises(ValueError, match="are missing"):
        recipes.training_batches(blocks, labels, V6, "stage2", recipe, device="cpu")
    split, halves = stage_subset(SETS["train"], V6, "RECT")
    with pytest.raises(ValueError, match="do not follow rot90"):
        said = torch.full((len(halves), 2), 0.5)
        recipes.training_batches(split, halves, V6, "RECT", recipe, device="cpu", taught=said)


def test_votes_are_learned_and_read_again(first, tmp_path):
    data = recipes.stage_data(None, V6, "stage2", sets=SETS)
    recipe = recipes.recipe_for(V6, "stage2", architecture="v5", members=2, **SHORT)
    ensemble, _ = recipes.train_members(
        data, V6, "stage2", recipe, tmp_path, vote="stacked", device="cpu", progress=False
    )
    assert ensemble.vote == "stacked" and (tmp_path / "stage2_stack.json").is_file()
    read = load_stages(tmp_path, V6, vote="stacked")["models"]["stage2"]
    blocks = data["val"][0]
    again, now = (recipes.run_over(e, blocks, e) for e in (read, ensemble))
    assert torch.equal(again[0], now[0])
    with pytest.raises(FileNotFoundError, match="fitted where the members are trained"):
        (tmp_path / "stage2_stack.json").unlink()
        load_stages(tmp_path, V6, vote="stacked")


def test_every_remedy_names_a_work_and_changes_something():
    works = read_references(repository() / "nbs/references.bib")
    for name, one in recipes.REMEDIES.items():
        assert one.source in works, name
        tree = find_hierarchy(one.hierarchy or "v6")
        assert all(
            recipes.with_remedy(recipes.recipe_for(tree, stage), stage, name)
            != recipes.recipe_for(tree, stage)
            for stage in one.changes
        ), name


def test_compare_takes_remedies_by_name(tmp_path):
    "Rows of the table beside v6, on the same blocks, each trained as its recipe says."
    said = av1nb(
        *("compare", "--run-dir", tmp_path, "--remedy", "residual_adapters"),
        *("-p", "size=8", "-p", "epochs=1", "-p", "batch_size=512"),
        *("-p", "pictures=[coins,text,rocket]", "-p", "fractions=[0.34,0.33,0.33]"),
    ).stdout
    models = ["v6", "v6:residual_adapters"]
    rows = read_json(tmp_path / "comparison.json")["rows"]
    assert [row["model"] for row in rows] == models and all(name in said for name in models)
    assert len({row["split"] for row in rows}) == len({row["blocks"] for row in rows}) == 1
    adapters = []
    for name in models:
        own = tmp_path / f"{name.replace(':', '-')}/seed_42/models/stage2_model_best.pt"
        adapters.append(read_checkpoint(own)["provenance"]["recipe"]["adapter"])
    assert adapters == [None, "residual"]
    done = av1nb("compare", "--run-dir", tmp_path, "--remedy", "hope", check=False)
    assert done.returncode == 1 and "there is no model 'v6:hope'" in done.stderr
