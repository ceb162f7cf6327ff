"""How near a training step and an inference come to what the device can do.

Needs PyTorch, numpy, pandas, scikit-learn and SciPy beside av1nb itself, nothing else:

    python nbs/benchmarks/steps.py frames frames.npz             # where av1nb is installed whole
    python nbs/benchmarks/steps.py measure frames.npz out/       # on the machine with the GPU

Writes steps.json and steps.md into the folder. On a GPU it ends within three minutes; on a CPU
everything is smaller.
"""

import argparse
import platform
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import pandas as pd
import torch
from torch.utils.flop_counter import FlopCounterMode

from av1nb import datasets, frames, heads, joint, losses, metrics, recipes, training
from av1nb.files import atomic_file, save_json
from av1nb.partitions import V6

COLUMNS = ("frame", "size", "row", "col", "type", "qindex")
NETWORKS = {
    "light": dict(widths=(24, 64, 112, 128), depths=(0, 2, 1, 2)),
    "wide": dict(widths=(48, 96, 128, 128), depths=(1, 2, 1, 2)),
}


def write_frames(path, names=("coffee", "text", "coins", "camera", "rocket", "temple")):
    "Pictures of the shipped sample and their trees, as arrays."
    from av1nb.sample import load_sample

    content = {}
    for number, picture in enumerate(load_sample(list(names))):
        content[f"luma{number}"] = picture.luma
        for qindex, nodes in picture.nodes.items():
            content[f"nodes{number}_{qindex}"] = nodes[list(COLUMNS)].to_numpy(np.int32)
    with atomic_file(path) as temporary, open(temporary, "wb") as file:
        np.savez_compressed(file, **content)


def read_frames(path):
    "The same again, as `frames.FrameSet` takes them."
    pictures = []
    with np.load(path, allow_pickle=False) as content:
        for name in content:
            if name.startswith("luma"):
                number = name.removeprefix("luma")
                nodes = {
                    int(key.rpartition("_")[2]): pd.DataFrame(content[key], columns=COLUMNS)
                    for key in content
                    if key.startswith(f"nodes{number}_")
                }
                pictures.append(SimpleNamespace(name=name, luma=content[name], nodes=nodes))
    return pictures


class Bench:
    "A device, how to time on it, and when to stop."

    def __init__(self, device, seconds):
        self.device, self.cuda = device, device.type == "cuda"
        self.until, self.left_out = time.perf_counter() + seconds, []
        self.dtype = torch.bfloat16 if training.has_bf16(device) else torch.float32

    def wait(self):
        if self.cuda:
            torch.cuda.synchronize(self.device)

    def time(self, function, seconds=1.0, least=3):
        "Median and smallest seconds of a call; on a GPU of calls in a row, as they are queued."
        function()
        self.wait()
        row, times, began = (10 if self.cuda else 1), [], time.perf_counter()
        while len(times) < least or time.perf_counter() - began < seconds:
            started = time.perf_counter()
            for _ in range(row):
                function()
            self.wait()
            times.append((time.perf_counter() - started) / row)
            if len(times) >= 1000:
                break
        return statistics.median(times), min(times)

    def enough(self, what, needed=5):
        "Whether there is time for a part that takes some seconds; else it is noted as left out."
        if self.until - time.perf_counter() < needed:
            self.left_out.append(what)
            return False
        return True


def matrix_rate(bench):
    "Operations a second of a product of square matrices, the best of several sizes."
    best = 0
    for side in (4096, 8192) if bench.cuda else (512, 1024):
        a, b = (torch.randn(side, side, device=bench.device).to(bench.dtype) for _ in range(2))
        best = max(best, 2 * side**3 / bench.time(lambda: a @ b, 0.5)[1])
    return best


def joint_trainer(bench, crops, network, batch_size, capture):
    "A trainer of the joint network on crops that lie on the device."
    training.set_seed(42)
    model = heads.JointModel(**NETWORKS[network]).to(memory_format=torch.channels_last)
    config = joint.joint_config(
        str(bench.device), epochs=1000, batch_size=batch_size, capture=capture
    )
    batches = frames.CropBatches(crops, batch_size)
    return training.Trainer(
        model, batches, batches, losses.TreeLikelihood(), None, config, lambda backbone: [backbone]
    )


