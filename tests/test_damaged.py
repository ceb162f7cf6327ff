"""Damaged files of every kind: each is read, or refused in one sentence that names it; no other
exception, no crash.
"""

import io
import json
import warnings
import zipfile
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from av1nb import contract, corpus, costs, datasets, files, heads, masks, pictures, recordings
from av1nb import sample, steering, streams
from av1nb.joint import shipped_weights
from av1nb.partitions import random_tree

DATA = Path(streams.__file__).parent / "data"
MUTATIONS = 24  # of each kind; fewer of the network, which is large


def is_sentence(error, names):
    "Whether an error is one of the project's, in one line, and names one of the files."
    own = type(error) in (ValueError, RuntimeError, FileNotFoundError) or type(
        error
    ).__module__.startswith("av1nb.")
    message = str(error)
    return own and "\n" not in message and any(name in message for name in names)


def changed_bytes(data, rng):
    "Cut off, overwritten, doubled, or with a run of one value."
    data, way = bytearray(data), rng.integers(5)
    at = int(rng.integers(len(data)))
    if way == 0:
        return bytes(data[:at])
    if way == 1:
        run = int(rng.integers(1, 64))
        data[at : at + run] = bytes([int(rng.integers(256))]) * len(data[at : at + run])
    elif way == 2:
        data[at:at] = data[at : at + int(rng.integers(1, 200))]
    else:
        for place in rng.integers(len(data), size=rng.choice((1, 2, 5, 20))):
            data[place] = rng.integers(256)
    return bytes(data)


STRANGE = (None, True, -1, 0, 1e308, 2**70, "", "x", "../x", "/x", "a\nb", [], {}, [[]], {"x": 1})


def changed_json(data, rng):
    "One value exchanged, or one name lost."
    content = json.loads(data)
    for _ in range(int(rng.integers(1, 3))):
        part = content
        while True:
            keys = list(part) if isinstance(part, dict) else list(range(len(part)))
            if not keys:
                break
            key = keys[rng.integers(len(keys))]
            if isinstance(part[key], (dict, list)) and part[key] and rng.random() < 0.8:
                part = part[key]
                continue
            if isinstance(part, dict) and rng.random() < 0.2:
                del part[key]
            else:
                part[key] = STRANGE[rng.integers(len(STRANGE))]
            break
    return json.dumps(content).encode()


def changed_member(data, rng):
    "One member of a zip file changed, with a checksum that fits."
    with zipfile.ZipFile(io.BytesIO(data)) as old:
        parts = {info.filename: old.read(info) for info in old.infolist()}
        stored = old.infolist()[0].compress_type
    name = sorted(parts)[rng.integers(len(parts))]
    parts[name] = changed_bytes(parts[name] or b"\0", rng)
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", stored) as new:
        for part, content in parts.items():
            new.writestr(part, content)
    return packed.getvalue()


