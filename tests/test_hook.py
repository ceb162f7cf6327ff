"""The partition hook in libaom.

Unused it is stock, masks are obeyed with any threads, superblocks, tunings and content, logs are
true, and where there is no search to steer, that is said.
"""

import re
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from av1nb.costs import regret
from av1nb.encoding import encode, synthetic_picture
from av1nb.libaom import Libaom, LibaomError
from av1nb.masks import MaskTable, masks_from_nodes, uniform_masks
from av1nb.partitions import PartitionType, is_inside, legal_grid, legal_types, random_tree
from av1nb.steering import (
    RELEASE,
    _require_counts,
    _tables_in,
    _tables_of,
    encode_masked,
    encoder_cache,
    load_encoder,
    search_costs,
)
from av1nb.streams import check_libaom
from conftest import system_libaom

BUILD = Path(__file__).parent.parent / "libaom" / "build.py"
SCRIPT = runpy.run_path(str(BUILD))
COLUMNS = ["frame", "size", "row", "col", "type"]
MODES = pytest.mark.parametrize("mode", ["allintra", "good"])
SPEEDS = pytest.mark.parametrize("cpu_used", range(7))
# Options that change the quantiser, the distortion or the rate between blocks; the second value
# says whether libaom takes them for good quality too.
TUNINGS = {
    "tune=iq": ({"tune": "iq"}, False),
    "tune=ssim": ({"tune": "ssim"}, True),
    "variance boost": ({"deltaq-mode": 6, "deltaq-strength": 200}, False),
    "perceptual deltaq": ({"deltaq-mode": 3, "delta-lf-mode": 1}, True),
    "user rating deltaq": ({"deltaq-mode": 4}, True),
    "quantiser sweep": ({"deltaq-mode": 3, "sb-qp-sweep": 1}, True),
    "qm-psnr": ({"dist-metric": "qm-psnr", "enable-qm": 1, "sharpness": 7}, True),
    "tune=iq, 128": ({"tune": "iq", "sb-size": 128}, False),
    "lossless": ({"lossless": 1}, True),
    "screen content": ({"tune-content": "screen"}, True),
}


@pytest.fixture(scope="module")
def encoder():
    "The library of this patch in the cache."
    path = encoder_cache() / f"libaom-{RELEASE}-{SCRIPT['key'](RELEASE)}" / "libaom.so"
    if not path.is_file():
        pytest.skip(f"libaom {RELEASE} with this partition hook is not built: make encoder")
    return load_encoder(path)


@pytest.fixture(scope="module")
def stock(encoder):
    "A stock libaom of the same release: that of the cache, else the system's."
    path, source = encoder_cache() / f"stock-{RELEASE}" / "libaom.so", "cache"
    if not path.is_file():
        path, source = system_libaom(), "system"
    if path is not None:
        library = check_libaom(Libaom(path, source))
        if library.version.split("-")[0] == RELEASE:
            with pytest.raises(LibaomError, match="is a stock library"):
                load_encoder(path)
            return library
    pytest.skip(f"no stock libaom {RELEASE} to compare with: make encoder STOCK=1 builds one")


def scene(width, height, frames=1, seed=3):
    return [synthetic_picture(width, height, seed, 3.0 * n) for n in range(frames)]


def tree_of(nodes):
    "Nodes in one order and one type, to compare."
    return nodes[COLUMNS].sort_values(COLUMNS[:-1]).reset_index(drop=True).astype(np.int64)


def random_trees(width, height, frames, seed, **settings):
    trees = (random_tree(width, height, seed=seed + f, **settings) for f in range(frames))
    return pd.concat([tree.assign(frame=f) for f, tree in enumerate(trees)])


