"""Jobs on a cluster of two processes: the bytes that one process makes, and nothing lost or double
when a worker dies.
"""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from functools import partial

import numpy as np
import pytest
from conftest import av1nb
from joblib import delayed
from PIL import Image

from av1nb import corpus, jobs, runs, steering
from av1nb.costs import SearchLog
from av1nb.encoding import synthetic_picture
from av1nb.masks import MaskPolicy, masks_from_nodes
from test_imports import in_new_process

FAST = dict(qindexes=(128, 220), cpu_used=6, crop=64, crops=2)


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.fixture
def scheduler(monkeypatch):
    "Address of a scheduler with two workers of one thread, each a process of its own."
    from distributed import LocalCluster

    monkeypatch.delenv(jobs.SCHEDULER, raising=False)
    with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster:
        yield cluster.scheduler_address


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    "Five pictures, one of them broken."
    folder = tmp_path_factory.mktemp("sources")
    for seed in range(4):
        luma = synthetic_picture(192, 144, seed=seed)[0]
        Image.fromarray(np.asarray(luma >> 2, np.uint8)).save(folder / f"p{seed}.png")
    (folder / "broken.png").write_bytes((folder / "p0.png").read_bytes()[:3000])
    return folder


@pytest.fixture(scope="module")
def alone(sources, tmp_path_factory):
    "The corpus that this process makes of them."
    folder = tmp_path_factory.mktemp("alone") / "corpus"
    corpus.build_corpus(sources, folder, jobs=1, **FAST)
    return folder


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def kill_a_worker_at_work(scheduler, out, killed):
    "Wait until pictures of a corpus are being made, and kill one of the processes that do it."
    from distributed import Client

    with Client(scheduler, set_as_default=False) as client:
        processes = client.run(os.getpid)
        while not (out / "corpus.json").exists():
            time.sleep(0.001)
        while not killed:
            for worker, keys in client.processing().items():
                if keys and not killed:
                    os.kill(processes[worker], signal.SIGKILL)
                    killed.extend(keys)


def note(name, folder, deadly):
    "Write down that a job was begun; a deadly one kills its process the first time."
    with open(folder / name, "ab") as file:
        file.write(b".")
    if deadly and (folder / name).stat().st_size == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return name


def test_a_corpus_is_the_same(scheduler, sources, alone, tmp_path):
    corpus.build_corpus(sources, tmp_path / "corpus", scheduler=scheduler, **FAST)
    assert contents(tmp_path / "corpus") == contents(alone)


def test_a_stage_gives_its_jobs_to_the_scheduler_of_the_command(
    scheduler, sources, alone, tmp_path
):
    from distributed import Client

    asked = dict(inputs=sources, out=tmp_path / "corpus", cpu_used=6, crop=64, crops=2)
    asked["qindexes"] = list(FAST["qindexes"])
    options = [word for name, value in asked.items() for word in ("-p", f"{name}={value}")]
    av1nb("run", "build_corpus", "--run-dir", tmp_path / "run", "--scheduler", scheduler, *options)
    made = contents(tmp_path / "corpus")
    assert made.pop("CARD.md") and made == contents(alone)
    with Client(scheduler, set_as_default=False) as client:
        assert client.run_on_scheduler(lambda dask_scheduler: dask_scheduler.transition_counter)


def test_a_worker_dies_in_mid_job(scheduler, tmp_path):
    names = [f"job {n}" for n in range(6)]
    tasks = {name: delayed(note)(name, tmp_path, name == "job 2") for name in names}
    ended = list(jobs.run_jobs(tasks, scheduler=scheduler, writes=[tmp_path]))
    assert sorted(ended) == [(name, name) for name in names]
    begun = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    # results that still lay with the dead worker were made again, too
    assert begun.keys() == set(names) and begun["job 2"] == 2 and max(begun.values()) == 2


def test_a_corpus_is_the_same_although_a_worker_dies(scheduler, sources, alone, tmp_path):
    killed = []
    arguments = (scheduler, tmp_path / "corpus", killed)
    murder = threading.Thread(target=kill_a_worker_at_work, args=arguments)
    murder.start()
    corpus.build_corpus(sources, tmp_path / "corpus", scheduler=scheduler, **FAST)
    murder.join()
    assert killed and contents(tmp_path / "corpus") == contents(alone)