def muxed(container, folder):
    "The known stream in another container."
    target = folder / f"stream.{container}"
    with av.open(str(DATA / "known_stream.ivf")) as read, av.open(str(target), "w") as write:
        track = write.add_stream_from_template(read.streams.video[0], opaque=True)
        for packet in read.demux(read.streams.video[0]):
            if packet.size:
                packet.stream = track
                write.mux(packet)
    return target


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    "One file of every kind: path, what reads it, names that a message may have, ways to change it."
    folder = tmp_path_factory.mktemp("good")
    nodes = random_tree(96, 64, seed=1, qindex=80).assign(frame=0, order_hint=0, frame_type=0)
    luma = np.random.default_rng(0).integers(64, 941, (1, 64, 96)).astype(np.uint16)
    found = {}

    def add(kind, path, read, *ways, names=()):
        found[kind] = SimpleNamespace(
            path=path, read=read, names=(path.name, *names), ways=ways or (changed_bytes,)
        )

    for container in ("ivf", "obu", "mkv", "mp4"):
        path = muxed(container, folder)
        add(f"stream in {container}", path, lambda path: list(streams.read_trees(path)))
    Image.fromarray(np.arange(48 * 64 * 3).reshape(48, 64, 3).astype(np.uint8)).save(
        folder / "still.avif"
    )
    add("stream in avif", folder / "still.avif", lambda path: list(streams.read_trees(path)))
    for suffix in ("png", "jpg", "avif"):
        Image.open(folder / "still.avif").save(folder / f"picture.{suffix}")
        add(f"picture {suffix}", folder / f"picture.{suffix}", pictures.read_pictures)
    pictures.write_y4m(folder / "film.y4m", luma)
    add("film y4m", folder / "film.y4m", pictures.read_pictures)
    add("film mkv", folder / "stream.mkv", pictures.read_pictures)

    contract.write_partition_log(folder / "partition_frame_0.txt", nodes)
    add("log", folder / "partition_frame_0.txt", contract.read_partition_log)
    files.write_bytes(folder / "labels.txt", b"0\n3\n9\n" * 30)
    add("integers", folder / "labels.txt", lambda path: contract.read_ints(path, 0, 9))
    contract.write_excel(folder / "a-intra-0.xlsx", nodes)
    add("workbook", folder / "a-intra-0.xlsx", contract.read_excel, changed_bytes, changed_member)

    plan = recordings.RecordingPlan("a_q80", "a", sizes=(16, 8))
    recordings.write_recording(folder / "raw", plan, luma, nodes)
    root = folder / "raw"
    add(
        "description",
        root / "recordings/a_q80.json",
        lambda path: recordings.verify_recording(root, "a_q80"),
        changed_bytes,
        changed_json,
        names=("a_q80",),
    )
    add("frames", root / "frames/a.npy", lambda path: recordings.read_frames(root, "a"))

    blocks = datasets.BlockSet(
        torch.arange(4 * 64).reshape(4, 1, 8, 8).to(torch.uint16),
        *(torch.tensor(values) for values in ([0, 1, 2, 3], [80] * 4, [0] * 4, [0] * 4)),
        *(torch.tensor([0, 8, 16, 24]) for _ in range(3)),
        sequence_names=("a",),
        recording_names=("a_q80",),
        split="train",
        size=8,
        assignment={"a": "train"},
    )
    blocks.save(folder / "train.pt")
    add("block set", folder / "train.pt", datasets.BlockSet.load, changed_bytes, changed_member)
    files.save_json(
        {"splits": {"train": {"sha256": blocks.sha256}}, "split_hash": "0"},
        folder / "dataset/block_8/metadata.json",
    )
    add(
        "metadata",
        folder / "dataset/block_8/metadata.json",
        lambda path: datasets.read_metadata(folder / "dataset", 8),
        changed_bytes,
        changed_json,
    )
    files.write_bytes(folder / "joint.pt", shipped_weights().read_bytes())
    add("joint", folder / "joint.pt", heads.JointModel.load, changed_bytes, changed_member)
    weights = {"backbone.conv1.weight": torch.ones(2, 1, 3, 3), "head.head.4.weight": torch.ones(1)}
    torch.save(
        dict(stage="stage1", hierarchy="v6", epoch=3, model_state_dict=weights), folder / "v6.pt"
    )
    add(
        "checkpoint",
        folder / "v6.pt",
        lambda path: heads.identify_state(heads.read_checkpoint(path)["model_state_dict"]),
        changed_bytes,
        changed_member,
    )

    masks.uniform_masks(1, 96, 64, (0, 3)).save(folder / "masks.bin")
    add("mask table", folder / "masks.bin", masks.MaskTable.load)
    files.write_bytes(folder / "policies.json", steering.shipped_policies().read_bytes())
    add(
        "policies",
        folder / "policies.json",
        lambda path: steering.policy_for(1, 1, path),
        changed_bytes,
        changed_json,
    )
    tried = np.ones((2, 10), np.float32)
    costs.SearchLog(
        pd.DataFrame(dict(frame=0, size=[64, 16], row=0, col=0, type=[3, 0])),
        tried,
        tried,
        dict(width=96, height=64),
    ).save(folder / "costs.npz")
    add("costs", folder / "costs.npz", costs.SearchLog.load, changed_bytes, changed_member)

    picture = sample.Picture(
        "a", "t", "", "", "", "", luma, {80: nodes}, {80: dict(bytes=1, sha256="")}
    )
    origin = dict(file="a.png", kind="picture", package="", sha256="", factor=1.5, thumbnails=[])
    whole = folder / "corpus"
    sample.write_sample(
        [picture],
        dict(
            library="",
            version="",
            options={},
            cq_levels={"80": 20},
            rebuild="",
            origin=origin,
        ),
        whole / "pictures/a",
    )
    options = dict.fromkeys(("cpu_used", "max_pixels", "crop", "crops", "frames"), 1)
    options |= dict(qindexes=[80], factor=None, similarity=0.9, libaom="3")
    files.save_json(dict(format="av1nb corpus 1", options=options), whole / "corpus.json")
    files.save_json({"b.png": dict(reason="", group="")}, whole / "skipped.json")
    parts = tuple(p.name for p in whole.rglob("*") if p.is_file())
    for name in ("corpus.json", "skipped.json", "pictures/a/sample.json"):
        add(
            name,
            whole / name,
            lambda path: (
                corpus.corpus_table(whole),
                corpus.skipped_table(whole),
                corpus.load_corpus(whole),
            ),
            changed_bytes,
            changed_json,
            names=parts,
        )

    def rehashed(path):
        "The sample with a damaged part whose hash fits."
        manifest = json.loads((whole / "pictures/a/sample.json").read_bytes())
        name = path.relative_to(whole / "pictures/a").as_posix()
        kept = (whole / "pictures/a/sample.json").read_bytes()
        manifest["files"][name] = files.sha256_of_file(path)
        files.save_json(manifest, whole / "pictures/a/sample.json")
        try:
            sample.load_sample(folder=whole / "pictures/a")
        finally:
            files.write_bytes(whole / "pictures/a/sample.json", kept)

    for name in ("logs.tar.xz", "luma/a.jxl"):
        add(name, whole / "pictures/a" / name, rehashed)

    journal = files.Journal(folder / "trials.jsonl")
    for n in range(5):
        journal["stock", n] = dict(bytes=n, psnr=40.5)
    add("journal", folder / "trials.jsonl", files.Journal)
    return found


