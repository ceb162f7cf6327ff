"""A training step asks the device for nothing: no operation of it makes a number or a shape that
the program must wait for.

On a GPU each of these would wait until the device has caught up. The dispatcher sees them on a CPU
just as well.
"""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from av1nb import augment, datasets, frames, heads, joint, losses, recipes, training
from av1nb.partitions import LARGE_LEVELS, LEVELS, V6, random_tree

# operations whose result is a number for the program, or a tensor whose shape depends on values
WAITS = {
    "_local_scalar_dense",
    "item",
    "is_nonzero",
    "equal",
    "nonzero",
    "masked_select",
    "bincount",
}
WAITS |= {"_unique2", "unique_dim", "unique_consecutive", "nonzero_numpy", "multinomial", "histc"}


class AsksNothing(TorchDispatchMode):
    "Refuses every operation for which a program must wait."

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        chosen = args[1] if name.startswith("index") and len(args) > 1 else ()
        by_mask = isinstance(chosen, (list, tuple)) and any(
            torch.is_tensor(i) and i.dtype in (torch.bool, torch.uint8) for i in chosen
        )
        if name in WAITS or by_mask:
            raise AssertionError(f"{name} makes the program wait for the device")
        return function(*args, **(kwargs or {}))


@pytest.fixture
def silent(monkeypatch):
    "Inside, no value of a tensor can be read."

    def refuse(self, *args, **kwargs):
        raise AssertionError("a value is read from the device")

    def enter():
        for name in ("tolist", "numpy", "cpu", "__array__"):
            monkeypatch.setattr(torch.Tensor, name, refuse)
        return AsksNothing()

    yield enter
    monkeypatch.undo()


def picture(name, costs):
    "A frame of noise with a random tree and, where asked for, costs."
    rng = np.random.default_rng(1)
    nodes = random_tree(128, 128, seed=len(name)).assign(frame=0, qindex=80, frame_type=0)
    luma = rng.integers(0, 1024, (1, 128, 128), dtype=np.uint16)
    known = {80: (nodes, rng.random((len(nodes), 10)))} if costs else {}
    return SimpleNamespace(name=name, luma=luma, nodes={80: nodes}, costs=known)


def joint_trainer(objective, costs, **settings):
    training.set_seed(1)
    crops = frames.FrameSet([picture("one", costs), picture("second", costs)], 64)
    model = heads.JointModel(widths=(16, 16, 16, 16), depths=(0, 1, 1, 1))
    config = training.TrainConfig(batch_size=2, device="cpu", average=0.9, **settings)
    batches = frames.CropBatches(crops, 2), frames.TileBatches(crops, 2)
    return training.Trainer(model, *batches, objective, None, config, lambda backbone: [backbone])


def stage_trainer(criterion):
    training.set_seed(1)
    labels = torch.arange(24) % 4
    samples = torch.from_numpy(
        np.random.default_rng(1).integers(0, 1024, (24, 1, 16, 16), np.uint16)
    )
    everything = augment.Compose(
        augment.Symmetry(V6, "AB", p=0.5),
        augment.GaussianNoise(p=0.5),
        augment.Cutout(p=0.5),
        augment.CoarseDropout(p=0.5),
        augment.CutMix(p=0.5),
    )
    batches = datasets.Batches(samples, labels, 8, shuffle=True, augment=everything)
    model = heads.build_model("v6", "AB", "v5", "fine_grained", projection=8)
    objective = losses.Objective(criterion, losses.CenterLoss(4, 8), 0.1)
    config = training.TrainConfig(batch_size=8, device="cpu")
    return training.Trainer(model, batches, batches, objective, None, config)


def steps_of(trainer, silent):
    "Batches and steps of an epoch, during which nothing can be read; losses and norms."
    training._begin_epoch(trainer, 1)
    batches, found = iter(trainer.train), []
    # what an epoch begins with is drawn once, on the CPU
    found += trainer.step(list(next(batches)))
    with silent():
        for batch in batches:
            found += trainer.step(list(batch))
    return found


