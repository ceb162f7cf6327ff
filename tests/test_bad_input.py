"""What a user does wrong between stages: one sentence, and nothing half-written."""

import json
import os
import shutil

import pytest
import torch

from av1nb import runs
from conftest import av1nb


def one_sentence(done, *words):
    assert done.returncode == 1, done.stdout[-2000:] + done.stderr[-2000:]
    last = done.stderr.strip().splitlines()[-1]
    for word in words:
        assert word in last, last
    assert last.startswith("av1nb "), last


def copy_of(run, target, *rooms):
    "Hard links to the files of a run; whoever changes one replaces it."
    for room in rooms:
        shutil.copytree(run / room, target / room, copy_function=os.link)
    return target


def replace(path, content):
    path.unlink()
    path.write_bytes(content)


def test_a_stage_without_the_one_before(tmp_path):
    done = av1nb("run", "003", "--run-dir", tmp_path / "empty", check=False)
    one_sentence(done, "dataset/block_16/train.pt is missing", "001_prepare_dataset")
    done = av1nb("run", "008", "--run-dir", tmp_path / "empty", check=False)
    one_sentence(done, "missing", "001_prepare_dataset")


def test_training_stage_2_without_stage_1(small_run, tmp_path):
    copy_of(small_run, tmp_path, "dataset")
    one_sentence(
        av1nb("run", "004", "--run-dir", tmp_path, check=False),
        "stage1_model_best.pt",
        "003_train_stage1",
    )
    assert not list(tmp_path.glob("models/*"))


def test_a_checkpoint_of_another_stage(small_run, tmp_path):
    copy_of(small_run, tmp_path, "dataset", "models", "reports")
    replace(
        tmp_path / "models/stage2_model_best.pt",
        (tmp_path / "models/stage1_model_best.pt").read_bytes(),
    )
    (tmp_path / "reports/pipeline.json").unlink()
    one_sentence(
        av1nb("run", "008", "--run-dir", tmp_path, check=False),
        "stage2_model_best.pt",
        "stage1",
        "stage2",
    )
    assert not (tmp_path / "reports/pipeline.json").exists()


def test_a_checkpoint_of_another_split(small_run, tmp_path):
    copy_of(small_run, tmp_path, "dataset", "models", "reports")
    path = tmp_path / "models/stage3_RECT_model_best.pt"
    content = torch.load(path, weights_only=True)
    path.unlink()
    torch.save(content | {"split_hash": "0000000000000000"}, path)
    one_sentence(
        av1nb("run", "008", "--run-dir", tmp_path, check=False), "split", "0000000000000000"
    )


def test_an_audit_that_fails_stops_the_run(small_run, tmp_path):
    "Pixels that changed after the raw data were verified do not become a data set."
    copy_of(small_run, tmp_path, "raw")
    victim = next((tmp_path / "raw/intra_raw_blocks").glob("*_sample_16.txt"))
    data = bytearray(victim.read_bytes())
    data[1000] ^= 1
    replace(victim, bytes(data))
    done = av1nb("run", "001", "--run-dir", tmp_path, check=False)
    assert done.returncode == 1 and victim.name.split("_sample")[0] in done.stderr
    assert not (tmp_path / "dataset/block_16/train.pt").exists()


def test_too_few_sequences(small_run, tmp_path):
    done = av1nb(
        "run",
        "000",
        "001",
        "--run-dir",
        tmp_path,
        "-p",
        "pictures=["
        + json.loads(next((small_run / "raw/recordings").glob("*.json")).read_text())["sequence"]
        + "]",
        "-p",
        "excel=false",
        check=False,
    )
    assert done.returncode == 1 and "at least" in done.stderr
    assert not (tmp_path / "dataset/block_16").exists()


def test_misspelt_parameter_runs_nothing(tmp_path):
    one_sentence(
        av1nb("run", "003", "-p", "epoch=3", "--run-dir", tmp_path / "x", check=False),
        "epoch",
        "epochs",
    )
    assert not (tmp_path / "x").exists()
