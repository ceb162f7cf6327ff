"""Whole frames are searched, and what types cost teaches networks: the stages build_searches,
build_steering and 015_ablation on a few small drawings.
"""

from dataclasses import replace

import pytest

from av1nb import joint, material, runs
from av1nb.costs import read_logs, read_searched


@pytest.fixture(scope="module")
def drawings(tmp_path_factory):
    "A set of small drawings: two groups to learn from, one to validate, one to test."
    folder = tmp_path_factory.mktemp("drawings")
    drawn = material.plan_frames([], drawings=24, further=False)
    drawn = [plan for plan in drawn if plan.material == "screen"]
    plans = []
    for split, count in dict(train=2, val=1, test=1).items():
        own = [plan for plan in drawn if plan.split == split][:count]
        assert len(own) == count
        encode = dict(mode="allintra", cpu_used=6, qindex=120, superblock=64)
        plans += [replace(plan, size=(256, 256), encodes=(encode,)) for plan in own]
    material.build_material(plans, folder / "files", folder / "set", jobs=1)
    groups = {s: [plan.group for plan in plans if plan.split == s] for s in ("train", "test")}
    return folder / "set", groups


def test_searches_teach_the_network_that_steers(encoder, drawings, tmp_path):
    folder, groups = drawings
    held_out, learned = groups["train"]
    run, places = tmp_path / "run", dict(folder=str(folder), seed=1)
    searches, weights = tmp_path / "searches", tmp_path / "light.pt"
    told = dict(out=str(searches), thrice=[held_out], cpu_used=5)
    runs.run_notebooks(["build_searches"], run, places, {"build_searches": told}, quiet=True)
    frames = material.load_material(folder)
    for frame in frames:
        assert list(read_logs(searches, frame.frame_name)) == [120]
        assert len(read_searched(searches, frame.frame_name)) == (frame.name != learned)

    told = dict(
        searches=str(searches),
        out=str(weights),
        held_out=[held_out],
        tested=groups["test"],
        epochs=1,
        widths=[16] * 4,
    )
    runs.run_notebooks(["build_steering"], run, places, {"build_steering": told}, quiet=True)
    predictor = joint.JointPredictor.load(weights)
    assert set(predictor.maps(frames[0].luma[0], 120)) == {64, 32, 16, 8}
    _, content = joint.JointModel.load(weights)
    assert content["provenance"]["held_out"] == [held_out]


def test_searches_of_one_mode_are_none_of_another(encoder, drawings, tmp_path):
    folder, groups = drawings
    run, places, searches = tmp_path / "run", dict(folder=str(folder), seed=1), tmp_path / "good"
    held_out = groups["train"][0]
    told = dict(out=str(searches), thrice=[held_out], only_thrice=True, mode="good", cpu_used=5)
    told["per_material"] = {"train": 2}
    runs.run_notebooks(["build_searches"], run, places, {"build_searches": told}, quiet=True)
    [frame] = [one for one in material.load_material(folder) if one.name == held_out]
    [found] = read_searched(searches, frame.frame_name).values()
    assert (found.mode, found.cpu_used) == ("good", 5)

    told = dict(told, mode="allintra")
    with pytest.raises(runs.RunError, match="was recorded with mode good, not mode allintra"):
        runs.run_notebooks(["build_searches"], run, places, {"build_searches": told}, quiet=True)
    told = dict(searches=str(searches), calibrated=[held_out], tested=groups["test"])
    told |= dict(work=str(tmp_path / "work"), out=str(tmp_path / "out"), folder=str(folder))
    with pytest.raises(runs.RunError, match="holds searches of speed 5 of mode good, not of"):
        runs.run_notebooks(["014_promises"], run, {}, {"014_promises": told}, quiet=True)
    assert not list((tmp_path / "out").iterdir())


def test_an_arm_is_compared_with_all(encoder, drawings, tmp_path):
    folder, _ = drawings
    run = tmp_path / "run"
    told = dict(folder=str(folder), searches="", seeds=[1, 2], crops=32)
    both = dict(told, arms=["all", "busy places"])
    runs.run_notebooks(["015_ablation"], run, {}, {"015_ablation": both}, quiet=True)
    report = runs.read_json(run / "reports/ablation.json")
    assert {row["arm"] for row in report["differences"]} == {"busy places"}
    assert all(row["accuracy_least"] <= row["accuracy_most"] for row in report["differences"])
    with pytest.raises(runs.RunError, match="there is no arm nothing"):
        runs.run_notebooks(
            ["015_ablation"], run, {}, {"015_ablation": dict(told, arms=["nothing"])}, quiet=True
        )
