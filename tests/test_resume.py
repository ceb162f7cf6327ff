"""A training that is really killed, at the worst moments, continues to the same weights and the
same history, bit for bit.

Run as a program (`python test_resume.py FOLDER MOMENT`) this file is the training that gets killed.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import torch

EPOCHS, BATCHES = 5, 4


def train(folder, moment):
    """Train a small stage; kill this very process at `moment`: batch:<n>, <file ending>:writing,
    <file ending>:renaming, <file ending>:renamed, slow or never.
    """
    from av1nb import training
    from av1nb.datasets import Batches
    from av1nb.heads import build_model
    from av1nb.losses import CrossEntropy, Objective

    def die():
        os.kill(os.getpid(), signal.SIGKILL)

    what, _, when = moment.partition(":")
    fsync, replace, seen = os.fsync, os.replace, []

    def dying_fsync(descriptor):
        name = os.readlink(f"/proc/self/fd/{descriptor}") if os.path.exists("/proc/self/fd") else ""
        if when == "writing" and what in name and os.path.exists(Path(folder) / "RECT_state.pt"):
            os.ftruncate(descriptor, os.fstat(descriptor).st_size // 2)
            die()
        fsync(descriptor)

    def dying_replace(source, target, **kwargs):
        hit = str(target).endswith(what) and when in ("renaming", "renamed")
        if hit and when == "renaming":
            die()
        replace(source, target, **kwargs)
        if hit:
            die()

    os.fsync, os.replace = dying_fsync, dying_replace
    generator = torch.Generator().manual_seed(3)
    samples = torch.randint(0, 1024, (BATCHES * 16 + 32, 1, 16, 16), generator=generator).to(
        torch.uint16
    )
    labels = torch.randint(0, 2, (len(samples),), generator=generator)
    noise = torch.Generator().manual_seed(11)  # not derived from the epoch: the engine must keep it

    class Dying(Objective):
        def forward(self, model, x, target, *inputs):
            if model.training:
                seen.append(len(x))
                if what == "batch" and len(seen) == int(when):
                    die()
                if what == "slow":
                    time.sleep(0.05)
                x = x + 0.01 * torch.randn(x.shape, generator=noise)
            return super().forward(model, x, target, *inputs)

    training.set_seed(1)
    model = build_model("v6", "RECT", "v5")
    train_batches = Batches(samples[32:], labels[32:], batch_size=16, shuffle=True, seed=5)
    val_batches = Batches(samples[:32], labels[:32], batch_size=16)

    def score(logits, target):
        return {"accuracy": (logits.argmax(1) == target).double().mean().item()}

    config = training.TrainConfig(
        epochs=EPOCHS,
        batch_size=16,
        frozen_epochs=1,
        unfreeze="gradual",
        monitor="val_loss",
        mode="min",
        schedule="onecycle",
        patience=0,
        device="cpu",
        seed=42,
    )
    training.fit(
        model,
        train_batches,
        val_batches,
        Dying(CrossEntropy()),
        score,
        config,
        folder,
        "RECT",
        {"split_hash": "0a1b2c"},
        progress=False,
        generators=[noise],
    )


def run(folder, moment):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, __file__, str(folder), moment],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    done = run(folder, "never")
    assert done.returncode == 0, done.stderr
    return folder


def assert_same(folder, whole):
    from av1nb.training import History

    for which in ("final", "best"):
        ours, theirs = (
            torch.load(f / f"RECT_model_{which}.pt", weights_only=True) for f in (folder, whole)
        )
        assert ours["epoch"] == theirs["epoch"]
        for key, value in theirs["model_state_dict"].items():
            assert torch.equal(value, ours["model_state_dict"][key]), (which, key)
    ours, theirs = (History.load(f / "RECT_history.pt").frame(times=False) for f in (folder, whole))
    pd.testing.assert_frame_equal(ours, theirs, check_exact=True)
    # and no temporary file
    assert sorted(p.name for p in folder.iterdir()) == sorted(p.name for p in whole.iterdir())


def test_killed_again_and_again_at_the_worst_moments(tmp_path, whole):
    moments = [
        f"batch:{BATCHES + 2}",
        "state.pt:writing",
        "state.pt:renaming",
        "state.pt:renamed",
        "best.pt:renamed",
        "final.pt:renaming",
        "metrics.json:renaming",
    ]
    for moment in moments:
        done = run(tmp_path, moment)
        # no later epoch was better
        if moment == "best.pt:renamed" and done.returncode == 0:
            continue
        assert done.returncode == -signal.SIGKILL, (moment, done.returncode, done.stderr)
    done = run(tmp_path, "never")
    assert done.returncode == 0, done.stderr
    assert_same(tmp_path, whole)


def test_killed_from_outside(tmp_path, whole):
    process = subprocess.Popen(
        [sys.executable, __file__, str(tmp_path), "slow"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    deadline = time.monotonic() + 120
    while (
        not (tmp_path / "RECT_state.pt").exists()
        and process.poll() is None
        and time.monotonic() < deadline
    ):
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "RECT_model_final.pt").exists()
    done = run(tmp_path, "never")
    assert done.returncode == 0, done.stderr
    assert_same(tmp_path, whole)


if __name__ == "__main__":
    train(*sys.argv[1:])
