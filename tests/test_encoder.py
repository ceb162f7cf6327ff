"""libaom with the partition hook as a user meets it: every decoder reads what it writes, and no
fault leads to a stream that is not what was asked for.

What the hook itself does: test_hook.py.
"""

import json
import os
import re
import resource
import runpy
import signal
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import av
import numpy as np
import pandas as pd
import pytest

from av1nb.masks import MaskTable, masks_from_nodes, uniform_masks
from av1nb.steering import RELEASE, encode_masked, find_encoder, load_encoder
from av1nb.partitions import random_tree
from av1nb.files import write_bytes
from av1nb.libaom import LibaomError
from av1nb.streams import load_libaom
from av1nb.encoding import encode, synthetic_picture

BUILD = Path(__file__).parent.parent / "libaom" / "build.py"
COLUMNS = ["frame", "size", "row", "col", "type"]


def scene(width, height, frames=1, seed=3):
    return [synthetic_picture(width, height, seed, 3.0 * n) for n in range(frames)]


def tree_of(nodes):
    return nodes[COLUMNS].sort_values(COLUMNS[:-1]).reset_index(drop=True).astype(np.int64)


def test_the_library_was_built_from_this_patch(encoder):
    path, source = find_encoder()
    if source != "cache":
        pytest.skip(f"the library was named by the {source}")
    assert (
        json.loads(path.with_name("build.json").read_text())["key"]
        == runpy.run_path(str(BUILD))["key"]()
    ), "the library is of another patch: run make encoder"


@pytest.mark.parametrize("mode", ["allintra", "good"])
@pytest.mark.parametrize("cpu_used", range(7))
def test_random_masks_give_streams_that_every_decoder_reads(encoder, tmp_path, mode, cpu_used):
    width, height = 102, 138
    rng = np.random.default_rng(cpu_used)
    garbage = rng.integers(0, 1 << 16, (2, 5, 18, 13), dtype=np.uint16)
    sparse = np.uint16(1) << rng.integers(0, 10, garbage.shape, dtype=np.uint16) | rng.choice(
        np.array([0, 1 << 15], np.uint16), garbage.shape
    )
    for bits, options in (
        (garbage, {}),
        (garbage, {"sb-size": 128, "enable-ab-partitions": 0}),
        (sparse, {}),
        (sparse, {"min-partition-size": 8, "enable-1to4-partitions": 0, "max-partition-size": 32}),
    ):
        table = MaskTable.empty(2, width, height)
        table.bits[:] = bits  # past the checks of a table
        pictures = scene(width, height, 2, seed=cpu_used)
        result = encode_masked(
            pictures,
            table,
            mode=mode,
            cpu_used=cpu_used,
            cq_level=40,
            options=options,
            path=tmp_path / "random.ivf",
            encoder=encoder,
        )
        assert result.counts["limited"] > 8 and result.psnr > 25
        # dav1d
        with av.open(str(tmp_path / "random.ivf")) as container:
            decoded = [f.to_ndarray() for f in container.decode(video=0)]
        for picture, luma in zip(pictures, decoded, strict=True):
            error = (luma[:height, :width].astype(float) - picture[0]) ** 2
            assert 10 * np.log10(1023**2 / error.mean()) > 24


def test_encodes_at_once_do_not_share_their_masks(encoder):
    trees = [random_tree(136, 104, seed=s).assign(frame=0) for s in range(4)]

    def forced(tree):
        return encode_masked(
            scene(136, 104),
            masks_from_nodes(tree, 136, 104),
            cpu_used=5,
            cq_level=43,
            encoder=encoder,
        ).nodes

    with ThreadPoolExecutor(4) as pool:
        for tree, nodes in zip(trees, pool.map(forced, trees)):
            pd.testing.assert_frame_equal(tree_of(nodes), tree_of(tree))


def test_a_failed_encode_leaves_no_mask_behind(encoder):
    pictures, masks = scene(136, 104), uniform_masks(1, 136, 104, (3,), override=True)
    plain = encode(pictures, cpu_used=5, libaom=encoder).ivf
    with pytest.raises(ValueError, match="no encoder option"):
        encode_masked(pictures, masks, options={"no-such-option": 1}, encoder=encoder)
    assert encode(pictures, cpu_used=5, libaom=encoder).ivf == plain