KINDS = (
    *(f"stream in {container}" for container in ("ivf", "obu", "mkv", "mp4", "avif")),
    *(f"picture {suffix}" for suffix in ("png", "jpg", "avif")),
    *("film y4m", "film mkv", "log", "integers", "workbook", "description", "frames"),
    *("block set", "metadata", "joint", "checkpoint", "mask table", "policies", "costs"),
    *("corpus.json", "skipped.json", "pictures/a/sample.json", "logs.tar.xz", "luma/a.jxl"),
    "journal",
)


def test_every_kind_is_tried(good):
    assert set(good) == set(KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_file_is_read_or_refused_in_one_sentence(good, kind):
    "A few hundred seeded mutations over all readers."
    one, outcomes = good[kind], []
    whole = one.path.read_bytes()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # repeated lines of a log, odd tags of a picture
        one.read(one.path)  # undamaged
        for way in one.ways:
            for seed in range((8 if kind == "joint" else MUTATIONS) // len(one.ways)):
                rng = np.random.default_rng([seed, KINDS.index(kind)])
                files.write_bytes(one.path, way(whole, rng))
                try:
                    one.read(one.path)
                    outcomes.append("read")
                except Exception as error:
                    assert is_sentence(
                        error, one.names
                    ), f"{way.__name__}, seed {seed}: {type(error).__name__}: {error}"
                    outcomes.append("refused")
    files.write_bytes(one.path, whole)
    assert outcomes.count("refused") > 0
