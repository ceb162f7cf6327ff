"""Training on two processes is training on one: by accelerate's notebook_launcher, by `accelerate
launch`, and as `av1nb train-joint` under it.

Run as a program, this file is what the processes run: `test_distributed.py FOLDER [processes that
notebook_launcher shall start]`.
"""

import dataclasses
import math
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from typer.testing import CliRunner

from av1nb import augment, cli, datasets, frames, heads, joint, losses, metrics, runs, training
from av1nb.sample import load_sample, write_sample_raw

BIN = Path(sys.executable).parent
PARTS = ("model_best.pt", "model_final.pt", "history.pt", "metrics.json", "state.pt")


def corner(picture, side=128):
    "The upper left corner of a picture, at one quantiser."
    qindex, nodes = sorted(picture.nodes.items())[1]
    nodes = nodes[(nodes["row"] < side) & (nodes["col"] < side)].reset_index(drop=True)
    return dataclasses.replace(picture, luma=picture.luma[:, :side, :side], nodes={qindex: nodes})


class Killed(Exception):
    pass


class Dies(losses.TreeLikelihood):
    "Ends after so many steps."

    def __init__(self, steps):
        super().__init__()
        self.left = steps

    def forward(self, *args):
        self.left -= self.training
        if self.left < 0:
            raise Killed
        return super().forward(*args)


def train_both(folder):
    """Two trainings without dropout: the joint network on crops that each process takes for itself,
    and one of a cascade on batches that the trainer divides.
    """
    pictures = [corner(p) for p in load_sample(["coffee", "text"])]
    config = joint.joint_config("cpu", epochs=2, batch_size=2, amp=False, average=0.5)
    crops = [frames.FrameSet(pictures, 64), frames.FrameSet(pictures[:1], 64)]
    # several processes are interrupted once
    for objective in (
        (Dies(len(frames.CropBatches(crops[0], 2)) + 1), None)
        if training.process()[1] > 1
        else (None,)
    ):
        try:
            joint.train_joint(
                *crops,
                folder,
                {"split_hash": "x"},
                config,
                objective=objective,
                widths=(16, 16, 16, 16),
                depths=(1, 1, 1, 1),
                dropout=0,
                progress=False,
            )
        except Killed:
            continue

    random = torch.Generator().manual_seed(0)
    x, y = (
        torch.randint(1024, (27, 1, 16, 16), generator=random).to(torch.uint16),
        torch.arange(27) % 4,
    )
    # the last batch has 3 blocks: shares of 1 and 2
    train = datasets.Batches(x, y, 8, shuffle=True, augment=augment.MixUp(0.4))
    training.set_seed(1)
    model = heads.build_model("v6", "AB", "v5", "fine_grained", dropout=0, projection=8)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    # both look at the whole batch
    objective = losses.Objective(
        losses.HardExampleMining(losses.CrossEntropy(), 0.5), losses.CenterLoss(4, 8), 0.1
    )
    config = training.TrainConfig(epochs=2, batch_size=8, device="cpu", frozen_epochs=1)
    training.fit(
        model,
        train,
        datasets.Batches(x, y, 32),
        objective,
        metrics.Score(model.class_names),
        config,
        folder,
        "mixed",
        {"split_hash": "x"},
        progress=False,
    )
    rank, _ = training.process()
    torch.save(model.state_dict(), Path(folder) / f"of_process_{rank}.pt")
    training.leave()


def start(*arguments):
    "Run a program as a user does, on CPUs."
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        list(map(str, arguments)), env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done


def launch(*arguments):
    "The same on two processes."
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return start(
        BIN / "accelerate",
        "launch",
        "--multi_gpu",
        "--num_processes",
        2,
        "--num_machines",
        1,
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
        "--main_process_port",
        port,
        *arguments,
    )


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    train_both(folder)
    return folder


@pytest.mark.parametrize("launcher", ["notebook_launcher", "accelerate launch"])
def test_two_processes_are_one(one, tmp_path, launcher):
    if launcher == "accelerate launch":
        launch(__file__, tmp_path)
    else:
        start(sys.executable, __file__, tmp_path, 2)
    assert {p.name for p in tmp_path.iterdir()} == {
        f"{name}_{part}" for name in ("joint", "mixed") for part in PARTS
    } | {"of_process_0.pt", "of_process_1.pt"}
    for name in ("joint", "mixed"):
        alone, together = (
            training.History.load(folder / f"{name}_history.pt").frame(times=False)
            for folder in (one, tmp_path)
        )
        assert list(alone.columns) == list(together.columns) and len(alone) == len(together) == 2
        for column in alone:
            for a, b in zip(alone[column], together[column]):
                assert math.isclose(
                    a, b, rel_tol=1e-4, abs_tol=1e-6
                ), f"{name} {column}: {a} alone, {b} together"
        assert runs.read_json(tmp_path / f"{name}_metrics.json")[
            "processes"
        ] == 2 and "processes" not in runs.read_json(one / f"{name}_metrics.json")
        for part in ("model_best.pt", "model_final.pt"):
            alone, together = (
                heads.read_checkpoint(folder / f"{name}_{part}")["model_state_dict"]
                for folder in (one, tmp_path)
            )
            assert alone.keys() == together.keys()
            # the next batch norm takes the bias of a first norm away: its gradient is rounding
            # alone, and AdamW enlarges it
            for key in alone:
                if not key.endswith("first.norm.bias"):
                    torch.testing.assert_close(
                        together[key],
                        alone[key],
                        rtol=1e-3,
                        atol=1e-3,
                        msg=lambda text: f"{name} {key}: {text}",
                    )
    states = [torch.load(tmp_path / f"of_process_{rank}.pt", weights_only=True) for rank in (0, 1)]
    # every process leaves with the best weights
    for a, b in zip(*(state.values() for state in states)):
        assert torch.equal(a, b)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    "Raw data and block sets of three corners."
    folder = tmp_path_factory.mktemp("run")
    write_sample_raw(folder / "raw", [corner(p) for p in load_sample(["coffee", "coins", "text"])])
    datasets.write_block_sets(
        folder / "dataset", datasets.build_block_sets(folder / "raw", fractions=(0.4, 0.3, 0.3))
    )
    return folder


