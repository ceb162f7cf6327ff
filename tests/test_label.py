"""`av1nb label` on streams of two encoders: the logs equal the coded tree node by node, and read
back as the same arrays.
"""

from fractions import Fraction

import av
import numpy as np
import pandas as pd
import pytest

from av1nb import contract, encoding, libaom, recordings, sample, streams
from av1nb.partitions import mi_arrays
from conftest import av1nb

COLUMNS = ["order_hint", "frame_type", "size", "row", "col", "type", "qindex"]


@pytest.fixture(scope="module")
def clip():
    "Three 10-bit frames of real texture that moves."
    luma = sample.load_sample(["gravel"])[0].luma[0]
    frames = [
        np.ascontiguousarray(luma[4 * k : 4 * k + 130, 6 * k : 6 * k + 196]) for k in range(3)
    ]
    chroma = np.full((65, 98), 512, np.uint16)
    return [(frame, chroma, chroma) for frame in frames]


def svt(path, clip):
    "The same clip by SVT-AV1, with inter frames."
    with av.open(str(path), "w") as container:
        stream = container.add_stream(
            "libsvtav1", rate=30, options={"preset": "8", "crf": "35", "svtav1-params": "keyint=16"}
        )
        stream.width, stream.height, stream.pix_fmt, stream.time_base = (
            196,
            130,
            "yuv420p10le",
            Fraction(1, 30),
        )
        for number, planes in enumerate(clip * 3):
            frame = av.VideoFrame(196, 130, "yuv420p10le")
            for target, plane in zip(frame.planes, planes):
                rows = np.frombuffer(target, np.uint16).reshape(
                    target.height, target.line_size // 2
                )
                rows[:, : plane.shape[1]] = plane
            frame.pts = number
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


@pytest.mark.parametrize("encoder", ["libaom", "svt-av1"])
def test_logs_equal_the_coded_tree(encoder, clip, tmp_path):
    if encoder == "libaom":
        path = tmp_path / "clip.ivf"
        encoding.encode(clip, path, cq_level=32, cpu_used=5)
    else:
        if "libsvtav1" not in av.codecs_available:
            pytest.skip("this PyAV has no SVT-AV1 encoder")
        path = tmp_path / "clip.mkv"
        svt(path, clip)
    av1nb("label", path, "--out", tmp_path / "out", "--size", 8)

    shown = 0
    for frame in streams.read_trees(path):
        log = tmp_path / f"out/logs/clip/partition_frame_{frame.index}.txt"
        if frame.block_size is None:
            continue  # shown again: it has no tree of its own
        shown += 1
        lines = np.loadtxt(log, dtype=int, ndmin=2)
        assert lines.shape[1] == 7
        written = contract.read_partition_log(log, frame=frame.index)
        told = frame.nodes()
        key = ["size", "row", "col"]
        pd.testing.assert_frame_equal(
            written[COLUMNS].sort_values(key, ignore_index=True),
            told[COLUMNS].sort_values(key, ignore_index=True),
            check_dtype=False,
        )
        size, kind = mi_arrays(written, frame.width, frame.height)
        assert np.array_equal(size, frame.block_size)
    assert shown >= 3

    blocks, table = recordings.read_recording(tmp_path / "out", "clip", 8)
    recording = recordings.find_recording(tmp_path / "out", "clip")
    pictures = recordings.read_frames(tmp_path / "out", recording)
    assert len(blocks) > 0 and (table["qindex"] > 0).all()
    for block, row in zip(blocks, table.itertuples()):
        picture = pictures[list(recording.frames).index(row.frame)]
        assert np.array_equal(block, picture[row.row : row.row + 8, row.col : row.col + 8])


def test_corrupt_and_truncated_streams_say_so_and_leave_nothing(clip, tmp_path):
    encoding.encode(clip, tmp_path / "good.ivf", cq_level=32, cpu_used=6)
    data = (tmp_path / "good.ivf").read_bytes()
    damaged = bytearray(data)
    damaged[60:160] = bytes(range(100))
    for name, content, word in (
        ("truncated", data[: len(data) * 2 // 3], "cut off"),
        ("damaged", bytes(damaged), ""),
        ("text", b"no stream at all, only words" * 9, "not an AV1"),
        ("empty", b"", "empty"),
    ):
        path = tmp_path / f"{name}.ivf"
        path.write_bytes(content)
        done = av1nb("label", path, "--out", tmp_path / f"out_{name}", check=False)
        assert done.returncode == 1, (name, done.returncode, done.stderr[-500:])
        assert (
            str(path) in done.stderr and word in done.stderr and "Traceback" not in done.stderr
        ), done.stderr
        assert len(done.stderr.strip().splitlines()) == 1, done.stderr
        left = (
            [p for p in (tmp_path / f"out_{name}").rglob("*") if p.is_file()]
            if (tmp_path / f"out_{name}").exists()
            else []
        )
        assert not left, left


def test_a_library_that_is_no_libaom_is_refused(clip, tmp_path):
    encoding.encode(clip[:1], tmp_path / "good.ivf", cq_level=40, cpu_used=6)
    (tmp_path / "libaom.so").write_bytes(b"not a library")
    done = av1nb(
        "label",
        tmp_path / "good.ivf",
        "--out",
        tmp_path / "out",
        "--libaom",
        tmp_path / "libaom.so",
        check=False,
    )
    assert done.returncode == 1 and "libaom.so" in done.stderr and "Traceback" not in done.stderr
