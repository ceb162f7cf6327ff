"""libaom with the partition hook, end to end: unused it is stock, masks are obeyed, logs are true,
and no fault leads to a stream that is not what was asked for.
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
from av1nb.costs import regret
from av1nb.steering import encode_masked, find_encoder, load_encoder, search_costs
from av1nb.partitions import PartitionType, is_inside, legal_grid, legal_types, random_tree
from av1nb.files import write_bytes
from av1nb.libaom import Libaom, LibaomError
from av1nb.streams import check_libaom, load_libaom
from av1nb.encoding import encode, synthetic_picture
from conftest import system_libaom

BUILD = Path(__file__).parent.parent / "libaom" / "build.py"
COLUMNS = ["frame", "size", "row", "col", "type"]


@pytest.fixture(scope="module")
def encoder():
    "The library with the hook."
    try:
        return load_encoder()
    except LibaomError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def stock(encoder):
    "A stock libaom of the same release."
    if system_libaom() is None:
        pytest.skip("no libaom is installed in the system to compare with")
    library = check_libaom(Libaom(system_libaom(), "system"))
    if library.version.split("-")[0] != encoder.version.split("-")[0]:
        pytest.skip(
            f"the system's libaom is {library.version}, the one with the hook {encoder.version}"
        )
    return library


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
@pytest.mark.parametrize("cpu_used", [0, 1, 3, 4, 6])
def test_unused_it_writes_the_bytes_of_the_stock_library(encoder, stock, mode, cpu_used):
    for pictures, cq_level in ((scene(136, 104), 32), (scene(101, 67, frames=2), 50)):
        settings = dict(mode=mode, cpu_used=cpu_used, cq_level=cq_level)
        expected = encode(pictures, options={"sb-size": 64}, libaom=stock, **settings).ivf
        assert encode(pictures, options={"sb-size": 64}, libaom=encoder, **settings).ivf == expected
        no_opinion = MaskTable.empty(len(pictures), *pictures[0][0].shape[::-1])
        assert (
            encode_masked(pictures, no_opinion, log=True, encoder=encoder, **settings).ivf
            == expected
        )


@pytest.mark.parametrize("mode", ["allintra", "good"])
@pytest.mark.parametrize("cpu_used", [0, 2, 4, 5])
def test_any_legal_tree_comes_out_as_requested(encoder, mode, cpu_used):
    # the last row and column of superblocks reach over the edge; every picture has a tree of its
    # own
    width, height, frames = 200, 150, 3
    tree = pd.concat(
        [random_tree(width, height, seed=10 * cpu_used + f).assign(frame=f) for f in range(frames)]
    )
    result = encode_masked(
        scene(width, height, frames),
        masks_from_nodes(tree, width, height),
        mode=mode,
        cpu_used=cpu_used,
        cq_level=43,
        encoder=encoder,
    )
    pd.testing.assert_frame_equal(tree_of(result.nodes), tree_of(tree))
    assert (
        result.counts["visited"] == result.counts["limited"] == len(tree)
        and result.counts["ignored"] == result.counts["retried"] == 0
    )


@pytest.mark.parametrize("mode", ["allintra", "good"])
@pytest.mark.parametrize("cpu_used", [1, 3, 6])
def test_its_own_tree_comes_out_again(encoder, mode, cpu_used):
    pictures, settings = scene(192, 136, 2), dict(
        mode=mode, cpu_used=cpu_used, cq_level=32, encoder=encoder
    )
    own = encode_masked(pictures, log=True, **settings)
    forced = encode_masked(pictures, masks_from_nodes(own.nodes, 192, 136), **settings)
    pd.testing.assert_frame_equal(tree_of(forced.nodes), tree_of(own.nodes))
    assert forced.counts["visited"] == len(own.nodes) < own.counts["visited"] == len(own.log.nodes)
    assert abs(forced.psnr - own.psnr) < 0.5 and abs(forced.bytes / own.bytes - 1) < 0.05
    coded = own.nodes.merge(
        own.log.nodes, on=COLUMNS[:-1], suffixes=("", "_searched"), validate="1:1"
    )
    assert len(coded) == len(own.nodes) and (coded["type"] == coded["type_searched"]).all()


def test_the_type_that_wins_is_the_cheapest(encoder):
    log = encode_masked(scene(192, 136), cpu_used=2, cq_level=32, log=True, encoder=encoder).log
    found = log.nodes["type"].to_numpy() >= 0
    assert (
        found.sum() > 100
        and regret(log.costs[found], log.nodes["type"].to_numpy()[found]).max() == 0
    )
    tried = ~np.isnan(log.costs)
    assert (tried == ~np.isnan(log.seconds)).all()
    for size in (64, 32, 16, 8):
        of_size = (log.nodes["size"] == size).to_numpy()
        assert not tried[of_size][:, [t not in legal_types(size) for t in PartitionType]].any()


def test_an_exhaustive_search_knows_every_cost(encoder):
    width, height = 136, 104
    log = search_costs(scene(width, height), cpu_used=4, cq_level=43, encoder=encoder)
    for size in (64, 32, 16, 8):
        possible = legal_grid(size, width, height)
        # every block that there is
        assert (log.nodes["size"] == size).sum() == possible.any(-1).sum()
        inside = log.at(size)
        assert np.isfinite(inside.costs[:, list(legal_types(size))]).all()
        assert regret(inside.costs, inside.nodes["type"].to_numpy()).max() == 0


def test_only_what_is_allowed_is_tried(encoder):
    width, height = 192, 136
    for types in ((0, 3), (0, 1, 3), (0, 3, 4, 5, 6, 7)):
        for override in (False, True):
            result = encode_masked(
                scene(width, height),
                uniform_masks(1, width, height, types, override=override),
                cpu_used=3,
                cq_level=32,
                log=True,
                encoder=encoder,
            )
            inside = is_inside(result.log.nodes, width, height)
            assert np.isnan(
                result.log.costs[inside][:, [t for t in range(10) if t not in types]]
            ).all()
            assert set(result.nodes["type"][is_inside(result.nodes, width, height)]) <= set(types)
            if override:
                assert (
                    ~np.isnan(
                        result.log.costs[inside & (result.log.nodes["size"] == 16)][:, list(types)]
                    )
                ).all()


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


def test_threads_do_as_they_are_told(encoder):
    tree = random_tree(256, 200, seed=5).assign(frame=0)
    result = encode_masked(
        scene(256, 200),
        masks_from_nodes(tree, 256, 200),
        cpu_used=4,
        cq_level=43,
        threads=2,
        options={"row-mt": 1, "tile-columns": 1},
        log=True,
        encoder=encoder,
    )
    pd.testing.assert_frame_equal(tree_of(result.nodes), tree_of(tree))
    pd.testing.assert_frame_equal(tree_of(result.log.nodes), tree_of(tree))


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
    write_bytes(tmp_path / "libaom-3.6.0-0/libaom.so", b"\x7fELF but not really")
    write_bytes(tmp_path / "libaom-3.6.0-0/build.json", b"{}")
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


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "does not hold aom_3.6.0.orig.tar.gz"),
        (b"something else", "is not the libaom 3.6.0 that the patch was made for"),
    ],
)
def test_a_source_that_does_not_fit_is_refused(tmp_path, content, message):
    build = runpy.run_path(str(BUILD))
    if content:
        (tmp_path / build["TARBALL"]).write_bytes(content)
    with pytest.raises(build["BuildError"], match=message):
        build["unpack"](tmp_path, tmp_path / "tree")


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
