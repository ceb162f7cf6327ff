"""What is imported when: training and inference need five packages, and help needs none of them."""

import dataclasses
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# what a machine that only trains and predicts need not have
ABSENT = (
    "PIL",
    "accelerate",
    "av",
    "bjontegaard",
    "imagecodecs",
    "llvmlite",
    "matplotlib",
    "nbformat",
    "numba",
    "openpyxl",
    "papermill",
    "seaborn",
    "skimage",
    "torchvision",
    "tqdm",
    "typer",
    "yaml",
)
# what must not stand between a user and the help
SLOW = ("torch", "numpy", "pandas", "scipy", "sklearn", *ABSENT)

HIDE = """
import sys

class Without:
    "A finder of modules that does not find some packages, as where they are not installed."

    def __init__(self, finder):
        self.finder = finder

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, path=None, target=None):
        absent = name.partition(".")[0] in {absent}
        return None if absent else self.finder.find_spec(name, path, target)

sys.meta_path[:] = map(Without, sys.meta_path)
"""


def in_new_process(code, absent=()):
    "Standard output of Python code, run where packages are absent; its errors fail the test."
    done = subprocess.run(
        [sys.executable, "-c", HIDE.format(absent=set(absent)) + textwrap.dedent(code)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout, done.stderr


def test_training_and_prediction_need_five_packages():
    """Every room of training and inference is imported, blocks are cut, a tiny joint network and a
    tiny stage of v6 take two steps, and both predict.
    """
    said, warned = in_new_process(
        """
        import tempfile
        import numpy as np
        import pandas as pd
        import torch
        from types import SimpleNamespace

        import av1nb.datasets, av1nb.frames, av1nb.joint, av1nb.metrics
        import av1nb.pipeline, av1nb.recipes, av1nb.training
        from av1nb import blocks, datasets, frames, heads, joint, pipeline, recipes
        from av1nb.partitions import LEVELS, V6, random_tree

        rng = np.random.default_rng(42)

        def picture(name):
            nodes = random_tree(128, 128, seed=len(name)).assign(frame=0, qindex=80, frame_type=0)
            luma = rng.integers(0, 1024, (1, 128, 128), dtype=np.uint16)
            return SimpleNamespace(name=name, luma=luma, nodes={80: nodes})

        one = picture("one")
        sets = [frames.FrameSet([one], side=64), frames.FrameSet([picture("second")], side=64)]
        tiny = dict(widths=(16, 16, 16, 16), depths=(0, 1, 1, 1))
        with tempfile.TemporaryDirectory() as folder:
            network, history = joint.train_joint(
                *sets,
                folder,
                {"split_hash": "tiny"},
                joint.joint_config("cpu", epochs=1, batch_size=2),
                **tiny,
            )
        predictor = joint.JointPredictor(network)
        tree = joint.tree_table(predictor, one.luma, 80)
        assert set(tree["size"]) <= set(LEVELS) and len(tree) >= 4

        places = one.nodes[80].query("size == 16")
        cut = blocks.extract_blocks(one.luma[0], places["row"], places["col"], 16)
        row, col = places[["row", "col"]].iloc[0]
        assert (cut[0] == one.luma[0][row : row + 16, col : col + 16]).all()
        def block_set(split, count):
            numbers, zeros = torch.arange(count), torch.zeros(count, dtype=torch.int64)
            return datasets.BlockSet(
                samples=torch.from_numpy(np.resize(cut, (count, 16, 16))[:, None]),
                types=numbers % 3,
                qindex=zeros + 80,
                sequence=zeros,
                recording=zeros,
                frame=zeros,
                row=zeros,
                col=numbers * 16,
                sequence_names=(split,),
                recording_names=(split,),
                split=split,
                assignment={"train": "train", "val": "val"},
            )

        sets = {"train": block_set("train", 8), "val": block_set("val", 6)}
        recipe = recipes.recipe_for("v6", "stage1", epochs=1, batch_size=4)
        data = recipes.stage_data(None, "v6", "stage1", sets=sets)
        with tempfile.TemporaryDirectory() as folder:
            stage, epochs = recipes.train_stage(
                data, "v6", "stage1", recipe, folder, device="cpu", progress=False
            )
            assert isinstance(stage.backbone, av1nb.backbones.ResNet18Blocks)
        models = {name: heads.build_model("v6", name) for name in V6.stage_names} | {"stage1": stage}
        cascade = pipeline.Pipeline(V6, models)
        table = pipeline.predict_frames(cascade, one.luma)
        assert len(table) == 64
        print("epochs", len(history.rows), len(epochs.rows), "predicted", len(table))
        """,
        ABSENT,
    )
    assert "epochs 1 1 predicted 64" in said
    assert "no progress bar, because tqdm is not installed" in said
    assert warned.count("blocks are cut by numpy") == 1


def test_a_bare_machine_measures_and_trains_from_an_archive(tmp_path):
    """An archive that is written here is all that a machine with five packages needs beside av1nb:
    the figures, the joint network and the four stages of v6, which begin where time ended before.
    """
    from av1nb import device, material

    quick = dict(mode="allintra", cpu_used=2, superblock=0, qindex=60)  # blocks of all types
    drawn = [plan for plan in material.plan_frames([], drawings=24) if plan.material == "screen"]
    plans = [
        dataclasses.replace(
            next(plan for plan in drawn if plan.split == split), size=(256, 192), encodes=(quick,)
        )
        for split in ("train", "val", "test")
    ]
    material.build_material(plans, tmp_path, tmp_path / "set", jobs=1)
    device.write_archive(tmp_path / "set", tmp_path / "frames.tar")
    said, _ = in_new_process(
        f"""
        import json, os
        from unittest.mock import patch
        from av1nb import device

        os.chdir({str(tmp_path)!r})
        tiny = dict(widths=(16, 16, 16, 16), depths=(0, 1, 1, 1))
        with patch.dict(device.NETWORKS, dict.fromkeys(device.NETWORKS, tiny)):
            device.main(["measure", "frames.tar", "out", "--device", "cpu", "--seconds", "3000"])
        result = json.load(open("out/device.json"))
        assert result["joint"] and result["stage 1"] and len(result["inference"]) == 6
        assert {{row["what"] for row in result["goals"]}} >= {{"tree of a frame: ms"}}
        words = ["train", "frames.tar", "trained", "--device", "cpu", "--epochs", "1"]

        def trained(*further):
            with patch.dict(device.MATERIAL, tiny):
                device.main([*words, *further])
            return json.load(open("trained/trainings.json"))["trainings"]

        first, *others = trained("--minutes", "0")
        assert first["training"] == "joint" and first["epochs"] == 1
        assert len(others) == 4 and all("left out" in row for row in others)
        again, *others = trained()
        assert again == first  # not done again
        assert [row["training"] for row in others] == [
            "v6 " + name for name in ("stage1", "stage2", "RECT", "AB")
        ]
        assert all(row["epochs"] == 1 and 0 <= row["test macro-F1"] <= 1 for row in others)
        """,
        ABSENT,
    )
    assert "# cpu" in said and "Matrix rate" in said


def test_help_loads_nothing_that_a_command_needs():
    said, _ = in_new_process("""
        import json, sys
        from typer.testing import CliRunner
        from av1nb.cli import app

        for command in ([], ["predict"], ["evaluate"], ["demo"]):
            assert CliRunner().invoke(app, [*command, "--help"]).exit_code == 0

        def loaded():
            return sorted({name.partition(".")[0] for name in sys.modules})

        helped = loaded()
        import av1nb.runs

        print(json.dumps([helped, loaded()]))
        """)
    loaded, with_runs = map(set, json.loads(said))
    assert not with_runs & {"torch", "sklearn", "papermill", "nbformat", "jsonschema"}
    assert not loaded & (set(SLOW) - {"typer"})
    assert "typer" in loaded and len(loaded) < 300


def test_the_first_word_of_a_command_comes_before_torch(tmp_path):
    "A network that does not exist is looked for after the first word, with torch loaded only then."
    (tmp_path / "film.y4m").write_bytes(b"nothing")
    for command in (["predict", "--qindex", "80"], ["evaluate"]):
        said, _ = in_new_process(f"""
            import sys
            import typer
            from av1nb.cli import app

            words, echo = [], typer.echo

            def noted(message=None, **options):
                words.append((str(message), "torch" in sys.modules))
                echo(message, **options)

            typer.echo = noted
            try:
                app([*{command!r}, {str(tmp_path / "film.y4m")!r}, "--weights", "no_such.pt"])
            except SystemExit as end:
                assert end.code == 1, end.code
            first, last = words[0], words[-1]
            assert "film.y4m" in first[0] and not first[1], words
            assert "no_such.pt" in last[0] and last[1], words
            print("ok")
            """)
        assert said.endswith("ok\n")


@pytest.mark.parametrize(
    "own, then",
    [
        ({}, ["2000", "None"]),
        ({"GOMP_SPINCOUNT": "7"}, ["7", "None"]),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, ["None", "ACTIVE"]),
    ],
)
def test_waiting_threads_spin_shortly_unless_the_user_says_otherwise(own, then):
    "What counts is the variable that PyTorch's OpenMP finds when it is loaded."
    environment = {k: v for k, v in os.environ.items() if "OMP_" not in k} | own
    code = """
        import os, av1nb
        print(os.environ.get("GOMP_SPINCOUNT"), os.environ.get("OMP_WAIT_POLICY"))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.stdout.split() == then, done.stderr