def random_masks(width, height, frames, seed):
    "Legal masks of many kinds, some of them without an opinion."
    table, rng = MaskTable.empty(frames, width, height), np.random.default_rng(seed)
    for size in (128, 64, 32, 16, 8):
        words = table.at(size)
        types = [np.uint16(1) << rng.choice(legal_types(size), words.shape) for _ in range(3)]
        words[:] = types[0] | types[1] | types[2]
        words |= np.where(rng.random(words.shape) < 0.5, 0x8000, 0x0009).astype(np.uint16)
        words[rng.random(words.shape) < 0.2] = 0
    return table


def trees_of_small_blocks(width, height, frames, seed):
    "Trees whose largest block has 32x32 pixels, the most that speed 6 of all intra takes."
    nodes = random_trees(width, height, frames, 0, split=1.0).reset_index(drop=True)
    rng, places = np.random.default_rng(seed), nodes[["frame", "row", "col"]]
    whole = (nodes["size"] == 32) & is_inside(nodes, width, height)
    whole &= rng.random(len(nodes)) < 0.6
    types = [t for t in legal_types(32) if t != PartitionType.SPLIT]
    nodes.loc[whole, "type"] = rng.choice(types, whole.sum())
    inside = set(map(tuple, places[whole].to_numpy()))
    parents = places.assign(row=nodes["row"] // 32 * 32, col=nodes["col"] // 32 * 32).to_numpy()
    below = (nodes["size"] < 32) & np.array([tuple(parent) in inside for parent in parents])
    return nodes[~below]


def assert_same_result(result, expected):
    assert result.ivf == expected.ivf and result.counts == expected.counts
    pd.testing.assert_frame_equal(result.log.nodes, expected.log.nodes)
    np.testing.assert_array_equal(result.log.costs, expected.log.costs)


def assert_log_holds_the_coded_tree(result):
    keys = COLUMNS[:-1]
    coded = result.nodes.merge(
        result.log.nodes, on=keys, suffixes=("", "_searched"), validate="1:1"
    )
    assert len(coded) == len(result.nodes) and (coded["type"] == coded["type_searched"]).all()


# ---- The build


def test_the_patch_only_adds_lines_to_the_release_that_is_looked_for():
    assert SCRIPT["DEFAULT"] == RELEASE and set(SCRIPT["RELEASES"]) == {RELEASE}
    lines = (BUILD.parent / SCRIPT["RELEASES"][RELEASE].patch).read_text().splitlines()
    body = [line for line in lines if not line.startswith(("---", "+++", "@@"))]
    assert not [line for line in body if line.startswith("-")]
    assert len([line for line in body if line.startswith("+") and "av1nb_" in line]) > 20


def test_the_source_entries_name_the_release_that_has_the_source(tmp_path):
    parts = tmp_path / "sources.list.d"
    parts.mkdir()
    (parts / "debian.sources").write_text(
        "Types: deb\n# a comment\nURIs: http://deb.debian.org/debian\nSuites: bookworm\n"
        "Components: main\nSigned-By: /usr/share/keyrings/debian-archive-keyring.gpg\n\n"
        "Types: deb\nURIs: http://deb.debian.org/debian-security\nSuites: bookworm-security\n\n"
        "Types: deb\nEnabled: no\nURIs: http://off.example/debian\nSuites: sid\n"
    )
    (tmp_path / "sources.list").write_text(
        "deb [arch=amd64 signed-by=/k.gpg] https://mirror.example/debian/ bookworm main\n"
        "# deb http://no.example/debian bookworm main\n"
        "deb https://packages.example/apt some-debian main\n"
    )
    assert SCRIPT["source_entries"]("trixie", tmp_path) == [
        (
            "Types: deb-src\nURIs: http://deb.debian.org/debian\nSuites: trixie\nComponents: main\n"
            "Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg"
        ),
        (
            "Types: deb-src\nURIs: https://mirror.example/debian/\nSuites: trixie\nComponents:"
            " main\nSigned-By: /k.gpg"
        ),
    ]


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "does not hold aom_3.12.1.orig.tar.gz"),
        (b"something else", "is not the libaom 3.12.1 that the patch was made for"),
    ],
)
def test_a_source_that_does_not_fit_is_refused(tmp_path, content, message):
    if content:
        (tmp_path / "aom_3.12.1.orig.tar.gz").write_bytes(content)
    with pytest.raises(SCRIPT["BuildError"], match=message):
        SCRIPT["unpack"](tmp_path, tmp_path / "tree", RELEASE)
    assert not (tmp_path / "tree").exists()