def stage_trainer(bench, pictures, batch_size, capture):
    "A trainer of stage 1 of v6 on blocks that lie on the device, augmented as its recipe says."
    training.set_seed(42)
    # pixels of the pictures at any place: the time does not depend on what is in them
    rng, luma = np.random.default_rng(42), pictures[0].luma[0]
    rows, cols = (rng.integers(0, n - 15, 4 * batch_size) for n in luma.shape)
    blocks = np.lib.stride_tricks.sliding_window_view(luma, (16, 16))[rows, cols]
    labels = torch.arange(len(blocks)) % 2
    recipe, model = recipes.recipe_for("v6", "stage1"), heads.build_model("v6", "stage1")
    batches = datasets.Batches(
        torch.from_numpy(blocks[:, None].copy()),
        labels,
        batch_size,
        shuffle=True,
        augment=recipes.make_augmentation(recipe, V6, "stage1"),
        device=bench.device,
    )
    config = training.TrainConfig(
        epochs=1000, batch_size=batch_size, device=str(bench.device), capture=capture
    )
    objective = recipes.make_objective(recipe, torch.bincount(labels), model, V6)
    score = metrics.Score(model.class_names)
    return training.Trainer(model, batches, batches, objective, score, config)


def step_row(bench, trainer, rate, seconds):
    "Time of a step with its batch, share of the data and of the matrix rate."
    epoch, steps, waits = 0, 0, training.Waits(bench.device)
    trainer.train.set_epoch(1)
    training._begin_epoch(trainer, 1)
    batch = [part.to(bench.device) for part in next(iter(trainer.train))]
    with FlopCounterMode(display=False) as counter:
        trainer.gradients(batch)
    flops = counter.get_total_flops()
    for _ in range(3):
        trainer.step(batch)
    alone, _ = bench.time(lambda: trainer.gradients(batch), seconds / 3)
    bench.wait()
    started, seen, waited = time.perf_counter(), [], 0.0
    while time.perf_counter() - started < seconds or steps < 3:
        epoch += 1
        trainer.train.set_epoch(epoch)
        for number, batch in training.timed_batches(trainer.train, bench.device, waits):
            seen.append((number, len(batch[0]), None, *trainer.step(batch)))
            steps += 1
            if len(seen) == trainer.read_every:
                trainer.read(seen, epoch)
                waited, seen = waited + waits.seconds(), []
                if time.perf_counter() - started > seconds and steps >= 3:
                    break
    bench.wait()
    spent = time.perf_counter() - started
    waited += waits.seconds()
    return {
        "batch": trainer.config.batch_size,
        "capture": trainer.config.capture,
        "ms": 1000 * spent / steps,
        "forward and backward ms": 1000 * alone,
        "samples a second": steps * trainer.config.batch_size / spent,
        "data share": waited / spent,
        "GFLOP": flops / 1e9,
        "matrix share": flops * steps / spent / rate,
    }


def profile_row(bench, trainer, steps=5):
    "Launches of a step, share of the time in which the device is at work, and its dearest kernels."
    from torch.profiler import ProfilerActivity, profile

    training._begin_epoch(trainer, 1)
    batch = [part.to(bench.device) for part in next(iter(trainer.train))]
    for _ in range(3):
        trainer.step(batch)
    bench.wait()
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * bench.cuda
    with profile(activities=activities) as seen:
        started = time.perf_counter()
        for _ in range(steps):
            trainer.step(batch)
        bench.wait()
        spent = time.perf_counter() - started
    own = "self_device_time_total" if bench.cuda else "self_cpu_time_total"
    cost = {event.key: getattr(event, own) for event in seen.key_averages()}
    total, calls = sum(cost.values()), sum(event.count for event in seen.key_averages())
    launches = [e.count for e in seen.key_averages() if e.key == "cudaLaunchKernel"]
    busy = total / 1e6 / spent
    bound = "waits and launches" if busy < 0.7 else "kernels"
    return {
        "operations a step": calls / steps,
        "launches a step": sum(launches) / steps,
        "device busy": busy,
        "bound by": bound if bench.cuda else "the processor",
        "dearest": {
            name: round(value / total, 4)
            for name, value in sorted(cost.items(), key=lambda item: -item[1])[:12]
        },
    }


def inference_rows(bench, seconds):
    "A frame through the network, to maps, to a tree, and with trees decoded beside the next frame."
    height, width = (2160, 3840) if bench.cuda else (270, 480)
    luma = np.random.default_rng(42).integers(0, 1024, (height, width), dtype=np.uint16)
    predictor = joint.JointPredictor(heads.JointModel(**NETWORKS["light"]), bench.device)
    maps = predictor.maps(luma, 128)

    def network():
        with torch.inference_mode():
            predictor._cells(luma, 128)

    def decode(found):
        return joint.decode_tree(found, width, height, 128)

    ways = {
        "frame sent, network": network,
        "maps": lambda: predictor.maps(luma, 128),
        "maps and tree": lambda: decode(predictor.maps(luma, 128)),
        "tree alone": lambda: decode(maps),
    }
    rows = [
        {"what": what, "ms": 1000 * bench.time(way, seconds / 5)[0]} for what, way in ways.items()
    ]
    count = 8
    with ThreadPoolExecutor(1) as other:
        started = time.perf_counter()
        trees = [other.submit(decode, predictor.maps(luma, 128)) for _ in range(count)]
        [tree.result() for tree in trees]
        hidden = 1000 * (time.perf_counter() - started) / count
    return [*rows, {"what": "maps, tree decoded beside the next", "ms": hidden}], [width, height]


