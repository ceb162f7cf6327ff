"""One small run of all ten stages, shared by the tests of whole runs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent


def av1nb(*arguments, check=True, **environment):
    "Run the console script as a user does; returns the finished process with its output as text."
    done = subprocess.run(
        [BIN / "av1nb", *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    if check:
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done


def system_libaom():
    """File of the system's libaom, None without one.

    Its name alone would not do: the loader gives a library of the same name that is already loaded.
    """
    code = (
        "import ctypes, ctypes.util; ctypes.CDLL(ctypes.util.find_library('aom') or 'none'); "
        "print(next(line.split()[-1] for line in open('/proc/self/maps') if 'libaom' in line))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    return Path(done.stdout.strip()) if done.returncode == 0 else None


@pytest.fixture(scope="session")
def encoder():
    "The libaom with the hook; without one the test is skipped, and says why."
    from av1nb.libaom import LibaomError
    from av1nb.steering import load_encoder

    try:
        return load_encoder()
    except LibaomError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def shared(tmp_path_factory, worker_id):
    "A folder that all processes of this test run have in common."
    base = tmp_path_factory.getbasetemp()
    return base if worker_id == "master" else base.parent


@pytest.fixture(scope="session")
def small_run(shared):
    """A run directory in which every stage has run for one epoch on eight pictures of the sample.

    The first process that wants it makes it; no test changes it.
    """
    from av1nb import runs

    run = runs.RunDirectory(shared / "small")
    with FileLock(shared / "small.lock"):
        if not (run / "metrics.json").exists():
            make_small_run(run)
    return run


def make_small_run(run):
    "Run all ten stages and write the table of metrics, which comes last."
    from av1nb import runs

    # the smaller ones
    pictures = ["ascent", "brick", "camera", "coffee", "coins", "rocket", "temple", "text"]
    once = {"epochs": 1, "batch_size": 256, "frozen_epochs": 0}
    per_stage = {
        "000_raw": {"pictures": pictures, "excel": False},
        "001_prepare_dataset": {"fractions": [0.5, 0.25, 0.25]},
        "003_train_stage1": {k: once[k] for k in ("epochs", "batch_size")},
        **{
            name: once
            for name in ("004_train_stage2", "005_train_stage3_rect", "006_train_stage3_ab")
        },
    }
    runs.run_notebooks(runs.PIPELINE, run, {"seed": 1}, per_stage, quiet=True)
    runs.summarise(run)
