"""Types that class and preset rule out, on streams of libaom; `av1nb evaluate` on a folder of
streams.
"""

import json

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from av1nb.cli import app
from av1nb.encoding import encode
from av1nb.partitions import PartitionType, encoder_limits, is_inside
from av1nb.pictures import write_y4m
from av1nb.streams import read_trees


def picture(lines, bits, seed=0):
    "A square frame that is grey but for one corner of rectangles, edges and noise."
    rng = np.random.default_rng(seed)
    top, luma = (1 << bits) - 1, np.full((lines, lines), 0.42)
    for _ in range(120):
        height, width = 2 ** rng.integers(2, 6, 2)
        row, col = rng.integers(0, 96, 2)
        luma[row : row + height, col : col + width] = rng.random()
    luma[:128, :128] += rng.normal(0, 0.01, (128, 128))
    chroma = np.full(((lines + 1) // 2,) * 2, 1 << bits - 1, np.uint16)
    luma = np.rint(np.clip(luma, 0, 1) * (219 * top / 255) + 16 * top / 255)
    return [(luma.astype(np.uint16), chroma, chroma)]


@pytest.mark.parametrize(
    "lines, mode, preset, sb_size, bits, cq_level",
    [
        (200, "allintra", 1, 64, 10, 30),
        (200, "good", 2, 128, 8, 40),
        (200, "allintra", 5, 64, 8, 20),
        (200, "allintra", 6, 128, 10, 12),
        (480, "good", 4, 64, 10, 50),
        (480, "allintra", 6, 64, 8, 30),
        (720, "allintra", 5, 128, 10, 40),
        (1080, "allintra", 6, 64, 8, 50),
        (2160, "allintra", 4, 128, 8, 40),
    ],
)
def test_no_coded_node_has_a_type_that_is_ruled_out(
    tmp_path, lines, mode, preset, sb_size, bits, cq_level
):
    made = dict(mode=mode, cpu_used=preset, bit_depth=bits, cq_level=cq_level)
    encode(picture(lines, bits), tmp_path / "s.ivf", **made, options={"sb-size": sb_size})
    [frame] = read_trees(tmp_path / "s.ivf", luma=False)
    nodes = frame.nodes()[is_inside(frame.nodes(), lines, lines)]
    limits = encoder_limits(lines, lines, preset, mode, sb_size, frame.base_qindex)
    seen = {size: set(own["type"]) for size, own in nodes.groupby("size")}
    assert set(seen) <= set(limits)
    for size, types in seen.items():
        ruled_out = [PartitionType(t).name for t in types - set(limits[size])]
        assert not ruled_out, f"{size}×{size}: {ruled_out}"
    # the rule is no empty one: where it leaves a choice, more than one type is seen at 16×16
    assert len(seen[16]) > 1 or len(limits[16]) == 1


def evaluate(*arguments, code=0):
    "What the command says; its exit status is checked."
    done = CliRunner().invoke(app, ["evaluate", *map(str, arguments)])
    assert done.exit_code == code, done.output
    return done.output


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "Streams of two materials, one of them torn, and the source of one."
    root = tmp_path_factory.mktemp("folder")
    for number, name in enumerate(("film/one_q30", "film/two", "screen/three")):
        planes = picture(130, 10, number)
        (root / "streams" / name).parent.mkdir(parents=True, exist_ok=True)
        encode(
            planes,
            root / "streams" / f"{name}.ivf",
            cpu_used=5,
            cq_level=30,
            options={"sb-size": 128},
        )
        if number == 0:
            write_y4m(root / "sources/film/one.y4m", planes)
    torn = (root / "streams/film/two.ivf").read_bytes()[:300]
    (root / "streams/film/torn.ivf").write_bytes(torn)
    return root


def test_a_folder_gives_one_table_and_names_what_is_broken(folder, tmp_path):
    out = tmp_path / "e.json"
    given = ("--video", folder / "sources", "--cpu-used", 5, "--out", out)
    said = evaluate(folder / "streams", *given, code=1)
    assert "1 streams could not be read" in said and "film/torn.ivf: " in said
    assert "mode allintra at preset 5" in said and "2 of them are seen as the decoder shows" in said
    report, table = json.loads(out.read_text()), pd.read_csv(out.with_suffix(".csv"))
    assert list(report["broken"]) == ["film/torn.ivf"]
    assert set(table["material"]) == {"all", "film", "screen"} and set(table["preset"]) == {
        "all",
        "5",
    }
    assert len(table) == len(report["rows"])
    rows = {(row["material"], row["size"]): row for row in report["rows"]}
    nodes = {"film": [], "screen": []}
    for stream in sorted((folder / "streams").rglob("*.ivf")):
        if stream.stem != "torn":
            [frame] = read_trees(stream, luma=False)
            nodes[stream.parent.name].append(frame.nodes()[is_inside(frame.nodes(), 130, 130)])
    for material, tables in nodes.items():
        coded = pd.concat(tables)
        for size, own in coded.groupby("size"):
            row = rows[material, size]
            assert row["nodes"] == len(own)
            assert row["majority"] == pytest.approx(own["type"].value_counts(normalize=True).max())
            assert row["answered"] == len(own) and row["against_rules"] == 0
            assert 0 <= row.get("repeat", 0) <= 1
    assert rows["film", 16]["pictures"] == "decoded and source" and rows["film", 16]["repeat"] > 0
    assert rows["screen", 16]["sequences"] == 1 and "accuracy_low" not in rows["screen", 16]
    assert 0 <= rows["film", 128]["accuracy"] <= 1 and "not answered" not in said


def test_a_folder_without_repetition_and_with_two_networks(folder, tmp_path):
    from av1nb.joint import shipped_weights

    weights = tmp_path / "own.pt"
    weights.write_bytes(shipped_weights().read_bytes())
    asked = ("--weights", weights, "--weights", shipped_weights())
    said = evaluate(folder / "streams/screen", *asked, "--no-repeat", "--out", tmp_path / "e.json")
    assert "no repeat rate" in said and "share [" not in said
    report = json.loads((tmp_path / "e.json").read_text())
    assert len(report["networks"]) == 2
    assert all(row["networks"] == 2 and row.get("accuracy_sd", 0) == 0 for row in report["rows"])
    assert {row["material"] for row in report["rows"]} == {"screen"}
    # a wrong preset is found out where the coded types contradict it
    (tmp_path / "other").mkdir()
    encode(picture(130, 10), tmp_path / "other/s.ivf", cpu_used=3)
    said = evaluate(
        tmp_path / "other", "--no-repeat", "--cpu-used", 6, "--out", tmp_path / "f.json"
    )
    assert "rule out under these conditions" in said


def test_what_cannot_be_done_is_said_in_one_sentence(folder, tmp_path):
    stream = folder / "streams/film/two.ivf"
    for arguments, reason in (
        ([tmp_path], "has no file that ends in .ivf"),
        ([folder / "streams", "--mode", "realtime"], "mode is 'realtime'"),
        ([folder / "streams", "--video", folder / "none"], "there is no file"),
        ([stream, "--weights", "a.pt", "--weights", "b.pt"], "a.pt"),
    ):
        said = evaluate(*arguments, "--out", tmp_path / "e.json", code=1)
        assert reason in said.splitlines()[-1] and "Traceback" not in said, said
        assert not (tmp_path / "e.json").exists()