@pytest.mark.parametrize("amp", [False, True])
@pytest.mark.parametrize("costs", [False, True])
def test_a_step_of_the_joint_network(silent, costs, amp):
    objective = losses.RegretLikelihood(smoothing=0.1) if costs else losses.TreeLikelihood()
    found = steps_of(joint_trainer(objective, costs, amp=amp), silent)
    assert len(found) > 4 and torch.stack(found).isfinite().all()


@pytest.mark.parametrize(
    "criterion",
    [
        losses.CrossEntropy([1, 2, 1, 1], 0.1),
        losses.ClassBalancedFocal([5, 6, 7, 8]),
        losses.HardExampleMining(losses.MultiClassFocal(2), 0.5),
    ],
    ids=lambda criterion: type(criterion).__name__,
)
def test_a_step_of_a_stage(silent, criterion):
    found = steps_of(stage_trainer(criterion), silent)
    assert len(found) == 6 and torch.stack(found).isfinite().all()


@pytest.mark.parametrize("stage", V6.stage_names)
def test_a_step_of_a_recipe_of_v6(silent, stage):
    "Sampler, symmetries, noise, mixing, loss and centres as the recipes of the stages have them."
    training.set_seed(1)
    recipe = recipes.recipe_for("v6", stage, batch_size=8)
    model = heads.build_model("v6", stage, recipe.architecture, recipe.head)
    labels = torch.arange(24) % len(model.class_names)
    samples = torch.from_numpy(
        np.random.default_rng(1).integers(0, 1024, (24, 1, 16, 16), np.uint16)
    )
    sampler = datasets.BalancedSampler(labels) if recipe.balanced else None
    batches = datasets.Batches(
        samples,
        labels,
        8,
        sampler,
        shuffle=sampler is None,
        augment=recipes.make_augmentation(recipe, "v6", stage),
    )
    objective = recipes.make_objective(recipe, torch.bincount(labels), model)
    config = recipes.train_config(recipe, "cpu")
    found = steps_of(training.Trainer(model, batches, batches, objective, None, config), silent)
    assert len(found) == 6 and torch.stack(found).isfinite().all()


class Chooses(losses.TreeLikelihood):
    "Chooses nodes by a mask, as one would write it."

    def loss(self, logits, target, height, width):
        return -logits[target >= 0].log_softmax(1)[:, 0].mean()


class Looks(losses.TreeLikelihood):
    "Looks at its loss."

    def loss(self, *inputs):
        loss = super().loss(*inputs)
        assert loss < 1e6
        return loss


@pytest.mark.parametrize(
    "objective, said", [(Chooses(), "index"), (Looks(), "_local_scalar_dense")]
)
def test_who_asks_is_found(silent, objective, said):
    with pytest.raises(AssertionError, match=said):
        steps_of(joint_trainer(objective, False), silent)


def test_labels_are_looked_at_before_the_first_step():
    "What no step looks at any more is refused when the training is set up."
    labels = torch.arange(24) % 4
    samples = torch.zeros(24, 1, 16, 16, dtype=torch.uint16)
    batches = datasets.Batches(samples, labels, 8)
    model = heads.build_model("v6", "RECT", "v5")
    config = training.TrainConfig(batch_size=8, device="cpu")
    with pytest.raises(ValueError, match="label 3, but the model has the 2 classes HORZ, VERT"):
        training.Trainer(
            model, batches, batches, losses.Objective(losses.CrossEntropy()), None, config
        )
    with pytest.raises(ValueError, match="label from -1 to 1"):
        datasets.Batches(samples, labels, 8, augment=augment.Symmetry(V6, "RECT"))


@pytest.mark.parametrize("read_every", [1, 2, 100])
def test_when_the_numbers_are_read_changes_nothing(read_every):
    "Losses, weights and average after an epoch are the same bit for bit."
    found = []
    for every in (1, read_every):
        trainer = joint_trainer(losses.TreeLikelihood(), False, read_every=every)
        row = trainer.train_epoch(1, training.NoBar())
        found.append((row["train_loss"], [*trainer.model.parameters(), *trainer.kept.buffers()]))
    assert found[0][0] == found[1][0]
    assert all(torch.equal(a, b) for a, b in zip(found[0][1], found[1][1]))