def measure(bench, pictures):
    "All figures, as plain values."
    small = not bench.cuda
    rate = matrix_rate(bench)
    result = {"matrix rate TFLOP/s": rate / 1e12, "dtype": str(bench.dtype), "joint": []}
    crops = frames.FrameSet(pictures, 128, bench.device)
    sizes, captures = ((2, 4), ("off",)) if small else ((16, 64, 256, 1024), ("off", "graph"))
    seconds = 1.0 if small else 2.0
    for network in NETWORKS:
        for batch_size in sizes:
            for capture in captures:
                what = f"{network} joint network, batch {batch_size}, capture {capture}"
                if bench.enough(what, 4 * seconds):
                    trainer = joint_trainer(bench, crops, network, batch_size, capture)
                    row = step_row(bench, trainer, rate, seconds)
                    result["joint"].append({"network": network, **row})
                    del trainer
    result["stage 1"] = []
    for batch_size in (16,) if small else (128, 1024, 4096):
        for capture in captures:
            if bench.enough(f"stage 1, batch {batch_size}, capture {capture}", 4 * seconds):
                trainer = stage_trainer(bench, pictures, batch_size, capture)
                result["stage 1"].append(step_row(bench, trainer, rate, seconds))
    if bench.enough("inference", 10):
        result["inference"], result["frame"] = inference_rows(bench, 2 * seconds)
    result["profiles"] = []
    for batch_size in sizes[:1] if small else (16, 256):
        if bench.enough(f"profile, batch {batch_size}", 10):
            trainer = joint_trainer(bench, crops, "light", batch_size, "off")
            row = profile_row(bench, trainer)
            result["profiles"].append({"network": "light", "batch": batch_size, **row})
    if not small and bench.enough("torch.compile", 60):
        trainer = joint_trainer(bench, crops, "light", 256, "compile")
        row = step_row(bench, trainer, rate, seconds)
        result["joint"].append({"network": "light", **row})
    result["left out for want of time"] = bench.left_out
    return result


def table(rows):
    "Rows as a table in Markdown."
    frame = pd.DataFrame(rows)
    lines = [frame.columns, ["---"] * len(frame.columns)]
    lines += [
        [f"{v:.4g}" if isinstance(v, float) else str(v) for v in row]
        for row in frame.itertuples(index=False)
    ]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def as_markdown(result):
    "All tables and what bounds a step."
    parts = [
        f"# {result['device']}",
        f"Matrix rate {result['matrix rate TFLOP/s']:.4g} TFLOP/s ({result['dtype']}).",
        *(f"## {name}\n\n{table(result[name])}" for name in ("joint", "stage 1") if result[name]),
    ]
    if "inference" in result:
        width, height = result["frame"]
        parts.append(f"## Inference of a frame of {width}×{height}\n\n{table(result['inference'])}")
    for row in result["profiles"]:
        kernels = table([{"what": k, "share": v} for k, v in row["dearest"].items()])
        parts.append(
            f"## Profile, batch {row['batch']}\n\n{row['operations a step']:.0f} operations and"
            f" {row['launches a step']:.0f} launches a step, device busy"
            f" {100 * row['device busy']:.0f} %: bound by {row['bound by']}.\n\n{kernels}"
        )
    if result["left out for want of time"]:
        parts.append("Left out for want of time: " + "; ".join(result["left out for want of time"]))
    return "\n\n".join(parts) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=["frames", "measure"])
    parser.add_argument("archive", help="frames and their trees, .npz")
    parser.add_argument("out", nargs="?", default=".", help="folder for steps.json and steps.md")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:<n>")
    parser.add_argument("--seconds", type=float, default=160.0, help="when to stop")
    given = parser.parse_args()
    if given.command == "frames":
        write_frames(given.archive)
        return
    device = training.pick_device(given.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()
    result = {"device": f"{device.type} {name}".strip(), "torch": torch.__version__}
    result |= {"python": platform.python_version(), "threads": torch.get_num_threads()}
    result |= measure(Bench(device, given.seconds), read_frames(given.archive))
    Path(given.out).mkdir(parents=True, exist_ok=True)
    save_json(result, Path(given.out) / "steps.json")
    text = as_markdown(result)
    (Path(given.out) / "steps.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