def planes_of(seed):
    return [
        tuple(
            p[: 64 // k, : 64 // k] for p, k in zip(synthetic_picture(64, 64, seed=seed), (1, 2, 2))
        )
    ]


def own_tree(luma, qindex, stock):
    return masks_from_nodes(stock().nodes, *luma[0].shape[::-1]), 0.0


def deadly(flag, luma, qindex, stock):
    "The stock encoder's own tree; the process dies where nobody has died before."
    if not flag.exists():
        flag.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return own_tree(luma, qindex, stock)


def test_the_closed_loop_is_the_same_although_a_worker_dies(encoder, scheduler, tmp_path):
    "Stock, an oracle and a network's masks: the bytes of every encode, each job once."
    policy, weights = MaskPolicy({64: 0.5, 32: 0.5, 16: 0.5, 8: 0.5}), steering.shipped_weights()
    follow, flag = partial(steering.follow_network, str(weights), policy), tmp_path / "died"

    def work(oracle):
        plan = [(None, 5), (oracle, 5), (follow, 5)]
        return {
            f"picture {seed} at {level}": delayed(steering.measure_conditions)(
                planes_of(seed), plan, level
            )
            for seed in (0, 1)
            for level in (32, 55)
        }

    alone = dict(jobs.run_jobs(work(own_tree), jobs=1))
    where = dict(scheduler=scheduler, same=steering.HOOK, reads=[weights], writes=[tmp_path])
    ended = list(jobs.run_jobs(work(partial(deadly, flag)), **where))
    assert flag.exists() and sorted(name for name, _ in ended) == sorted(alone)
    same = ("bytes", "psnr", "ssim", "retried")
    for name, encodes in ended:
        pairs = list(zip(encodes, alone[name], strict=True))
        assert all(one[kind] == other[kind] for one, other in pairs for kind in same), name


def recorded(seed, out, flag):
    "Costs of a picture, once somebody has died while recording some."
    if seed == 1 and not flag.exists():
        flag.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return steering.record_costs(planes_of(seed), out / f"p{seed}", (128, 220), cpu_used=5)


def test_costs_are_the_same_although_a_worker_dies(encoder, scheduler, tmp_path):
    flag, logs = tmp_path / "died", {}
    for name, where in (("cluster", dict(scheduler=scheduler)), ("alone", dict(jobs=1))):
        out = tmp_path / name
        out.mkdir()
        tasks = {f"p{seed}": delayed(recorded)(seed, out, flag) for seed in (0, 1)}
        done = dict(jobs.run_jobs(tasks, same=steering.HOOK, writes=[out], **where))
        assert flag.exists() and done.keys() == tasks.keys()
        logs[name] = {
            str(path.relative_to(out)): SearchLog.load(path) for path in sorted(out.rglob("*.npz"))
        }
        assert not [p for p in out.rglob("*") if p.is_file() and p.suffix != ".npz"]
    assert logs["cluster"].keys() == logs["alone"].keys() and len(logs["alone"]) == 4
    for name, log in logs["alone"].items():
        assert log.nodes.equals(logs["cluster"][name].nodes)
        np.testing.assert_array_equal(log.costs, logs["cluster"][name].costs)


def test_a_job_that_kills_every_worker_ends_the_run(scheduler):
    tasks = {"deadly": delayed(os._exit)(1), "good": delayed(pow)(2, 2)}
    with pytest.raises(jobs.JobError, match="^deadly: 4 workers died while they did it"):
        list(jobs.run_jobs(tasks, scheduler=scheduler))


def test_failures_name_the_picture(scheduler):
    tasks = {
        name: delayed(corpus.label)([(np.zeros((64, 64), kind),)], (220,), 6)
        for name, kind in (("good.png", np.uint16), ("bad.png", float))
    }
    for where in (dict(scheduler=scheduler), dict(jobs=2), dict(jobs=1)):
        with pytest.raises(jobs.JobError, match="^bad.png: Plane Y of picture 0 has the type"):
            list(jobs.run_jobs(tasks, **where))


def test_workers_that_differ_are_refused(scheduler, tmp_path):
    one = {"one": delayed(pow)(2, 2)}

    def refusal(**asked):
        with pytest.raises(jobs.JobError) as refused:
            list(jobs.run_jobs(one, scheduler=scheduler, **asked))
        return str(refused.value)

    assert "has process " in refusal(same={"process": delayed(os.getpid)()})
    assert "does not see" in refusal(reads=[tmp_path / "nowhere"], writes=[tmp_path])
    assert not list(tmp_path.iterdir())
    assert dict(jobs.run_jobs(one, scheduler=scheduler, same=jobs.TIMED)) == {"one": 4}


def test_a_worker_that_joins_later_is_asked_too(scheduler, monkeypatch):
    monkeypatch.setattr(jobs, "_require_fit", lambda *_: None)  # as if it had not been there yet
    work = jobs.run_jobs({"one": delayed(pow)(2, 2)}, scheduler=scheduler, reads=["/nowhere"])
    with pytest.raises(jobs.JobError, match="does not see /nowhere: put it into a folder"):
        list(work)


def test_a_worker_with_threads_is_refused():
    from distributed import LocalCluster

    with LocalCluster(n_workers=1, threads_per_worker=2, dashboard_address=None) as cluster:
        work = jobs.run_jobs({"one": delayed(pow)(2, 2)}, scheduler=cluster.scheduler_address)
        with pytest.raises(jobs.JobError, match="has 2 threads; jobs need processes of one thread"):
            list(work)


def test_a_scheduler_that_cannot_be_reached_is_one_sentence(sources, tmp_path):
    nobody = f"tcp://127.0.0.1:{free_port()}"
    options = ["--scheduler", nobody, "-p", f"inputs={sources}", "-p", f"out={tmp_path / 'c'}"]
    done = av1nb("run", "build_corpus", "--run-dir", tmp_path / "run", *options, check=False)
    assert done.returncode == 1 and not list(tmp_path.iterdir())
    [sentence] = done.stderr.strip().splitlines()
    assert sentence.startswith(f"av1nb run: The scheduler {nobody} cannot be reached within 5 s")


@pytest.mark.parametrize("stage", ["build_material", "build_costs", "012_tune_masks"])
def test_every_stage_that_encodes_says_so(stage, tmp_path):
    nobody = f"tcp://127.0.0.1:{free_port()}"
    done = av1nb("run", stage, "--run-dir", tmp_path / "r", "--scheduler", nobody, check=False)
    [sentence] = [line for line in done.stderr.splitlines() if nobody in line]
    assert sentence.startswith(f"av1nb run: The scheduler {nobody} cannot be reached")
    assert done.returncode == 1 and not (tmp_path / "r").exists()


def test_the_closed_loop_says_so_before_it_prepares_anything(tmp_path, monkeypatch):
    nobody = f"tcp://127.0.0.1:{free_port()}"
    monkeypatch.setenv(jobs.SCHEDULER, nobody)
    record = runs.notebooks_folder().parent / "thesis/closed_loop.ipynb"
    asked = {"run_dir": str(tmp_path / "run"), "out": str(tmp_path / "out")}
    with pytest.raises(runs.RunError, match=f"The scheduler {nobody} cannot be reached"):
        runs.run_notebook(record, tmp_path / "notebooks/closed_loop.ipynb", asked, quiet=True)
    assert [path.name for path in tmp_path.iterdir()] == ["notebooks"]


def test_a_scheduler_that_goes_away_is_one_sentence():
    address = f"tcp://127.0.0.1:{free_port()}"
    commands = (
        ["dask_scheduler", "--host", "127.0.0.1", "--port", address.rpartition(":")[2]],
        ["dask_worker", address, "--nthreads", "1"],
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", f"distributed.cli.{program}", "--no-dashboard", *options],
            stderr=subprocess.DEVNULL,
        )
        for program, *options in commands
    ]
    try:
        naps = {f"nap {n}": delayed(time.sleep)(0.1 if n == 0 else 60) for n in range(3)}
        work = jobs.run_jobs(naps, scheduler=address)
        assert next(work) == ("nap 0", None)
        processes[0].kill()
        with pytest.raises(jobs.JobError, match="The scheduler went away before all jobs were"):
            list(work)
    finally:
        for process in processes:
            process.kill()
            process.wait()


def test_without_dask_one_machine_works_and_a_cluster_is_a_sentence():
    said, _ = in_new_process(
        """
        import os
        from joblib import delayed
        from av1nb import jobs

        os.environ.pop(jobs.SCHEDULER, None)
        print(list(jobs.run_jobs({"one": delayed(pow)(2, 2)}, jobs=1)))
        os.environ[jobs.SCHEDULER] = "tcp://127.0.0.1:8786"
        try:
            list(jobs.run_jobs({"one": delayed(pow)(2, 2)}))
        except jobs.JobError as error:
            print(error)
        """,
        ("dask", "distributed"),
    )
    assert said.splitlines() == [
        "[('one', 4)]",
        (
            "The scheduler tcp://127.0.0.1:8786 is named, and the package distributed is missing:"
            ' install it: pip install "av1nb[cluster]".'
        ),
    ]