def test_a_stock_library_is_refused(encoder, monkeypatch):
    for path in {load_libaom().path}:
        with pytest.raises(LibaomError, match="is a stock library without the partition hook"):
            load_encoder(path)
        monkeypatch.setenv("AV1NB_ENCODER", str(path))
        with pytest.raises(
            LibaomError, match="environment variable AV1NB_ENCODER, is a stock library"
        ):
            encode_masked(scene(64, 64), cpu_used=6)


def test_without_the_library_it_is_said_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.delenv("AV1NB_ENCODER", raising=False)
    monkeypatch.setenv("AV1NB_CACHE", str(tmp_path))
    with pytest.raises(LibaomError, match="build it with make encoder"):
        encode_masked(scene(64, 64), cpu_used=6)
    write_bytes(tmp_path / f"libaom-{RELEASE}-0/libaom.so", b"\x7fELF but not really")
    write_bytes(tmp_path / f"libaom-{RELEASE}-0/build.json", b"{}")
    with pytest.raises(LibaomError, match="cannot be loaded as a shared library"):
        load_encoder()


SCRIPT = """
    import os, signal, sys, threading
    from av1nb.masks import MaskTable
    from av1nb.steering import encode_masked
    from av1nb.encoding import synthetic_picture
    masks = MaskTable.load(sys.argv[2])
    pictures = [synthetic_picture(256, 192)]
    encode_masked([synthetic_picture(64, 64)], cpu_used=6)  # everything is loaded
    if sys.argv[3] == "kill": threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGKILL)).start()
    encode_masked(pictures, masks, cpu_used=0, cq_level=10, path=sys.argv[1])
    print("done")
"""


def run_script(out, masks, what, **settings):
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SCRIPT), str(out), str(masks), what],
        capture_output=True,
        text=True,
        timeout=120,
        **settings,
    )


def test_an_encoder_that_is_killed_leaves_no_file(encoder, tmp_path):
    masks = MaskTable.empty(1, 256, 192).save(tmp_path / "masks")
    (tmp_path / "out").mkdir()
    done = run_script(tmp_path / "out/video.ivf", masks, "kill")
    assert done.returncode == -signal.SIGKILL and not list(
        (tmp_path / "out").iterdir()
    ), done.stderr


def test_a_full_disk_is_said_in_one_sentence(encoder, tmp_path):
    masks = uniform_masks(1, 256, 192, (3,), sizes=(64, 32), override=True).save(tmp_path / "masks")
    (tmp_path / "out").mkdir()

    def small_files():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (500, 500))

    done = run_script(tmp_path / "out/video.ivf", masks, "write", preexec_fn=small_files)
    assert done.returncode == 1 and re.search(
        r"OSError: .*video\.ivf could not be written: .*Nothing of it was kept", done.stderr
    ), done.stderr
    assert not list((tmp_path / "out").iterdir())
    with pytest.raises(ValueError, match="is cut off or damaged"):
        (tmp_path / "masks").write_bytes((tmp_path / "masks").read_bytes()[:-1])
        MaskTable.load(tmp_path / "masks")


def test_a_failed_build_leaves_the_cache_as_it_was(tmp_path):
    (tmp_path / "source").mkdir()
    done = subprocess.run(
        [sys.executable, BUILD, "--source", tmp_path / "source", "--cache", tmp_path / "cache"],
        capture_output=True,
        text=True,
        env=os.environ | {"PATH": os.environ["PATH"]},
    )
    assert (
        done.returncode == 1
        and done.stderr.startswith("make encoder: ")
        and "Traceback" not in done.stderr
    )
    assert not list((tmp_path / "cache").iterdir())
    done = subprocess.run(
        [sys.executable, BUILD, "--cache", tmp_path / "cache"],
        capture_output=True,
        text=True,
        env={"PATH": str(tmp_path), "HOME": str(tmp_path)},
    )
    assert (
        done.returncode == 1
        and "these are missing: cmake" in done.stderr
        and "apt-get install" in done.stderr
    )
