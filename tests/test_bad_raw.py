"""Bad raw data, from the file on the disk to the message: each fault is named, and nothing
half-written is left.
"""

import os
import resource
import subprocess
import sys
import textwrap
from contextlib import contextmanager

import numpy as np
import pandas as pd
import pytest

from av1nb import contract, recordings
from av1nb.pictures import read_pictures, write_y4m, write_yuv
from av1nb.blocks import extract_blocks
from av1nb.partitions import random_tree

WIDTH, HEIGHT, FRAMES = 96, 64, 2


def snapshot(folder):
    "Every file below a folder with its bytes, and every empty folder."
    return {
        str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None
        for p in sorted(folder.rglob("*"))
    }


@contextmanager
def disk_of(limit):
    "As if the disk were full after `limit` bytes of a file."
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def pictures():
    return np.random.default_rng(0).integers(0, 1024, (FRAMES, HEIGHT, WIDTH), dtype=np.uint16)


@pytest.fixture
def nodes():
    trees = [
        random_tree(WIDTH, HEIGHT, seed=n, qindex=80 + n).assign(
            frame=n, order_hint=n, frame_type=0
        )
        for n in range(FRAMES)
    ]
    return contract.require_nodes(pd.concat(trees, ignore_index=True))


@pytest.fixture
def clip(tmp_path, pictures, nodes):
    "A folder as an encoder leaves it: a video and a log for each frame."
    folder = tmp_path / "clip"
    write_yuv(folder / "clip.yuv", pictures)
    for n, of_frame in nodes.groupby("frame"):
        contract.write_partition_log(folder / f"partition_frame_{n}.txt", of_frame)
    return folder


def import_clip(clip, root):
    "Logs and video → recording: the whole way that raw data takes."
    luma = read_pictures(clip / "clip.yuv", None, WIDTH, HEIGHT).luma
    nodes = contract.read_partition_logs(clip, width=WIDTH, height=HEIGHT)
    return recordings.write_recording(
        root, recordings.RecordingPlan("clip_q80", "clip", sizes=(8, 16, 32)), luma, nodes
    )


def refused(clip, *words, error=ValueError):
    "The import stops with one line that holds the words, and writes nothing."
    root = clip.parent / "raw"
    with pytest.raises(error) as caught:
        import_clip(clip, root)
    message = str(caught.value)
    assert all(word in message for word in words), message
    assert "\n" not in message
    assert not root.exists()


def test_good_clip_keeps_every_block_of_every_frame(clip, tmp_path, pictures, nodes):
    import_clip(clip, tmp_path / "raw")
    blocks, table = recordings.read_recording(tmp_path / "raw", "clip_q80", 16)
    assert set(table["frame"]) == {0, 1} and len(table) == ((nodes["size"] == 16).sum())
    for block, n, r, c in zip(blocks, table["frame"], table["row"], table["col"]):
        assert (block == pictures[n, r : r + 16, c : c + 16]).all()
    assert (table["qindex"] == 80 + table["frame"]).all()


def test_truncated_video(clip):
    video = clip / "clip.yuv"
    video.write_bytes(video.read_bytes()[:-10])
    refused(clip, "clip.yuv", "truncated", "96×64")


def test_truncated_y4m(tmp_path, pictures):
    path = tmp_path / "clip.y4m"
    write_y4m(path, pictures)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(
        ValueError, match=r"clip\.y4m is truncated: frame 1 has 18422 of 18432 bytes"
    ):
        read_pictures(path)


@pytest.mark.parametrize("width, height", [(95, 64), (96, 63)])
def test_wrong_size(clip, width, height):
    with pytest.raises(
        ValueError, match=f"width and height are wrong: .* frames of {width}×{height}"
    ):
        read_pictures(clip / "clip.yuv", None, width, height)


