"""The closed loop as a user meets it: `av1nb encode` on a video, the costs that networks learn
from, and the stage that learns from them.
"""

import json
import re
import shutil

import av
import numpy as np
import pytest
from conftest import av1nb

from av1nb import costs, encoding, joint, steering, tradeoff
from av1nb.files import sha256
from av1nb.partitions import LEVELS
from av1nb.pictures import read_pictures
from av1nb.sample import load_sample
from av1nb.streams import read_trees


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    "Two frames of a picture of the sample, 10 bits, in an MKV without loss."
    path = tmp_path_factory.mktemp("video") / "coins.mkv"
    luma = load_sample(["coins"])[0].luma[0][:128, :192]
    with av.open(str(path), "w") as container:
        track = container.add_stream("ffv1", 25, width=192, height=128, pix_fmt="yuv420p10le")
        for picture in (luma, luma[:, ::-1]):
            frame = av.VideoFrame(192, 128, "yuv420p10le")
            for plane, values in zip(
                frame.planes, (picture, *2 * (np.full((64, 96), 512, np.uint16),))
            ):
                buffer = np.zeros((plane.height, plane.line_size // 2), np.uint16)
                buffer[:, : plane.width] = values
                plane.update(buffer)
            container.mux(track.encode(frame))
        container.mux(track.encode())
    return path, luma


def test_a_video_is_encoded_faster_and_decodes(encoder, video, tmp_path):
    path, luma = video
    said = av1nb(
        "encode",
        path,
        "--out",
        tmp_path / "out.ivf",
        "--speed",
        "4",
        "--budget",
        "3",
        "--cq-level",
        "43",
    ).stdout
    assert (
        "2 frames of 192×128" in said and "saved, prediction included" in said and "stock" in said
    )
    trees = list(read_trees(tmp_path / "out.ivf"))
    assert [(t.width, t.height, *np.unique(t.nodes()["qindex"])) for t in trees] == [
        (192, 128, 172)
    ] * 2
    assert 10 * np.log10(1023**2 / ((trees[0].luma.astype(float) - luma) ** 2).mean()) > 28
    saved = float(re.search(r"(-?[\d.]+)% of the stock encoder's time saved", said)[1])
    assert saved < 100 and (tmp_path / "out.ivf").stat().st_size > 100


def test_a_time_chooses_preset_and_masks(encoder, video, tmp_path):
    said = av1nb("encode", video[0], "--out", tmp_path / "out.ivf", "--time", "0.5").stdout
    found = re.search(
        r"for 0\.5 of the time of speed 1: speed (\d) with.*: about ([\d.]+) of", said
    )
    assert 0 <= int(found[1]) <= 6 and float(found[2]) <= 0.5
    assert len(list(read_trees(tmp_path / "out.ivf"))) == 2


def test_a_fast_preset_encodes_without_masks_and_says_so(encoder, video, tmp_path):
    said = av1nb("encode", video[0], "--out", tmp_path / "out.ivf", "--speed", 6).stdout
    assert "no masks at speed 6" in said and "saved" not in said
    trees = list(read_trees(tmp_path / "out.ivf"))
    assert len(trees) == 2 and (trees[0].width, trees[0].height) == (192, 128)


@pytest.mark.parametrize("mode", encoding.MODES)
def test_the_promise_is_that_of_the_network_and_the_library_that_ship(mode):
    models, facts = costs.load_decisions(steering.shipped_decisions(mode), mode)
    assert facts["network"] == sha256(steering.shipped_weights().read_bytes())[:16]
    assert facts["libaom"] == steering.RELEASE
    promises = tradeoff.read_promises(facts)
    assert set(promises) <= set(models) and set(promises) <= {int(p) for p in facts["presets"]}
    for promise in promises.values():
        assert len(set(promise.groups)) >= tradeoff.groups_needed(0.1)
        assert "at most 2 % on 90% of frames" in tradeoff.promise_sentence(promise, 2.0)


def test_good_quality_has_models_of_its_own(encoder, video, tmp_path):
    own, _ = costs.load_decisions(steering.shipped_decisions("good"), "good")
    asked = ("encode", video[0], "--mode", "good", "--frames", 1, "--no-compare", "--out")
    said = av1nb(*asked, tmp_path / "good.ivf", "--time", 0.6).stdout
    assert re.search(r"for 0\.6 of the time of speed 1: speed \d with", said)
    assert 2 not in own
    said = av1nb(*asked, tmp_path / "two.ivf", "--speed", 2).stdout
    assert "no masks at speed 2 of mode good: there are no models of it" in said
    planes = read_pictures(video[0], 1).planes
    sizes = [
        len(steering.encode_masked(planes, mode=mode, cpu_used=2, cq_level=32).ivf)
        for mode in encoding.MODES
    ]
    assert (tmp_path / "two.ivf").stat().st_size == sizes[1] != sizes[0]


def test_loading_is_told_apart_from_prediction(encoder, video, tmp_path):
    said = av1nb("encode", video[0], "--out", tmp_path / "out.ivf", "--no-compare").stdout
    without, with_it, loading = map(
        float,
        re.search(
            r"([\d.]+) s without loading, ([\d.]+) s with it: .* took ([\d.]+) s, once", said
        ).groups(),
    )
    assert "saved" not in said and abs(with_it - without - loading) < 0.02 < loading


def test_a_second_encode_of_the_size_waits_for_nothing(video):
    predictor = joint.JointPredictor.load(steering.wide_weights())
    assert predictor.warm_up(192, 128, 172) > 0 == predictor.warm_up(192, 128, 172)
    policy, _, _ = steering.policy_for(1.0, 1)
    steering.predict_masks(predictor, [video[1]], 128, policy)
    assert predictor.warm_up(192, 128, 128) == 0 < predictor.warm_up(128, 192, 128)


@pytest.mark.parametrize(
    "options, message",
    [
        (("--budget", "-50"), "keeps a BD-rate of -50 %"),
        (("--time", "0.0001"), "No preset takes 0.0001 of the time"),
        (("--time", "0.5", "--speed", "4"), "leave out --speed"),
        (("--mode", "good", "--weights", "x.pt"), "leave out --weights and --policies"),
        (("--mode", "lossless"), "mode is 'lossless'"),
        (("--policies", "setup.py"), "setup.py is damaged or no JSON"),
        (("--weights", "nothing.pt"), "nothing.pt"),
        (("--speed", "7"), "cpu_used is 7; it must be a whole number from 0 to 6"),
        (("--speed", "6", "--all-quantisers"), "there are no masks at speed 6"),
        (("--speed", "2", "--policies", "POLICIES"), "no tuned policies for speed 2"),
    ],
)
def test_what_cannot_be_done_is_said_and_leaves_nothing(encoder, video, tmp_path, options, message):
    steering.save_policies({}, tmp_path / "p.json")
    options = [str(tmp_path / "p.json") if o == "POLICIES" else o for o in options]
    (tmp_path / "out").mkdir()
    done = av1nb("encode", video[0], "--out", tmp_path / "out/x.ivf", *options, check=False)
    assert (
        done.returncode == 1
        and message in done.stderr + done.stdout
        and "Traceback" not in done.stderr
    )
    assert not list((tmp_path / "out").iterdir())


def test_without_the_library_no_stock_encode_takes_its_place(video, tmp_path):
    done = av1nb(
        "encode",
        video[0],
        "--out",
        tmp_path / "x.ivf",
        check=False,
        AV1NB_CACHE=str(tmp_path),
        AV1NB_ENCODER="",
    )
    assert (
        done.returncode == 1 and "make encoder" in done.stderr and not (tmp_path / "x.ivf").exists()
    )


def test_the_shipped_network_and_policies_belong_together():
    content = json.loads(steering.shipped_policies().read_text(encoding="utf-8"))
    predictor = joint.JointPredictor.load(steering.wide_weights(), content["split_hash"])
    luma = load_sample(["coins"])[0].luma[0]
    assert set(content["speeds"]) == set("01234")
    for speed in map(int, content["speeds"]):
        shares = []
        for budget in (1.0, 3.0, 10.0):
            policy, time, _ = steering.policy_for(budget, speed)
            masks, _ = steering.predict_masks(predictor, [luma], 128, policy)
            words = [masks.at(size)[masks.at(size) != 0] for size in LEVELS]
            shares.append(
                (time, np.concatenate([np.bitwise_count(w & 0x3FF) for w in words]).mean())
            )
        assert shares == sorted(shares, reverse=True)  # a larger budget tries less
    assert (
        max(w.stat().st_size for w in (steering.shipped_weights(), steering.wide_weights())) < 6e6
        and steering.shipped_policies().with_name("CARD.md").is_file()
    )


def test_a_network_learns_from_recorded_costs(encoder, tmp_path):
    """Two small sequences: their costs are recorded once, and the stage trains and reports regret
    on them.
    """
    from av1nb import runs

    names = ["ascent", "brick", "camera", "coffee", "coins", "text"]
    run = runs.RunDirectory(tmp_path / "run")
    runs.run_notebooks(
        ["000_raw", "001_prepare_dataset"],
        run,
        {"seed": 1},
        {
            "000_raw": {"pictures": names, "excel": False},
            "001_prepare_dataset": {"fractions": [0.5, 0.25, 0.25]},
        },
        quiet=True,
    )
    placed = runs.read_json(run / "dataset/block_16/metadata.json")["assignment"]
    for name in names:
        [picture] = load_sample([name])
        luma = np.zeros_like(picture.luma)  # costs of a corner are enough, the rest has none
        steering.record_costs(
            [luma[0, :64, :64] + picture.luma[0, :64, :64]],
            tmp_path / "costs" / name,
            (172,),
            cpu_used=5,
        )
    runs.run_notebooks(
        ["011_regret"],
        run,
        {"seed": 1},
        {"011_regret": {"costs": str(tmp_path / "costs"), "epochs": 1}},
        quiet=True,
    )
    found = runs.read_json(run / "reports/regret.json")
    assert {row["size"] for row in found["regret"]} == set(LEVELS) and all(
        row["regret"] >= 0 for row in found["regret"]
    )
    assert {row["qindex"] for row in found["regret"]} == {"all", 172}
    _, content = joint.JointModel.load(run / "models/regret_model_best.pt")
    assert content["provenance"]["objective"]["temperature"] == 0.005
    with pytest.raises(runs.RunError, match="capture='graph' needs a CUDA device"):
        runs.run_notebooks(
            ["011_regret"],
            run,
            {"seed": 1, "device": "cpu", "capture": "graph", "name": "captured"},
            {"011_regret": {"costs": str(tmp_path / "costs"), "epochs": 1}},
            quiet=True,
        )
    shutil.rmtree(tmp_path / "costs")
    with pytest.raises(runs.RunError, match="make them with build_costs"):
        runs.run_notebooks(
            ["011_regret"],
            run,
            {"seed": 1},
            {"011_regret": {"costs": str(tmp_path / "costs"), "epochs": 1}},
            quiet=True,
        )
