"""A corpus from any folder: built, interrupted, continued, and never half-written."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import av
import numpy as np
import papermill
import pandas as pd
import pytest
from PIL import Image

from av1nb import corpus, material
from av1nb.recordings import find_recording
from av1nb.pictures import planes_from_rgb, planes_from_ycbcr
from av1nb.sample import load_sample, sha256, write_sample_raw
from av1nb.streams import read_trees
from av1nb.encoding import cq_level_of, encode, synthetic_picture

STAGE = Path(__file__).parent.parent / "nbs/stages/build_corpus.ipynb"
FAST = dict(qindexes=(128, 220), cpu_used=6, crop=64, crops=2, jobs=1)


def colours(seed, width=192, height=144):
    "An 8-bit RGB picture."
    luma, blue, red = (
        np.asarray(plane >> 2, np.uint8) for plane in synthetic_picture(width, height, seed=seed)
    )
    return np.stack(
        [luma, *(p.repeat(2, 0).repeat(2, 1)[:height, :width] for p in (blue, red))], axis=2
    )


def save_film(path, pixel_format, count=5):
    "A lossless film of a moving scene; returns its pictures."
    pictures = [synthetic_picture(128, 96, seed=50, shift=3 * k) for k in range(count)]
    if pixel_format == "yuv420p":
        pictures = [tuple((p >> 2).astype(np.uint8) for p in planes) for planes in pictures]
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=25, width=128, height=96, pix_fmt=pixel_format)
        for planes in pictures:
            container.mux(
                stream.encode(
                    av.VideoFrame.from_ndarray(
                        np.concatenate([p.reshape(-1, 128) for p in planes]), format=pixel_format
                    )
                )
            )
        container.mux(stream.encode())
    return pictures


def state(folder):
    return {str(p.relative_to(folder)): p.stat().st_mtime_ns for p in sorted(folder.rglob("*"))}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two pictures, a film, a smaller copy, a copy of a sample picture, two broken pictures, a
    cut-off film and a text.
    """
    folder = tmp_path_factory.mktemp("sources")
    (folder / "trip/day 1").mkdir(parents=True)
    Image.fromarray(colours(1)).save(folder / "one.png")
    Image.fromarray(colours(2)).save(folder / "trip/day 1/Two.png")
    Image.fromarray(colours(1)).resize((120, 90), Image.Resampling.LANCZOS).save(
        folder / "trip/one again.jpg", quality=80
    )
    [coffee] = load_sample(["coffee"])
    Image.fromarray((coffee.luma[0] >> 2).astype(np.uint8)).save(folder / "trip/cup.png")
    save_film(folder / "film.mkv", "yuv420p")
    (folder / "broken.png").write_bytes((folder / "one.png").read_bytes()[:3000])
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "cut.mkv").write_bytes((folder / "film.mkv").read_bytes()[:60])
    (folder / "notes.txt").write_text("not a picture")
    Image.new("RGB", (200, 200), (90, 90, 90)).save(folder / "grey.png")
    return folder


