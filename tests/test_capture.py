"A compiled step does what a plain one does, in the joint network and in stage 1 of v6."

import shutil
import subprocess
import sysconfig
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from av1nb import datasets, frames, heads, losses, recipes, training
from av1nb.partitions import V6, random_tree


def can_compile():
    "Whether there is a compiler of C++ that finds the headers of Python, as torch.compile needs."
    compiler = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    if compiler is None:
        return False
    words = [compiler, "-x", "c++", "-fsyntax-only", "-I", sysconfig.get_path("include"), "-"]
    return subprocess.run(words, input=b"#include <Python.h>", capture_output=True).returncode == 0


pytestmark = pytest.mark.skipif(
    not can_compile(), reason="torch.compile needs a C++ compiler (g++) and the headers of Python"
)


def joint_trainer(capture, amp=False):
    training.set_seed(1)
    rng = np.random.default_rng(1)
    pictures = [
        SimpleNamespace(
            name=name,
            luma=rng.integers(0, 1024, (1, 128, 128), dtype=np.uint16),
            nodes={80: random_tree(128, 128, seed=number).assign(frame=0, qindex=80)},
        )
        for number, name in enumerate(("one", "two"))
    ]
    crops = frames.FrameSet(pictures, 64)
    model = heads.JointModel(widths=(16, 16, 16, 16), depths=(0, 1, 1, 1), dropout=0.0)
    config = training.TrainConfig(
        batch_size=4, device="cpu", capture=capture, amp=amp, lr_head=1e-3
    )
    batches = frames.CropBatches(crops, 4), frames.TileBatches(crops, 4)
    parts = losses.TreeLikelihood(), None, config, lambda backbone: [backbone]
    return training.Trainer(model, *batches, *parts)


def stage_trainer(capture):
    training.set_seed(1)
    rng = np.random.default_rng(1)
    labels = torch.arange(32) % 2
    samples = torch.from_numpy(rng.integers(0, 1024, (32, 1, 16, 16), dtype=np.uint16))
    recipe = recipes.recipe_for("v6", "stage1")
    model = heads.build_model("v6", "stage1")
    for module in model.modules():
        if isinstance(module, (torch.nn.Dropout, torch.nn.Dropout2d)):
            module.p = 0.0  # a compiled dropout draws other numbers
    augment = recipes.make_augmentation(recipe, V6, "stage1")
    batches = datasets.Batches(samples, labels, 16, shuffle=True, augment=augment)
    objective = recipes.make_objective(recipe, torch.bincount(labels), model, V6)
    config = training.TrainConfig(batch_size=16, device="cpu", capture=capture)
    return training.Trainer(model, batches, batches, objective, None, config)


def trained(trainer):
    "Loss of an epoch, and how it moved the weights."
    before = [p.detach().clone() for p in trainer.model.parameters()]
    row = trainer.train_epoch(1, training.NoBar())
    after = [p.detach() for p in trainer.model.parameters()]
    return row["train_loss"], torch.cat([(b - a).flatten() for a, b in zip(before, after)])


@pytest.mark.parametrize("make", [joint_trainer, stage_trainer])
def test_a_compiled_step_is_the_plain_one_within_rounding(make):
    found = {}
    for capture in ("off", "compile"):
        trainer = make(capture)
        assert (trainer.running is trainer.model) == (capture == "off")
        found[capture] = trained(trainer)
    (plain_loss, plain), (loss, compiled) = found["off"], found["compile"]
    assert loss == pytest.approx(plain_loss, rel=1e-4)
    assert plain.norm() > 0
    # AdamW divides by the size of a gradient: where it is almost nothing, rounding moves the step
    assert (compiled - plain).norm() < 0.02 * plain.norm()


@pytest.mark.skipif(
    not training.has_bf16(torch.device("cpu")), reason="this processor does not multiply bfloat16"
)
def test_in_bfloat16_it_is_as_near_to_float32_as_the_plain_one():
    _, exact = trained(joint_trainer("off"))
    plain_loss, plain = trained(joint_trainer("off", amp=True))
    loss, compiled = trained(joint_trainer("compile", amp=True))
    assert loss == pytest.approx(plain_loss, rel=2**-8)  # the step of bfloat16
    assert 0 < (compiled - exact).norm() < 1.5 * (plain - exact).norm()
