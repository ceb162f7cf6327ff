"""Folders from somebody else: no name in them leads outside, nothing in them grows beyond bounds,
and nothing in them is run.
"""

import io
import json
import lzma
import os
import shutil
import tarfile
import zipfile

import numpy as np
import pandas as pd
import pytest
import torch

from av1nb import contract, corpus, costs, datasets, files, heads, masks, recordings, runs
from av1nb import sample, steering
from av1nb.joint import shipped_weights
from av1nb.partitions import random_tree
from av1nb.training import History, TrainingError

NAMES = ("../x", "a/../../x", "/tmp/x", "C:x", "..\\x", "nul", "a\nb", "")


class Opens:
    "What makes a folder when it is unpickled."

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.fixture
def picture():
    nodes = random_tree(96, 64, seed=1, qindex=80).assign(frame=0, order_hint=0, frame_type=0)
    luma = np.random.default_rng(0).integers(64, 941, (1, 64, 96)).astype(np.uint16)
    return sample.Picture(
        "a", "t", "", "", "", "", luma, {80: nodes}, {80: dict(bytes=1, sha256="")}
    )


@pytest.fixture
def shared(tmp_path, picture):
    "A corpus of one picture, as it comes from somebody else."
    origin = dict(file="a.png", kind="picture", package="", sha256="", factor=1.5, thumbnails=[])
    encoder = dict(library="", version="", options={}, cq_levels={"80": 20}, rebuild="")
    folder = tmp_path / "given/corpus"
    sample.write_sample([picture], encoder | dict(origin=origin), folder / "pictures/a")
    options = dict.fromkeys(("cpu_used", "max_pixels", "crop", "crops", "frames"), 1)
    options |= dict(qindexes=[80], factor=None, similarity=0.9, libaom="3")
    files.save_json(dict(format="av1nb corpus 1", options=options), folder / "corpus.json")
    return folder


@pytest.fixture
def raw(tmp_path, picture):
    "Raw data with one recording."
    plan = recordings.RecordingPlan("a_q80", "a", sizes=(16,))
    recordings.write_recording(tmp_path / "given/raw", plan, picture.luma, picture.nodes[80])
    return tmp_path / "given/raw"


def rewrite(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def snapshot(folder):
    return {str(p): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("name", ["../../../../outside/x", "{}/outside/x", "../x"])
@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE])
def test_logs_of_a_corpus_are_unpacked_nowhere_else(shared, tmp_path, name, kind):
    "Hashes that come with a folder protect nothing."
    (outside := tmp_path / "outside").mkdir()
    (outside / "kept").write_text("kept")
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        info = tarfile.TarInfo(name.format(tmp_path))
        info.type, info.size = kind, 7 if kind == tarfile.REGTYPE else 0
        info.linkname = str(outside / "kept")
        archive.addfile(info, io.BytesIO(b"written"))
    data = lzma.compress(packed.getvalue())
    (shared / "pictures/a/logs.tar.xz").write_bytes(data)
    rewrite(
        shared / "pictures/a/sample.json",
        lambda content: content["files"].update({"logs.tar.xz": files.sha256(data)}),
    )
    before = snapshot(tmp_path)
    with pytest.raises(corpus.CorpusError, match="logs.tar.xz is not unpacked"):
        corpus.load_corpus(shared)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("name", NAMES)
def test_names_in_a_corpus(shared, tmp_path, name):
    manifest = shared / "pictures/a/sample.json"
    good = manifest.read_text()
    for change in (
        lambda content: content["pictures"][0].update(name=name),
        lambda content: content["pictures"][0].update(luma=name),
    ):
        manifest.write_text(good)
        rewrite(manifest, change)
        with pytest.raises(corpus.CorpusError, match="sample.json|no plain path"):
            corpus.load_corpus(shared)
    manifest.write_text(good)
    rewrite(manifest, lambda content: content["encoder"]["origin"].update(file=name))
    with pytest.raises(corpus.CorpusError, match="no plain path"):
        corpus.source_planes(shared, tmp_path, "a")