def test_value_above_1023(clip):
    samples = np.fromfile(clip / "clip.yuv", "<u2")
    samples[WIDTH * HEIGHT * 3 // 2 + 2 * WIDTH + 7] = 1024
    samples.tofile(clip / "clip.yuv")
    refused(clip, "clip.yuv", "frame 1", "row 2, column 7", "1024", "0–1023")


@pytest.mark.parametrize(
    "line, words",
    [
        ("0 0 6 0 0 3", ("6 fields instead of 7",)),
        ("0 0 6 0 0 3 80 0", ("8 fields instead of 7",)),
        ("0 0 6 0 zero 3 80", ("'zero' is not an integer", "col_mi")),
        ("0 0 6 0 0 3.0 80", ("'3.0' is not an integer",)),
        ("", None),
        ("0 0 5 0 0 3 80", ("unknown block code 5",)),
        ("0 0 6 2 0 3 80", ("row 8, column 0", "off the grid")),
        ("0 0 6 0 400 3 80", ("column 1600", "outside the 96×64 frame")),
        ("0 0 6 -4 0 3 80", ("row -16", "outside the 96×64 frame")),
        ("0 0 6 0 0 10 80", ("partition type 10", "0–9")),
        ("0 0 6 0 0 -1 80", ("partition type -1", "0–9")),
        ("0 0 3 0 0 9 80", ("partition type 9", "not allow at that size")),
        ("0 0 6 0 0 3 256", ("qindex 256", "0–255")),
        ("0 3 6 0 0 3 80", ("frame type 3",)),
    ],
)
def test_malformed_log_line(clip, tmp_path, line, words):
    log = clip / "partition_frame_0.txt"
    lines = log.read_text().splitlines()
    lines.insert(4, line)
    log.write_text("\n".join(lines) + "\n")
    if words is None:
        import_clip(clip, tmp_path / "raw")  # a blank line means nothing
    else:
        refused(clip, "partition_frame_0.txt, line 5", *words)


def test_empty_and_missing_log(clip):
    (clip / "partition_frame_1.txt").write_text("")
    refused(clip, "partition_frame_1.txt is empty")
    (clip / "partition_frame_1.txt").unlink()
    refused(clip, "no nodes for frame 1")
    (clip / "partition_frame_0.txt").unlink()
    refused(clip, "no partition_frame_<n>.txt", error=FileNotFoundError)


def test_log_whose_first_rows_are_missing_still_matches_its_pixels(clip, tmp_path, pictures):
    "Labels that were matched by column alone were all wrong here, without any error."
    tall = np.concatenate([pictures, pictures[:, ::-1]], axis=1)
    tree = random_tree(WIDTH, 2 * HEIGHT, seed=7).assign(frame=0, order_hint=0, frame_type=0)
    log = tmp_path / "tall" / "partition_frame_0.txt"
    contract.write_partition_log(log, tree[tree["row"] >= HEIGHT])
    nodes = contract.read_partition_logs(log.parent, width=WIDTH, height=2 * HEIGHT)
    recordings.write_recording(
        tmp_path / "raw", recordings.RecordingPlan("tall", sizes=(8, 16)), tall[0], nodes
    )
    blocks, table = recordings.read_recording(tmp_path / "raw", "tall", 8)
    assert len(table) and table["row"].min() >= HEIGHT
    for block, r, c in zip(blocks, table["row"], table["col"]):
        assert (block == tall[0, r : r + 8, c : c + 8]).all()
    wanted = tree[(tree["size"] == 8) & (tree["row"] >= HEIGHT)].sort_values(["row", "col"])
    assert table["type"].tolist() == wanted["type"].tolist()


@pytest.mark.parametrize(
    "what, change",
    [
        ("blocks", lambda data: data[512:]),
        ("labels", lambda data: data + b"0\n"),
        ("qps", lambda data: data.split(b"\n", 1)[1]),
        ("positions", lambda data: data + b"0 0 0\n"),
    ],
)
def test_count_mismatch(clip, tmp_path, what, change):
    root = tmp_path / "raw"
    count = import_clip(clip, root).blocks[16]
    path = root / recordings.block_files("clip_q80", 16)[what]
    path.write_bytes(change(path.read_bytes()))
    now = count + (1 if what in ("labels", "positions") else -1)
    for read in (
        lambda: recordings.read_recording(root, "clip_q80", 16),
        lambda: recordings.merge_recordings(root, "clip", out=tmp_path / "merged"),
    ):
        with pytest.raises(recordings.RecordingError) as caught:
            read()
        assert all(
            word in str(caught.value)
            for word in (f"should have {count} blocks", f"{now} {what} in {path}", f"{count} ")
        )
    with pytest.raises(recordings.RecordingError, match="SHA-256 differs"):
        recordings.verify_recording(root, "clip_q80")
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize(
    "what, line, words",
    [
        ("labels", b"10", "the value is 10; allowed is 0–9"),
        ("qps", b"256", "the value is 256; allowed is 0–255"),
        ("labels", b"x", "'x' is not an integer"),
        ("labels", b"-1", "the value is -1; allowed is 0–9"),
    ],
)
def test_label_above_nine_in_a_recording(clip, tmp_path, what, line, words):
    root = tmp_path / "raw"
    import_clip(clip, root)
    path = root / recordings.block_files("clip_q80", 16)[what]
    lines = path.read_bytes().split(b"\n")
    path.write_bytes(b"\n".join([*lines[:2], line, *lines[3:]]))
    with pytest.raises(ValueError) as caught:
        recordings.read_recording(root, "clip_q80", 16)
    assert f"{path}, line 3: {words}" in str(caught.value)


def test_value_above_1023_in_blocks(clip, tmp_path):
    root = tmp_path / "raw"
    import_clip(clip, root)
    path = root / recordings.block_files("clip_q80", 16)["blocks"]
    data = bytearray(path.read_bytes())
    data[512 + 2 * 17 : 512 + 2 * 18] = (1024).to_bytes(2, "little")
    path.write_bytes(data)
    with pytest.raises(ValueError, match="block 1 has the sample 1024 at row 1, column 1"):
        recordings.read_recording(root, "clip_q80", 16)


def test_block_off_the_grid(pictures):
    with pytest.raises(ValueError, match=r"Block 1 \(16×16 at row 16, column 8\) is off the grid"):
        extract_blocks(pictures[0], np.array([0, 16]), np.array([0, 8]), 16)
    with pytest.raises(
        ValueError,
        match=r"Block 0 \(16×16 at row 64, column 0\) does not lie inside the 96×64 frame",
    ):
        extract_blocks(pictures[0], np.array([64]), np.array([0]), 16)


def test_missing_sheet_and_header_row(tmp_path, nodes):
    path = tmp_path / "clip-intra-0.xlsx"
    contract.write_excel(path, nodes[nodes["frame"] == 0])
    sheets = pd.read_excel(path, sheet_name=None, header=None)
    assert list(sheets) == ["64", "32", "16", "8"]
    # with the first block of every sheet
    assert contract.read_excel(path).equals(nodes[nodes["frame"] == 0])

    def rewrite(sheets):
        with pd.ExcelWriter(path) as writer:
            for name, cells in sheets.items():
                cells.to_excel(writer, sheet_name=name, header=False, index=False)

    rewrite({name: cells for name, cells in sheets.items() if name != "8"})
    with pytest.raises(
        ValueError, match=r"clip-intra-0\.xlsx has no sheet 8; it needs the sheets 64, 32, 16 and 8"
    ):
        contract.read_excel(path)
    names = pd.DataFrame([["row", "col", "type", "qindex", "frame_type", "order_hint"]])
    rewrite(sheets | {"16": pd.concat([names, sheets["16"].astype(object)])})
    with pytest.raises(
        ValueError, match="sheet 16, cell A1: 'row' is not an integer.*no header row"
    ):
        contract.read_excel(path)
    rewrite(
        sheets | {
            "32": (
                sheets["32"]
                .assign(**{"2": 11})
                .set_axis(range(7), axis=1)
                .drop(columns=2)[[0, 1, 6, 3, 4, 5]]
            )
        }
    )
    with pytest.raises(
        ValueError, match="sheet 32, row 1: .* has the partition type 11; allowed is 0–9"
    ):
        contract.read_excel(path)


@pytest.mark.parametrize("limit", [0, 100, 1000, 3000, 8000, 20000])
def test_full_disk_leaves_nothing(clip, tmp_path, limit):
    with disk_of(limit):
        refused(
            clip, "could not be written", "Nothing of it was kept", "free some space", error=OSError
        )
    assert snapshot(tmp_path).keys() == {"clip", *(f"clip/{p.name}" for p in clip.iterdir())}


def test_full_disk_leaves_an_older_recording_whole(clip, tmp_path, pictures, nodes):
    root = tmp_path / "raw"
    import_clip(clip, root)
    before = snapshot(root)
    for limit in (0, 300, 1000, 3000):
        with disk_of(limit), pytest.raises(OSError, match="could not be written"):
            recordings.write_recording(
                root,
                recordings.RecordingPlan("clip_q80", "clip", sizes=(8, 16, 32)),
                pictures,
                nodes.assign(qindex=99),
            )
        assert snapshot(root) == before
    recordings.verify_recording(root, "clip_q80")


@pytest.mark.parametrize("call", range(1, 60, 4))
def test_failing_move_leaves_everything_as_it_was(
    clip, tmp_path, pictures, nodes, monkeypatch, call
):
    root = tmp_path / "raw"
    import_clip(clip, root)
    before, replace, calls = snapshot(root), os.replace, []

    def failing(source, target):
        calls.append(target)
        if len(calls) == call:
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", failing)
    try:
        recordings.write_recording(
            root,
            recordings.RecordingPlan("clip_q80", "clip", sizes=(8, 16, 32)),
            pictures,
            nodes.assign(qindex=99),
        )
    except OSError:
        assert snapshot(root) == before
    else:
        assert len(calls) < call
    monkeypatch.undo()
    recordings.verify_recording(root, "clip_q80")


@pytest.mark.parametrize(
    "write",
    [
        "write_partition_log(folder/'partition_frame_0.txt', nodes)",
        "write_excel(folder/'a-intra-0.xlsx', nodes)",
        "write_yuv(folder/'a.yuv', luma)",
        "write_y4m(folder/'a.y4m', luma)",
    ],
)
def test_full_disk_in_every_writer(tmp_path, write):
    "In a process of its own, in which nothing else is limited."
    code = f"""
        import pathlib, resource, numpy as np
        from av1nb.partitions import random_tree
        from av1nb.contract import write_excel, write_partition_log
        from av1nb.pictures import write_y4m, write_yuv
        folder = pathlib.Path({str(tmp_path/'out')!r})
        luma = np.zeros((2, 64, 96), np.uint16)
        nodes = random_tree(640, 480).assign(frame=0, order_hint=0, frame_type=0)
        resource.setrlimit(resource.RLIMIT_FSIZE, (500, 500))
        {write}
    """
    done = subprocess.run(
        [sys.executable, "-B", "-c", textwrap.dedent(code)], capture_output=True, text=True
    )
    assert (
        done.returncode == 1
        and "could not be written: File too large. Nothing of it was kept"
        in done.stderr.splitlines()[-1]
    )
    assert not (tmp_path / "out").exists()