def test_a_release_without_a_patch_is_refused(tmp_path):
    command = [sys.executable, BUILD, "--version", "3.11.0", "--cache", tmp_path / "cache"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "choose from" in done.stderr and RELEASE in done.stderr
    assert not list(tmp_path.iterdir())


# ---- Unused


@MODES
@SPEEDS
def test_unused_it_writes_the_bytes_of_the_stock_library(encoder, stock, mode, cpu_used):
    for pictures, cq_level in ((scene(136, 104), 32), (scene(101, 67, frames=2), 50)):
        settings = dict(mode=mode, cpu_used=cpu_used, cq_level=cq_level)
        options = {"sb-size": 64}
        expected = encode(pictures, options=options, libaom=stock, **settings).ivf
        assert encode(pictures, options=options, libaom=encoder, **settings).ivf == expected
        table = MaskTable.empty(len(pictures), *pictures[0][0].shape[::-1])
        watched = encode_masked(pictures, table, log=True, encoder=encoder, **settings)
        assert watched.ivf == expected


@MODES
@pytest.mark.parametrize("cpu_used", [1, 3, 4, 6])
def test_a_table_without_opinions_changes_nothing(encoder, mode, cpu_used):
    pictures, settings = scene(104, 72, 2), dict(mode=mode, cpu_used=cpu_used, cq_level=40)
    plain = encode(pictures, options={"sb-size": 64}, libaom=encoder, **settings).ivf
    table = MaskTable.empty(2, 104, 72)
    watched = encode_masked(pictures, table, log=True, encoder=encoder, **settings)
    assert watched.ivf == plain
    assert_log_holds_the_coded_tree(watched)


# ---- Masks


@MODES
@SPEEDS
def test_any_legal_tree_comes_out_as_requested(encoder, mode, cpu_used):
    width, height, frames = 200, 150, 2  # the last superblocks reach over the edges
    small = mode == "allintra" and cpu_used == 6
    make = trees_of_small_blocks if small else random_trees
    trees = make(width, height, frames, 10 * cpu_used)
    table = masks_from_nodes(trees, width, height)
    result = encode_masked(
        scene(width, height, frames),
        table,
        mode=mode,
        cpu_used=cpu_used,
        cq_level=43,
        encoder=encoder,
    )
    pd.testing.assert_frame_equal(tree_of(result.nodes), tree_of(trees))
    assert result.counts == dict(visited=len(trees), limited=len(trees), ignored=0, retried=0)


@pytest.mark.parametrize("mode, cpu_used", [("allintra", 1), ("allintra", 5), ("good", 3)])
def test_any_legal_tree_of_large_superblocks_comes_out_as_requested(encoder, mode, cpu_used):
    width, height = 328, 200
    trees = random_trees(width, height, 2, 20 + cpu_used, sb_size=128)
    assert {0, 1, 2, 3} & set(trees.loc[trees["size"] == 128, "type"]) != {3}
    result = encode_masked(
        scene(width, height, 2),
        masks_from_nodes(trees, width, height),
        mode=mode,
        cpu_used=cpu_used,
        cq_level=43,
        options={"sb-size": 128},
        log=True,
        encoder=encoder,
    )
    pd.testing.assert_frame_equal(tree_of(result.nodes), tree_of(trees))
    assert_log_holds_the_coded_tree(result)


@pytest.mark.parametrize(
    "mode, cpu_used, options, superblock",
    [
        ("allintra", 0, {}, 128),
        ("allintra", 1, {}, 64),
        ("allintra", 0, {"tune": "iq"}, 64),
        ("good", 0, {}, 128),
        ("good", 1, {}, 64),
    ],
)
def test_superblocks_that_libaom_chooses_itself(encoder, mode, cpu_used, options, superblock):
    masks = random_masks(136, 104, 1, 4)
    result = encode_masked(
        scene(136, 104),
        masks,
        mode=mode,
        cpu_used=cpu_used,
        cq_level=43,
        options={"sb-size": "dynamic"} | options,
        log=True,
        encoder=encoder,
    )
    assert result.log.nodes["size"].max() == superblock
    assert result.counts["limited"] > 8 and result.psnr > 25
    assert_log_holds_the_coded_tree(result)


@MODES
@pytest.mark.parametrize("cpu_used", [2, 4, 6])
def test_its_own_tree_comes_out_again(encoder, mode, cpu_used):
    pictures, settings = scene(192, 136, 2), dict(mode=mode, cpu_used=cpu_used, cq_level=32)
    own = encode_masked(pictures, log=True, encoder=encoder, **settings)
    forced = encode_masked(
        pictures, masks_from_nodes(own.nodes, 192, 136), encoder=encoder, **settings
    )
    pd.testing.assert_frame_equal(tree_of(forced.nodes), tree_of(own.nodes))
    assert forced.counts["visited"] == len(own.nodes) < own.counts["visited"]
    assert abs(forced.psnr - own.psnr) < 0.5 and abs(forced.bytes / own.bytes - 1) < 0.05


@MODES
@pytest.mark.parametrize("cpu_used", [3, 6])
def test_only_what_is_allowed_is_tried_and_an_override_tries_it(encoder, mode, cpu_used):
    width, height = 136, 136
    pictures = scene(width, height)
    for types in ((0, 3), (0, 1, 2, 3), (0, 3, 4, 5, 6, 7), (0, 3, 8, 9)):
        for override in (False, True):
            masks = uniform_masks(1, width, height, types, override=override)
            result = encode_masked(
                pictures,
                masks,
                mode=mode,
                cpu_used=cpu_used,
                cq_level=32,
                log=True,
                encoder=encoder,
            )
            nodes = result.log.nodes
            inside = is_inside(nodes, width, height)
            others = [t for t in PartitionType if t not in types]
            assert np.isnan(result.log.costs[inside][:, others]).all()
            assert set(result.nodes["type"][is_inside(result.nodes, width, height)]) <= set(types)
            if override:
                of_size = inside & (nodes["size"] == 16)
                assert not np.isnan(result.log.costs[of_size][:, list(types)]).any()


# ---- Logs


@pytest.mark.parametrize("cpu_used", [2, 6])
def test_the_type_that_wins_is_the_cheapest(encoder, cpu_used):
    result = encode_masked(
        scene(192, 136), cpu_used=cpu_used, cq_level=32, log=True, encoder=encoder
    )
    log, types = result.log, result.log.nodes["type"].to_numpy()
    found = types >= 0
    assert found.sum() > 100 and regret(log.costs[found], types[found]).max() == 0
    assert (np.isnan(log.costs) == np.isnan(log.seconds)).all()
    assert np.nanmin(log.seconds) >= 0


def test_an_exhaustive_search_knows_every_cost(encoder):
    width, height = 136, 104
    log = search_costs(scene(width, height), cpu_used=4, cq_level=43, encoder=encoder)
    for size in (64, 32, 16, 8):
        possible, inside = legal_grid(size, width, height), log.at(size)
        assert (log.nodes["size"] == size).sum() == possible.any(-1).sum()  # every block there is
        assert np.isfinite(inside.costs[:, list(legal_types(size))]).all()
        assert regret(inside.costs, inside.nodes["type"].to_numpy()).max() == 0


# ---- Threads


@pytest.mark.parametrize("tiles", [{"tile-columns": 1}, {"tile-columns": 1, "tile-rows": 1}])
def test_tiles_in_several_threads_give_the_same_bytes(encoder, tiles):
    masks, pictures = random_masks(264, 136, 2, 1), scene(264, 136, 2)
    # From speed 5 of good quality on, libaom 3.12 itself leaves out filters if there are threads.
    for mode, cpu_used in (("allintra", 4), ("allintra", 6), ("good", 4)):
        settings = dict(mode=mode, cpu_used=cpu_used, cq_level=40, log=True, encoder=encoder)
        options = {"row-mt": 0, **tiles}
        one, *several = (
            encode_masked(pictures, masks, threads=n, options=options, **settings)
            for n in (1, 2, 4)
        )
        assert one.counts["limited"] > 100
        for result in several:
            assert_same_result(result, one)


def test_rows_in_several_threads_give_the_same_bytes_whatever_their_number(encoder):
    # With row-mt libaom itself adapts its probabilities in another order as soon as there is more
    # than one thread, so only the streams of two and more threads can be equal.
    masks, pictures = random_masks(264, 200, 1, 2), scene(264, 200)
    for options in ({"row-mt": 1}, {"row-mt": 1, "tile-columns": 1}):
        two, *more = (
            encode_masked(
                pictures,
                masks,
                cpu_used=5,
                cq_level=40,
                threads=n,
                options=options,
                log=True,
                encoder=encoder,
            )
            for n in (2, 2, 3, 4)
        )
        for result in more:
            assert_same_result(result, two)


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_rows_in_several_threads_obey_the_masks(encoder, threads):
    trees = random_trees(264, 200, 2, 5)
    result = encode_masked(
        scene(264, 200, 2),
        masks_from_nodes(trees, 264, 200),
        cpu_used=5,
        cq_level=43,
        threads=threads,
        options={"row-mt": 1, "tile-columns": 1},
        log=True,
        encoder=encoder,
    )
    pd.testing.assert_frame_equal(tree_of(result.nodes), tree_of(trees))
    pd.testing.assert_frame_equal(tree_of(result.log.nodes), tree_of(trees))


@pytest.mark.parametrize(
    "mode, cpu_used, options, equal",
    [
        ("allintra", 5, {"row-mt": 1}, False),  # probabilities adapt in another order
        ("allintra", 5, {"row-mt": 1, "cdf-update-mode": 0}, True),  # they do not adapt
        ("allintra", 5, {"row-mt": 0, "tile-columns": 1}, True),
        ("good", 3, {"row-mt": 0, "tile-columns": 1}, True),
        ("good", 5, {"row-mt": 0, "tile-columns": 1}, False),  # filters are left out
    ],
)
def test_one_thread_and_two_differ_just_where_libaom_itself_does(
    encoder, stock, mode, cpu_used, options, equal
):
    pictures, masks = scene(264, 200), random_masks(264, 200, 1, 2)
    settings = dict(mode=mode, cpu_used=cpu_used, cq_level=40)
    whole = {"sb-size": 64} | options
    one, two = (
        encode(pictures, threads=n, options=whole, libaom=stock, **settings).ivf for n in (1, 2)
    )
    assert (one == two) is equal
    one, two = (
        encode_masked(pictures, masks, threads=n, options=options, encoder=encoder, **settings).ivf
        for n in (1, 2)
    )
    assert (one == two) is equal


# ---- Sizes and tunings


@pytest.mark.parametrize("width, height", [(7680, 40), (40, 4320)])
def test_frames_as_wide_and_as_high_as_8k(encoder, width, height):
    trees = trees_of_small_blocks(width, height, 1, 6)
    result = encode_masked(
        scene(width, height),
        masks_from_nodes(trees, width, height),
        cpu_used=6,
        cq_level=50,
        encoder=encoder,
    )
    pd.testing.assert_frame_equal(tree_of(result.nodes), tree_of(trees))


@MODES
@pytest.mark.parametrize("tuning", TUNINGS)
def test_tunings_leave_the_hook_intact(encoder, mode, tuning):
    options, in_good_quality = TUNINGS[tuning]
    width, height, pictures = 136, 104, scene(136, 104)
    settings = dict(mode=mode, cpu_used=5, cq_level=40)
    whole = {"sb-size": 64} | options
    if mode == "good" and not in_good_quality:
        with pytest.raises(ValueError, match="does not take the value"):
            encode_masked(pictures, options=options, encoder=encoder, **settings)
        return
    plain = encode(pictures, options=whole, libaom=encoder, **settings).ivf
    own = encode_masked(pictures, log=True, options=options, encoder=encoder, **settings)
    assert own.ivf == plain
    assert_log_holds_the_coded_tree(own)
    trees = random_trees(width, height, 1, 9, sb_size=whole["sb-size"])
    forced = encode_masked(
        pictures,
        masks_from_nodes(trees, width, height),
        log=True,
        options=options,
        encoder=encoder,
        **settings,
    )
    pd.testing.assert_frame_equal(tree_of(forced.nodes), tree_of(trees))
    masks = random_masks(width, height, 1, 3)
    masked = encode_masked(pictures, masks, options=options, encoder=encoder, **settings)
    assert masked.counts["limited"] > 8 and masked.psnr > 25


@pytest.mark.parametrize("tuning", ["tune=iq", "variance boost", "perceptual deltaq", "qm-psnr"])
def test_unused_it_is_stock_with_tunings_too(encoder, stock, tuning):
    options = {"sb-size": 64} | TUNINGS[tuning][0]
    for cpu_used in (3, 6):
        settings = dict(cpu_used=cpu_used, cq_level=40, options=options)
        expected = encode(scene(136, 104), libaom=stock, **settings).ivf
        assert encode(scene(136, 104), libaom=encoder, **settings).ivf == expected


# ---- Other content


def drawing(width, height, seed=1):
    """Strokes and letters of few colours, on which libaom 3.12 turns on palettes and intra block
    copy by itself.
    """
    rng = np.random.default_rng(seed)
    glyphs = np.repeat(np.repeat(rng.random((12, 6, 4)) < 0.5, 2, 1), 2, 2)  # [12, 12, 8]
    rows, cols = -(-height // 16), -(-width // 8)
    luma = np.full((rows * 16, cols * 8), 940, np.uint16)
    for row in range(rows):
        letters = glyphs[rng.integers(0, 12, cols)]
        line = np.concatenate(list(letters), axis=1)
        luma[row * 16 : row * 16 + 12][line] = 64
    luma[height // 3 : height // 2, width // 4 : width // 2] = 400  # a filled box
    chroma = np.full((2, (height + 1) // 2, (width + 1) // 2), 512, np.uint16)
    chroma[0, height // 6 : height // 4, width // 8 : width // 4] = 700
    return np.ascontiguousarray(luma[:height, :width]), *chroma


def nearly_empty(width, height):
    "One value, but for a dot in the last superblock."
    luma = np.full((height, width), 512, np.uint16)
    luma[-3:-1, -3:-1] = 900
    return luma, *np.full((2, (height + 1) // 2, (width + 1) // 2), 512, np.uint16)


@MODES
@pytest.mark.parametrize("cpu_used", [1, 4, 6])
@pytest.mark.parametrize("content", [drawing, nearly_empty])
def test_drawings_and_empty_frames_obey_the_masks(encoder, mode, cpu_used, content):
    width, height = 136, 104
    picture = content(width, height)
    settings = dict(mode=mode, cpu_used=cpu_used, cq_level=40, encoder=encoder)
    small = mode == "allintra" and cpu_used == 6
    trees = (trees_of_small_blocks if small else random_trees)(width, height, 1, cpu_used)
    forced = encode_masked([picture], masks_from_nodes(trees, width, height), log=True, **settings)
    pd.testing.assert_frame_equal(tree_of(forced.nodes), tree_of(trees))
    assert_log_holds_the_coded_tree(forced)
    masked = encode_masked([picture], random_masks(width, height, 1, 3), **settings)
    assert masked.counts["limited"] > 8 and masked.psnr > 25


def test_unused_it_is_stock_on_drawings_too(encoder, stock):
    for picture in (drawing(136, 104), nearly_empty(136, 104)):
        for cpu_used in (2, 6):
            settings = dict(cpu_used=cpu_used, cq_level=40, options={"sb-size": 64})
            expected = encode([picture], libaom=stock, **settings).ivf
            assert encode([picture], libaom=encoder, **settings).ivf == expected


# ---- Faults


def test_threads_that_race_for_the_tables_change_nothing(encoder):
    masks, pictures = random_masks(264, 136, 1, 8), scene(264, 136)
    options = {"row-mt": 1, "tile-columns": 1}
    settings = dict(cpu_used=6, cq_level=50, options=options, log=True, encoder=encoder)
    first, *others = (encode_masked(pictures, masks, threads=8, **settings) for _ in range(8))
    for result in others:
        assert_same_result(result, first)


@pytest.mark.parametrize("cpu_used", [7, 8, 9])
def test_a_table_is_harmless_where_libaom_does_not_search(encoder, cpu_used):
    # `encode_masked` refuses these presets; here the library itself is given the table.
    plain = encode(scene(136, 104), cpu_used=cpu_used, libaom=encoder).ivf
    tables = _tables_of(random_masks(136, 104, 1, 1), 1, 136, 104, True)
    with _tables_in(encoder, tables, 1, 136, 104, False) as counts:
        found = encode(scene(136, 104), cpu_used=cpu_used, libaom=encoder).ivf
    assert found == plain and not counts.any()
    assert not tables[1].any() and np.isnan(tables[2]).all()
    with pytest.raises(ValueError, match="did not search for partitions"):
        _require_counts(counts, True, 1, 136, 104, encoder.version)


def test_a_table_of_another_size_is_refused_before_and_during_a_film(encoder):
    with pytest.raises(ValueError, match="The mask table is for 1 frames"):
        encode_masked(scene(136, 104, 2), random_masks(136, 104, 1, 1), encoder=encoder)
    film = [*scene(136, 104), *scene(72, 104)]
    with pytest.raises(ValueError, match="picture 1|72"):
        encode_masked(film, random_masks(136, 104, 2, 1), cpu_used=6, encoder=encoder)
    # Tables that the library is given for another size have no cell for any block.
    plain = encode(scene(136, 104), cpu_used=6, options={"sb-size": 64}, libaom=encoder).ivf
    words, counts = random_masks(72, 104, 1, 1).bits, np.zeros(5, np.int64)
    address = np.ascontiguousarray(words).ctypes.data
    assert encoder.av1nb_hook_set(address, None, None, None, 1, *words.shape[2:], 0) == 0
    try:
        found = encode(scene(136, 104), cpu_used=6, options={"sb-size": 64}, libaom=encoder).ivf
        encoder.av1nb_hook_counts(counts.ctypes.data)
    finally:
        encoder.av1nb_hook_set(*4 * (None,), *4 * (0,))
    assert found == plain and counts[:4].tolist() == [0, 0, 0, 0] and counts[4] > 4


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(cpu_used=7), "faster presets do not search for partitions"),
        (dict(cpu_used=9), "faster presets do not search for partitions"),
        (dict(mode="realtime"), "mode is 'realtime'"),
        (dict(options={"usage": 1}), "usage"),
        (dict(options={"cpu-used": 9}), "cpu-used"),
        (dict(options={"kf-max-dist": 9}), "cannot be combined with masks"),
        (dict(options={"resize-mode": 1}), "cannot be combined with masks"),
    ],
)
def test_what_does_not_search_is_refused(encoder, tmp_path, settings, message):
    masks, path = random_masks(136, 104, 1, 1), tmp_path / "x.ivf"
    with pytest.raises(ValueError, match=message):
        encode_masked(
            scene(136, 104), masks, path=path, encoder=encoder, **{"cpu_used": 6, **settings}
        )
    assert not path.exists()