def test_a_small_archive_does_not_fill_the_disk(shared):
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        info = tarfile.TarInfo("a_q080/partition_frame_0.txt")
        info.size = 1 << 24
        archive.addfile(info, io.BytesIO(bytes(info.size)))
    data = lzma.compress(packed.getvalue())
    assert len(data) < 10_000
    (shared / "pictures/a/logs.tar.xz").write_bytes(data)
    rewrite(
        shared / "pictures/a/sample.json",
        lambda content: content["files"].update({"logs.tar.xz": files.sha256(data)}),
    )
    with pytest.raises(corpus.CorpusError, match="unpacks to more than"):
        corpus.load_corpus(shared)


@pytest.mark.parametrize("what", ["pictures/a", "pictures/a/luma/a.jxl"])
def test_links_in_a_corpus(shared, tmp_path, what):
    shutil.move(shared / what, tmp_path / "elsewhere")
    (shared / what).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(corpus.CorpusError, match="is a link that leads out of"):
        corpus.load_corpus(shared)


@pytest.mark.parametrize("name", NAMES)
def test_names_in_a_recording(raw, tmp_path, picture, name):
    "Writing a recording anew removes the files of the older one, and no others."
    description = raw / "recordings/a_q80.json"
    good = description.read_text()
    (tmp_path / "given/x").write_text("kept")
    for change in (
        lambda content: content.update(pictures=name),
        lambda content: content.update(name=name),
        lambda content: content["files"].update({name: ""}),
        lambda content: content["files"].update({f"logs/a_q80/{name}": ""}),
    ):
        description.write_text(good)
        rewrite(description, change)
        for read in (
            lambda: recordings.list_recordings(raw),
            lambda: recordings.verify_recording(raw, "a_q80"),
            lambda: recordings.write_recording(
                raw, recordings.RecordingPlan("a_q80", "a"), picture.luma, picture.nodes[80]
            ),
        ):
            with pytest.raises(recordings.RecordingError, match="a_q80.json"):
                read()
    assert (tmp_path / "given/x").read_text() == "kept"


@pytest.mark.parametrize("what", ["frames/a.npy", "logs/a_q80/partition_frame_0.txt", "labels"])
def test_links_and_pipes_in_a_recording(raw, tmp_path, what):
    shutil.move(raw / what, tmp_path / "elsewhere")
    (raw / what).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(recordings.RecordingError, match="is a link that leads out of"):
        recordings.verify_recording(raw, "a_q80")
    (raw / what).unlink()
    os.mkfifo(raw / what)
    with pytest.raises(recordings.RecordingError):
        recordings.verify_recording(raw, "a_q80")


@pytest.mark.parametrize(
    "read, error",
    [
        (datasets.BlockSet.load, datasets.DatasetError),
        (heads.read_checkpoint, heads.CheckpointError),
        (heads.JointModel.load, heads.CheckpointError),
        (History.load, TrainingError),
    ],
)
def test_nothing_in_a_file_of_tensors_is_run(tmp_path, read, error):
    torch.save(
        {"samples": torch.zeros(1), "model_state": Opens(tmp_path / "made")}, tmp_path / "a.pt"
    )
    with pytest.raises(error, match="a.pt holds Python objects .* could run code"):
        read(tmp_path / "a.pt")
    torch.save({"samples": torch.ones(1).expand(10**12)}, tmp_path / "a.pt")
    with pytest.raises(error, match="a.pt .* that is not stored in it"):
        read(tmp_path / "a.pt")
    assert not (tmp_path / "made").exists()


def test_a_network_of_any_size_takes_no_memory(tmp_path):
    content = torch.load(shipped_weights(), weights_only=True)
    settings = content["settings"] if "settings" in content else content["provenance"]["settings"]
    huge = {k: [1 << 20] * len(v) if k == "widths" else v for k, v in settings.items()}
    torch.save(content | dict(settings=huge), tmp_path / "joint.pt")
    with pytest.raises(heads.CheckpointError, match="joint.pt was written by another version"):
        heads.JointModel.load(tmp_path / "joint.pt")