class Poisoned:
    "Batches of which one is not a number."

    def __init__(self, batches, number):
        self.batches, self.number, self.batch_size = batches, number, batches.batch_size

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        for number, (x, *rest) in enumerate(self.batches, 1):
            yield (x * float("nan") if number == self.number else x, *rest)

    def set_epoch(self, epoch):
        self.batches.set_epoch(epoch)


@pytest.mark.parametrize("read_every", [1, 3, 100])
def test_a_bad_batch_is_named_at_the_next_reading(read_every):
    "Nothing of it or of what came after is in the weights: they are those of the last good step."
    trainer = joint_trainer(losses.TreeLikelihood(), False, read_every=read_every)
    assert len(trainer.train) == 4
    trainer.train = Poisoned(trainer.train, 3)
    with pytest.raises(training.TrainingError, match="loss is not finite in epoch 1, batch 3"):
        trainer.train_epoch(1, training.NoBar())
    good = joint_trainer(losses.TreeLikelihood(), False)
    training._begin_epoch(good, 1)
    for number, batch in enumerate(good.train, 1):
        if number < 3:
            good.step(list(batch))
    pairs = zip(trainer.model.parameters(), good.model.parameters())
    assert all(torch.equal(one, other) for one, other in pairs)


def test_a_training_goes_on_from_the_last_good_epoch(tmp_path):
    "Stopped by a bad batch in its second epoch, it ends as if that batch had never been bad."
    found = []
    for number in (None, 2):
        trainer = joint_trainer(losses.TreeLikelihood(), False)
        config = joint.joint_config("cpu", epochs=2, batch_size=2, amp=False, read_every=100)
        parts = (trainer.val, losses.TreeLikelihood(), lambda *_: {"nll": 1.0}, config)
        settings = dict(provenance={"split_hash": "none"}, progress=False)
        settings["layer_groups"] = lambda backbone: [backbone]
        out = tmp_path / str(number)

        class Second(Poisoned):
            def set_epoch(self, epoch):
                self.number = number if epoch == 2 else None
                self.batches.set_epoch(epoch)

        if number:
            with pytest.raises(training.TrainingError, match="epoch 2, batch 2"):
                training.fit(trainer.model, Second(trainer.train, None), *parts, out, **settings)
            trainer = joint_trainer(losses.TreeLikelihood(), False)
        history = training.fit(trainer.model, trainer.train, *parts, out, **settings)
        found.append((history.frame(times=False), trainer.model.state_dict()))
    (rows, weights), (again, same) = found
    assert rows.equals(again) and all(torch.equal(weights[name], same[name]) for name in weights)


@pytest.mark.parametrize("stage", ["run", "material"])
def test_frames_lie_where_the_training_is(stage, monkeypatch, tmp_path):
    class Made(Exception):
        pass

    def made(pictures, side, device, **settings):
        raise Made(device)

    place = torch.device("meta")
    monkeypatch.setattr(joint, "pick_device", lambda name: place)
    monkeypatch.setattr(joint, "FrameSet", made)
    monkeypatch.setattr(
        joint, "read_run", lambda *_: ({"test": None}, dict.fromkeys(("train", "val")))
    )
    from av1nb import material

    nothing = pd.DataFrame(columns=["group", "split", "material", "name"])
    monkeypatch.setattr(material, "load_material", lambda *_: [])
    monkeypatch.setattr(material, "material_table", lambda _: nothing)
    with pytest.raises(Made) as where:
        if stage == "run":
            joint.train_run(tmp_path)
        else:
            joint.train_material(tmp_path, tmp_path)
    assert where.value.args == (place,)


@pytest.mark.parametrize("levels", [LEVELS, LARGE_LEVELS])
def test_memory_of_an_evaluation_is_known_without_a_device(levels):
    side = levels[0]
    model = heads.JointModel(superblock=side, conditions=side == 128)
    told = torch.zeros(2, 5) if side == 128 else torch.zeros(2, dtype=torch.int64)
    each = training.bytes_of_sample(model, torch.zeros(2, 1, 2 * side, 2 * side), told)
    # at least the planes of the first layers, at most what a GPU has plenty of
    assert 4 * 24 * (side // 2) ** 2 < each < 200 * 2**20