def test_the_command_trains_on_two_processes(small):
    settings = [
        f"-p{name}={value}"
        for name, value in dict(epochs=1, batch_size=2, side=64, dropout=0, device="cpu").items()
    ]
    done = launch("-m", "av1nb.cli", "train-joint", small, *settings, "-pname=two")
    assert done.stdout.startswith("2 processes") and done.stdout.count("Best epoch 1 of 1") == 1
    assert {p.name for p in (small / "models").iterdir()} == {f"two_{part}" for part in PARTS}
    changes = yaml.safe_load(
        "{epochs: 1, batch_size: 2, side: 64, dropout: 0, device: cpu, name: one}"
    )
    _, history = joint.train_run(small, changes, progress=False)
    for name in ("train_loss", "val_loss", "nll"):  # bfloat16 where the processor has it
        assert math.isclose(
            history.rows[0][name],
            training.History.load(small / "models/two_history.pt").rows[0][name],
            rel_tol=0.02,
        )


def test_the_command_trains_on_sets_of_another_size(tmp_path):
    "As the stage notebook, it asks for the block sets of `size`, and for no others."
    pictures = [corner(p) for p in load_sample(["coffee", "coins", "text"])]
    write_sample_raw(tmp_path / "raw", pictures, sizes=[32], excel=False)
    told = [f"-p{pair}" for pair in ("epochs=1", "batch_size=2", "side=64", "device=cpu")]
    done = CliRunner().invoke(cli.app, ["train-joint", str(tmp_path), *told, "-psize=32"])
    assert done.exit_code == 1 and "dataset/block_32/train.pt is missing" in done.stderr
    sets = datasets.build_block_sets(tmp_path / "raw", 32, fractions=(0.4, 0.3, 0.3))
    datasets.write_block_sets(tmp_path / "dataset", sets)
    done = CliRunner().invoke(cli.app, ["train-joint", str(tmp_path), *told, "-psize=32"])
    assert done.exit_code == 0, done.output
    content = torch.load(tmp_path / "models/joint_model_best.pt", weights_only=True)
    assert content["provenance"]["split_hash"] == sets["test"].split_hash


def test_a_batch_that_cannot_be_divided_is_refused(small, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    done = CliRunner().invoke(
        cli.app, ["train-joint", str(small), "-pbatch_size=3", "-pname=odd", "-pdevice=cpu"]
    )
    assert (
        done.exit_code == 1
        and done.stderr.strip()
        == "av1nb train-joint: batch_size is 3; it must be at least 1 and divisible by the 2"
        " processes."
    )
    assert not list((small / "models").glob("odd*"))


def test_a_trainer_refuses_what_cannot_be_divided(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="RANK does not say"):
        training.process()
    monkeypatch.setenv("RANK", "1")
    model, crops = heads.JointModel(widths=(16, 16, 16, 16), depths=(1, 1, 1, 1)), frames.FrameSet(
        [corner(load_sample(["coffee"])[0])], 64
    )

    def trainer(batch_size, *share):
        config = joint.joint_config("cpu", epochs=1, batch_size=batch_size)
        return training.Trainer(
            model,
            frames.CropBatches(crops, batch_size, 1, True, *share),
            frames.TileBatches(crops, 2),
            losses.TreeLikelihood(),
            None,
            config,
            lambda b: [b],
        )

    with pytest.raises(
        ValueError, match="batch_size is 3; it must be divisible by the 2 processes"
    ):
        trainer(3)
    with pytest.raises(ValueError, match="divided among 4 processes, but there are 2"):
        trainer(4, 0, 4)


def test_the_command_has_the_parameters_of_the_notebook():
    taken = runs.parameters_of(runs.find_notebook("010_joint"))
    data = {"run_dir", "size", "material"}  # where it learns from is not how
    assert {*taken} - data == {field.name for field in dataclasses.fields(joint.JointRecipe)}
    # what the notebook does not leave to the recipe is as it stands there
    given = {name: yaml.safe_load(text) for name, text in taken.items() if text != "None"}
    assert {name: getattr(joint.JointRecipe(), name) for name in given if name not in data} == {
        name: value for name, value in given.items() if name not in data
    }
    with pytest.raises(ValueError, match="no parameter epoch;"):
        joint.train_run("nowhere", {"epoch": 3})


if __name__ == "__main__":
    if len(sys.argv) > 2:
        from accelerate import notebook_launcher

        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        notebook_launcher(
            train_both, (sys.argv[1],), num_processes=int(sys.argv[2]), use_port=str(port)
        )
    else:
        train_both(sys.argv[1])