def test_a_data_set_behind_a_link(tmp_path):
    folder = tmp_path / "dataset/block_16"
    files.save_json(dict(splits={}, split_hash=""), folder / "metadata.json")
    (tmp_path / "val.pt").write_bytes(b"")
    (folder / "val.pt").symlink_to(tmp_path / "val.pt")
    with pytest.raises(datasets.DatasetError, match="is a link that leads out of"):
        datasets.read_block_sets(tmp_path / "dataset", splits=("val",))
    with pytest.raises(ValueError, match="stage-3 set name"):
        datasets.read_stage3(tmp_path / "dataset", "../../x")


def test_cost_logs_and_workbooks_that_unpack_to_much(tmp_path, monkeypatch):
    monkeypatch.setattr(costs, "_MOST_UNPACKED", 1 << 20)
    monkeypatch.setattr(contract, "_MOST_UNPACKED", 1 << 20)
    for name, read in (("a.npz", costs.SearchLog.load), ("a-intra-0.xlsx", contract.read_excel)):
        with zipfile.ZipFile(tmp_path / name, "w", zipfile.ZIP_DEFLATED) as bomb:
            bomb.writestr("costs.npy", bytes(1 << 21))
        with pytest.raises(ValueError, match=f"{name} .*unpacks to 2,097,152 bytes"):
            read(tmp_path / name)


def test_cost_logs_are_not_unpickled(tmp_path):
    one = np.ones((1, 10), np.float32)
    nodes = pd.DataFrame(dict(frame=[0], size=64, row=0, col=0, type=3))
    costs.SearchLog(nodes, one, one, dict(width=64, height=64)).save(tmp_path / "a.npz")
    parts = dict(np.load(tmp_path / "a.npz"))
    objects = np.array([Opens(tmp_path / "made")], object)
    np.savez(tmp_path / "a.npz", **parts | dict(type=objects))
    with pytest.raises(ValueError, match="a.npz is not a search log"):
        costs.SearchLog.load(tmp_path / "a.npz")
    assert not (tmp_path / "made").exists()


def test_a_mask_table_that_promises_more_than_it_holds(tmp_path):
    (tmp_path / "a.bin").write_bytes(b"PMSK" + b"\xff" * 12)
    with pytest.raises(ValueError, match="a.bin.* is cut off or damaged"):
        masks.MaskTable.load(tmp_path / "a.bin")


def test_a_policy_that_nests_without_end(tmp_path):
    (tmp_path / "a.json").write_text('{"speeds":' * 100_000)
    with pytest.raises(ValueError, match="a.json is damaged"):
        steering.policy_for(1, 1, tmp_path / "a.json")


def test_a_run_directory_with_links(tmp_path):
    (elsewhere := tmp_path / "elsewhere").mkdir()
    (elsewhere / "key").write_text("secret")
    run = runs.RunDirectory(tmp_path / "run")
    (run.room("dataset") / "key").symlink_to(elsewhere / "key")
    run.room("raw")
    (run / "models").symlink_to(elsewhere)
    for read in (
        lambda: run.room("models"),
        lambda: run.require("models/key"),
        lambda: run.require("dataset/*"),
        lambda: runs.share_data(run, runs.RunDirectory(tmp_path / "copy")),
    ):
        with pytest.raises(runs.RunError, match="is a link that leads out of"):
            read()
    assert not list((tmp_path / "copy").rglob("key"))


@pytest.mark.parametrize("name", NAMES)
def test_names_in_a_receipt(tmp_path, name):
    run, path = runs.RunDirectory(tmp_path), tmp_path / "notebooks/003_train_stage1.json"
    files.save_json(dict(made=[name], parameters={}, code="", seconds=1), path)
    with pytest.raises(runs.RunError, match="no plain path"):
        runs.is_done(run, "003_train_stage1", {})
    path.write_text("{")
    with pytest.raises(runs.RunError, match="003_train_stage1.json is damaged"):
        runs.is_done(run, "003_train_stage1", {})
