"""`av1nb evaluate` on small encoded streams: the shipped network, weights of one's own, a cascade;
odd sizes, several quantisers in a frame, frames that are predicted from others.
"""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from typer.testing import CliRunner

from av1nb import heads, joint, pictures
from av1nb.cli import app
from av1nb.encoding import encode
from av1nb.partitions import LARGE_LEVELS, V6, is_inside
from av1nb.streams import read_trees


def film(width, height, frames):
    "Frames of 10-bit texture that moves, coarse on one side and fine on the other."
    rows, cols = np.mgrid[0:height, 0:width]
    noise = np.random.default_rng(42).integers(-60, 60, (height, width))
    wave = [np.sin(rows / 9 + n) * np.cos(cols**1.4 / 25 + n) for n in range(frames)]
    lumas = [(512 + 300 * w + noise * (cols > width // 2)).astype(np.uint16) for w in wave]
    chroma = np.full(((height + 1) // 2, (width + 1) // 2), 512, np.uint16)
    return [(luma, chroma, chroma) for luma in lumas]


@pytest.fixture(scope="module")
def streams(tmp_path_factory):
    """Folder with `film.y4m` (150×94, three frames) and two streams of it: `odd.ivf`, all intra,
    with several quantisers in each frame, and `inter.ivf`, with one key frame and superblocks of 128.
    """
    folder, planes = tmp_path_factory.mktemp("streams"), film(150, 94, 3)
    pictures.write_y4m(folder / "film.y4m", planes)
    for name, settings in (
        ("odd", dict(cq_level=30, options={"deltaq-mode": 3, "sb-size": 64})),
        ("inter", dict(mode="good", options={"kf-max-dist": 99, "sb-size": 128})),
    ):
        encode(planes, folder / f"{name}.ivf", cpu_used=5, **settings)
    return folder


@pytest.fixture(scope="module")
def cascade_run(tmp_path_factory):
    "A run directory with the networks of a cascade that has not been trained."
    run = tmp_path_factory.mktemp("runs") / "cascade"
    (run / "models").mkdir(parents=True)
    (run / "reports").mkdir()
    torch.manual_seed(42)
    for stage in V6.stage_names:
        model = heads.build_model("v6", stage, "v5")
        content = {"model_state_dict": model.state_dict(), **model.identity(), "split_hash": "abc"}
        name = heads.checkpoint_prefix("v6", stage)
        torch.save(content, run / f"models/{name}_model_best.pt")
    settings = {"split_hash": "abc", "vote": "soft", "thresholds": {"stage1": 0.4}}
    (run / "reports/thresholds.json").write_text(json.dumps(settings))
    return run


def evaluate(*arguments, code=0):
    "What the command says; its exit status is checked."
    done = CliRunner().invoke(app, ["evaluate", *map(str, arguments)])
    assert done.exit_code == code, done.output
    return done.output


def coded(stream):
    "Nodes of the intra frames of a stream that lie inside them."
    frames = [frame for frame in read_trees(stream) if frame.frame_type == 0]
    nodes = pd.concat([f.nodes()[is_inside(f.nodes(), f.width, f.height)] for f in frames])
    return nodes


def test_shipped_network_against_a_stream_with_several_quantisers(streams, tmp_path):
    stream, out = streams / "odd.ivf", tmp_path / "e.json"
    said = evaluate(stream, "--video", streams / "film.y4m", "--out", out)
    nodes, report = coded(stream), json.loads(out.read_text())
    assert nodes["qindex"].nunique() > 1
    assert (report["frames"], report["nodes"]) == (3, len(nodes))
    assert report["beyond_frame"] > 0 and f"{report['beyond_frame']} that reach beyond" in said
    assert (
        "network that comes with av1nb" in report["network"] and "as stored" in report["pictures"]
    )
    rows = {(row["size"], row["qindex"]): row for row in report["levels"]}
    for size, qindex in rows:
        own = nodes[nodes["size"] == size]
        own = own if qindex == "all" else own[own["qindex"] == qindex]
        shares = own["type"].value_counts(normalize=True)
        row = rows[size, qindex]
        assert row["nodes"] == len(own) == np.sum(row["confusion"])
        assert row["majority"]["accuracy"] == pytest.approx(shares.max())
        assert row["majority"]["nll"] == pytest.approx(-(shares * np.log(shares)).sum())
        assert row["accuracy"] <= row["top_2"] <= row["top_3"] <= 1
    assert {size for size, _ in rows} == set(nodes["size"])
    assert {q for _, q in rows} == {"all", *nodes["qindex"].unique()}
    # the network's own maps, node by node, for one frame at one quantiser
    predictor = joint.JointPredictor.load()
    frame = next(joint.intra_frames(stream, streams / "film.y4m"))
    qindex = int(frame.nodes()["qindex"].mode()[0])
    own = frame.nodes()[is_inside(frame.nodes(), 150, 94)].query("qindex == @qindex and size == 16")
    maps = predictor.maps(frame.luma, qindex)[16]
    decided, p = joint.node_answers(predictor, frame.luma, own)
    for node, answer, row in zip(own.itertuples(), decided, p):
        assert (row == maps[node.row // 16, node.col // 16]).all() and answer == row.argmax()
    assert out.with_suffix(".png").stat().st_size > 10_000


def test_decoded_pictures_weights_and_few_frames(streams, tmp_path):
    stream, out = streams / "odd.ivf", tmp_path / "e.json"
    weights = tmp_path / "own.pt"
    weights.write_bytes(joint.shipped_weights().read_bytes())
    said = evaluate(stream, "--weights", weights, "--frames", 1, "--out", out)
    report = json.loads(out.read_text())
    assert report["frames"] == 1 and str(weights) in report["network"]
    assert "the decoded pictures of" in said and "--video" in said
    # a joint run without a cascade
    run = tmp_path / "run"
    (run / "models").mkdir(parents=True)
    (run / "models/joint_model_best.pt").write_bytes(weights.read_bytes())
    evaluate(stream, "--run-dir", run, "--frames", 1, "--out", tmp_path / "r.json")
    assert json.loads((tmp_path / "r.json").read_text())["levels"] == report["levels"]


def test_cascade_answers_at_16(streams, cascade_run, tmp_path):
    stream, out = streams / "odd.ivf", tmp_path / "e.json"
    said = evaluate(stream, "--run-dir", cascade_run, "--out", out)
    report = json.loads(out.read_text())
    assert "the cascade v6" in said and {row["size"] for row in report["levels"]} == {16}
    assert report["nodes"] == (coded(stream)["size"] == 16).sum()
    assert out.with_suffix(".png").stat().st_size > 10_000


def test_key_frame_among_others_and_large_superblocks(streams, tmp_path):
    stream, out = streams / "inter.ivf", tmp_path / "e.json"
    said = evaluate(stream, "--out", out)
    report = json.loads(out.read_text())
    assert report["frames"] == 1 and report["nodes"] == len(coded(stream))
    assert report["larger"] == 0 and "which no network here answers" not in said
    assert {row["size"] for row in report["levels"]} <= set(LARGE_LEVELS)
    assert report["beyond_frame"] >= 2  # both superblocks of 128 are among them


def test_what_cannot_be_answered_is_said_in_one_sentence(streams, cascade_run, tmp_path):
    out = ("--out", tmp_path / "e.json")
    content = (streams / "inter.ivf").read_bytes()
    key = 32 + 12 + int.from_bytes(content[32:36], "little")
    (tmp_path / "no_key.ivf").write_bytes(content[:32] + content[key:])
    short, other = tmp_path / "short.y4m", tmp_path / "other.y4m"
    pictures.write_y4m(short, film(150, 94, 1))
    pictures.write_y4m(other, film(96, 64, 3))
    encode(film(12, 12, 1), tmp_path / "tiny.ivf", cpu_used=6)
    for arguments, reason in (
        ([tmp_path / "no_key.ivf"], "no_key.ivf"),
        ([streams / "odd.ivf", "--video", short], "ends before frame 1"),
        ([streams / "odd.ivf", "--video", other], "150×94 pixels, but its picture 96×64"),
        ([streams / "film.y4m"], "film.y4m"),
        ([tmp_path / "tiny.ivf", "--run-dir", cascade_run], "no node of 16×16 wholly inside"),
        ([streams / "odd.ivf", "--run-dir", tmp_path], "007_optimize_thresholds makes it"),
    ):
        said = evaluate(*arguments, *out, code=1)
        assert reason in said.splitlines()[-1] and "Traceback" not in said, said
        assert not out[1].exists()