@pytest.fixture(scope="module")
def built(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("corpora") / "corpus"
    about = {
        "one.png": dict(
            author="A. Tester", licence="CC BY 4.0", title="patches", package="pictures 1.0"
        )
    }
    return out, corpus.build_corpus(folder, out, licence="CC0 1.0", about=about, **FAST)


def test_what_is_built_and_what_is_left_out(built):
    out, table = built
    assert table.index.tolist() == ["film", "one", "trip_day_1_two"]
    assert table.kind.tolist() == ["video", "picture", "picture"]
    skipped = corpus.skipped_table(out).set_index("file")
    assert set(skipped.index) == {
        "trip/one again.jpg",
        "trip/cup.png",
        "broken.png",
        "empty.jpg",
        "cut.mkv",
        "notes.txt",
        "grey.png",
    }
    assert (
        skipped.group["trip/one again.jpg"] == "one"
        and "the same picture as one of the corpus" in skipped.reason["trip/one again.jpg"]
    )
    assert (
        skipped.group["trip/cup.png"] == "coffee"
        and "of the sample" in skipped.reason["trip/cup.png"]
    )
    assert (
        "neither a picture nor a film" in skipped.reason["notes.txt"]
        and "single grey" in skipped.reason["grey.png"]
    )
    assert (
        skipped.group[["broken.png", "empty.jpg", "cut.mkv", "notes.txt", "grey.png"]] == ""
    ).all() and (skipped.reason.str.len() > 15).all()


def test_origin(folder, built):
    out, table = built
    assert table.loc["trip_day_1_two", ["file", "licence", "author", "package"]].tolist() == [
        "trip/day 1/Two.png",
        "CC0 1.0",
        "not stated",
        "",
    ]
    assert table.loc["one", ["title", "licence", "author", "package"]].tolist() == [
        "patches",
        "CC BY 4.0",
        "A. Tester",
        "pictures 1.0",
    ]
    [two] = corpus.load_corpus(out, ["trip_day_1_two"])
    assert two.source == "trip/day 1/Two.png" and two.source_sha256 == sha256(
        (folder / two.source).read_bytes()
    )
    assert "reduced by 1.5" in two.preparation
    manifest = json.loads((out / "pictures/film/sample.json").read_text())
    assert (
        manifest["encoder"]["library"] == "libaom"
        and manifest["encoder"]["options"]["sb-size"] == 64
        and manifest["encoder"]["options"]["cpu-used"] == 6
    )
    assert manifest["encoder"]["origin"]["frames"] == [1, 3]
    card = corpus.corpus_card(out)
    for part in (
        "A. Tester",
        "CC0 1.0",
        "broken.png",
        two.source_sha256,
        two.streams[128]["sha256"],
        "not stated",
    ):
        assert part in card


def test_labels_are_those_of_a_stream_encoded_by_hand(folder, built, tmp_path):
    out, _ = built
    pictures = {p.name: p for p in corpus.load_corpus(out)}
    for name, planes in (
        ("one", [planes_from_rgb(colours(1))]),
        ("film", [planes_from_ycbcr(save_film(tmp_path / "f.mkv", "yuv420p")[k]) for k in (1, 3)]),
    ):
        origin = json.loads((out / f"pictures/{name}/sample.json").read_text())["encoder"]["origin"]
        _, height, width = pictures[name].luma.shape
        cut = lambda plane, row, column, k: np.ascontiguousarray(
            plane[row // k : (row + height) // k, column // k : (column + width) // k]
        )
        crops = [
            tuple(cut(plane, *place, k) for plane, k in zip(frame, (1, 2, 2)))
            for frame in planes
            for place in origin["crops"]
        ]
        np.testing.assert_array_equal(pictures[name].luma, np.stack([crop[0] for crop in crops]))
        for qindex in (128, 220):
            made = encode(
                crops,
                tmp_path / "s.ivf",
                cq_level=cq_level_of(qindex),
                cpu_used=6,
                options={"sb-size": 64},
            )
            assert (
                sha256(made.ivf) == pictures[name].streams[qindex]["sha256"]
                and len(made.ivf) == pictures[name].streams[qindex]["bytes"]
            )
            place = ["frame", "size", "row", "col"]
            tables = pictures[name].nodes[qindex], pd.concat(
                [tree.nodes() for tree in read_trees(tmp_path / "s.ivf")]
            )
            seen, read = (
                t.sort_values(place, ignore_index=True)[[*place, "type", "qindex"]].astype(int)
                for t in tables
            )
            pd.testing.assert_frame_equal(seen, read)


def test_crops_of_one_photograph_are_one_sequence(built, tmp_path):
    pictures = corpus.load_corpus(built[0])
    assert max(len(p.luma) for p in pictures) > 1
    recordings = write_sample_raw(tmp_path, pictures)
    assert {r.sequence for r in recordings} == {p.name for p in pictures}
    assert list(find_recording(tmp_path, "film_q220").frames) == list(
        range(len(next(p for p in pictures if p.name == "film").luma))
    )


def test_a_second_run_does_nothing_and_another_option_is_refused(folder, built):
    out, table = built
    before, about = state(out), {
        "one.png": dict(
            author="A. Tester", licence="CC BY 4.0", title="patches", package="pictures 1.0"
        )
    }
    again = corpus.build_corpus(folder, out, licence="CC0 1.0", about=about, **FAST)
    pd.testing.assert_frame_equal(again, table)
    assert state(out) == before
    for change, words in (
        (dict(qindexes=(128,)), "qindexes"),
        (dict(cpu_used=5), "cpu_used"),
        (dict(crops=1), "crops"),
        (dict(factor=2), "factor"),
    ):
        with pytest.raises(
            corpus.CorpusError, match=f"was built with {words} .*Choose another folder"
        ):
            corpus.build_corpus(folder, out, **FAST | change)
    assert state(out) == before


def test_a_changed_source_is_made_again_alone(built, folder, tmp_path):
    sources, out = tmp_path / "sources", tmp_path / "corpus"
    sources.mkdir()
    for name, seed in (("a.png", 11), ("b.png", 12)):
        Image.fromarray(colours(seed)).save(sources / name)
    first = corpus.build_corpus(sources, out, **FAST)
    before = state(out / "pictures/a")
    Image.fromarray(colours(13)).save(sources / "b.png")
    Image.fromarray(colours(14)).save(sources / "a b.png")  # and a new one
    second = corpus.build_corpus(sources, out, **FAST)
    assert second.index.tolist() == ["a", "a_b", "b"] and state(out / "pictures/a") == before
    assert (
        second.source_sha256["b"]
        == sha256((sources / "b.png").read_bytes())
        != first.source_sha256["b"]
    )
    assert second.luma_sha256["b"] != first.luma_sha256["b"]


def test_killed_and_continued(tmp_path):
    sources, out = tmp_path / "sources", tmp_path / "corpus"
    sources.mkdir()
    for seed in range(4):
        Image.fromarray(colours(20 + seed)).save(sources / f"p{seed}.png")
    options = dict(FAST, cpu_used=1, crop=64, crops=2)
    code = (
        f"from av1nb.corpus import build_corpus; build_corpus({str(sources)!r}, {str(out)!r},"
        f" **{options})"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    while process.poll() is None and not list(out.glob("pictures/*/sample.json")):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    error = process.communicate()[1].decode()
    finished = corpus.corpus_table(out).index.tolist()
    assert 1 <= len(finished) < 4, error[-1000:]
    # whole, every one
    assert (
        [p.name for p in corpus.load_corpus(out)]
        == finished
        == sorted(p.name for p in (out / "pictures").iterdir())
    )
    before = {name: state(out / "pictures" / name) for name in finished}
    table = corpus.build_corpus(sources, out, **options)
    assert table.index.tolist() == [f"p{seed}" for seed in range(4)]
    assert {name: state(out / "pictures" / name) for name in finished} == before
    assert not list(out.glob(".part-*"))


def test_all_cores_give_what_one_gives(folder, built, tmp_path):
    table = corpus.build_corpus(
        [folder / "one.png", folder / "film.mkv"], tmp_path / "corpus", **FAST | dict(jobs=2)
    )
    assert table.luma_sha256.tolist() == built[1].luma_sha256[["film", "one"]].tolist()
    for p, q in zip(
        corpus.load_corpus(tmp_path / "corpus"), corpus.load_corpus(built[0], ["film", "one"])
    ):
        assert p.streams == q.streams


def test_nothing_usable_and_damage_are_one_sentence(folder, built, tmp_path):
    with pytest.raises(ValueError, match="None of the 1 files .* can be used; broken.png: "):
        corpus.build_corpus(folder / "broken.png", tmp_path / "c", **FAST)
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        corpus.build_corpus(tmp_path / "nowhere", tmp_path / "c")
    with pytest.raises(ValueError, match="no file"):
        corpus.build_corpus(tmp_path, tmp_path / "c")
    with pytest.raises(ValueError, match="qindexes"):
        corpus.build_corpus(folder, tmp_path / "c", qindexes=(81,))
    assert not (tmp_path / "c").exists()
    damaged = shutil.copytree(built[0], tmp_path / "damaged")
    luma = damaged / "pictures/one/luma/one.jxl"
    luma.write_bytes(luma.read_bytes()[:-9] + bytes(9))
    with pytest.raises(corpus.CorpusError, match="one.jxl is damaged"):
        corpus.load_corpus(damaged)
    (damaged / "pictures/one/sample.json").unlink()
    with pytest.raises(corpus.CorpusError, match="sample.json is missing"):
        corpus.corpus_table(damaged)
    with pytest.raises(corpus.CorpusError, match="not a corpus"):
        corpus.load_corpus(folder)


def test_the_stage_on_a_folder(folder, tmp_path):
    sources = tmp_path / "mine"
    sources.mkdir()
    os.link(folder / "one.png", sources / "one.png")
    parameters = dict(
        inputs=str(sources),
        out=str(tmp_path / "corpus"),
        licence="mine",
        qindexes=[220],
        cpu_used=6,
        crop=64,
        jobs=1,
    )
    papermill.execute_notebook(STAGE, tmp_path / "run.ipynb", parameters, progress_bar=False)
    assert corpus.corpus_table(tmp_path / "corpus").licence.tolist() == ["mine"]
    assert "one" in (tmp_path / "corpus/CARD.md").read_text()


def test_without_apt_a_source_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    known = material.free_sources()
    source = known[known["package"] == "debian:mate-backgrounds=1.26.0-1"].iloc[0]
    with pytest.raises(
        material.MaterialError,
        match="of debian:mate-backgrounds=.* cannot be had: apt-get is not on this machine. Put",
    ):
        material.fetch_source(source, tmp_path)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
