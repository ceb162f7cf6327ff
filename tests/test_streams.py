"""Streams end to end: the same bytes as aomenc, the same labels from every libaom, and no damage
that takes the process down.
"""

import importlib.metadata
import re
import shutil
import subprocess
import sys
import textwrap
from ctypes.util import find_library
from pathlib import Path

import av
import numpy as np
import pytest

import av1nb
from av1nb import libaom, streams
from av1nb.partitions import mi_arrays
from av1nb.libaom import Libaom, LibaomError, find_libaom
from av1nb.streams import Trees, check_libaom, describe_frames, load_libaom, read_trees
from av1nb.encoding import encode, synthetic_picture

KNOWN_STREAM = Path(av1nb.__file__).parent / "data" / "known_stream.ivf"


def scene(width, height, frames=1, seed=3, bit_depth=10):
    return [synthetic_picture(width, height, seed, 2.0 * n, bit_depth) for n in range(frames)]


def luma_of(picture):
    plane = picture.planes[0]
    samples = np.frombuffer(plane, "<u2" if "10le" in picture.format.name else "u1")
    return samples.reshape(plane.height, -1)[: picture.height, : picture.width]


def check_frames(stream, pictures, library):
    "Trees that tile their frames, one for each picture, and the pixels of dav1d."
    with av.open(str(stream)) as container:
        decoded = [luma_of(picture) for picture in container.decode(video=0)]
    frames = list(read_trees(stream, library))
    shown = [f for f in frames if f.index >= 0]
    assert [f.index for f in shown] == list(range(pictures))
    for frame, luma in zip(shown, decoded, strict=True):
        assert np.array_equal(frame.luma, luma)
    for frame in frames:
        block_size, partition = mi_arrays(frame.nodes(), frame.width, frame.height)
        assert np.array_equal(block_size, frame.block_size) and np.array_equal(
            partition, frame.partition
        )
    return frames


@pytest.fixture(scope="module")
def system_libaom():
    "The system's libaom, the one that aomenc uses."
    if find_library("aom") is None:
        pytest.skip("no libaom is installed in the system")
    return check_libaom(Libaom(find_library("aom"), "system"))


@pytest.fixture(scope="module")
def aomenc(system_libaom, tmp_path_factory):
    "Function that encodes 10-bit pictures with aomenc and returns the IVF file's bytes."
    if shutil.which("aomenc") is None:
        pytest.skip("aomenc is not installed (Debian package aom-tools)")
    about = subprocess.run(["aomenc", "--help"], capture_output=True, text=True).stdout
    if not re.search(rf"Encoder v?{re.escape(system_libaom.version)} ", about):
        pytest.skip("aomenc is of another release than the system's libaom")
    folder = tmp_path_factory.mktemp("aomenc")

    def run(pictures, *arguments):
        height, width = pictures[0][0].shape
        (folder / "in.yuv").write_bytes(
            b"".join(plane.astype("<u2").tobytes() for planes in pictures for plane in planes)
        )
        size = [f"--width={width}", f"--height={height}", "--bit-depth=10", "--input-bit-depth=10"]
        files = [f"--output={folder / 'out.ivf'}", folder / "in.yuv"]
        subprocess.run(
            [
                "aomenc",
                "--ivf",
                "--end-usage=q",
                "--threads=1",
                "--quiet",
                *size,
                *arguments,
                *files,
            ],
            check=True,
            capture_output=True,
        )
        return (folder / "out.ivf").read_bytes()

    return run


@pytest.mark.parametrize(
    "width, height, frames, mode, cq_level, cpu_used, options, passes",
    [
        (256, 144, 1, "allintra", 30, 3, {}, None),
        (131, 97, 3, "allintra", 43, 4, {"sb-size": 64}, None),
        (
            192,
            128,
            1,
            "allintra",
            20,
            4,
            {"sb-size": 128, "deltaq-mode": 3, "enable-cdef": 0},
            None,
        ),
        (192, 128, 1, "allintra", 55, 6, {"limit": 1}, None),
        (600, 200, 1, "allintra", 32, 6, {"tile-columns": 1, "tile-rows": 1}, None),
        (131, 97, 3, "good", 32, 4, {}, None),
        (131, 97, 2, "good", 20, 4, {"enable-ab-partitions": 0, "min-partition-size": 8}, 1),
        (160, 90, 6, "good", 40, 5, {"kf-max-dist": 9999, "lag-in-frames": 19}, None),
    ],
)
def test_same_bytes_as_aomenc(
    aomenc, system_libaom, width, height, frames, mode, cq_level, cpu_used, options, passes
):
    pictures = scene(width, height, frames)
    key_frames = ["--kf-max-dist=0"] if mode == "good" and "kf-max-dist" not in options else []
    arguments = [
        f"--{mode}",
        f"--cq-level={cq_level}",
        f"--cpu-used={cpu_used}",
        *key_frames,
        *(f"--{k}={v}" for k, v in options.items()),
    ]
    expected = aomenc(pictures, *arguments, *([f"--passes={passes}"] if passes else []))
    result = encode(
        pictures,
        mode=mode,
        cq_level=cq_level,
        cpu_used=cpu_used,
        options=options,
        passes=passes,
        libaom=system_libaom,
    )
    assert result.ivf == expected
    assert result.seconds > 0


def test_every_option_has_an_effect():
    "An option that is silently dropped would leave the stream as it is."
    pictures = scene(160, 120)
    plain = encode(pictures, cpu_used=4).ivf
    for options in (
        {"enable-rect-partitions": 0},
        {"max-partition-size": 16},
        {"enable-restoration": 0},
        {"sb-size": 128},
        {"limit": 1},
    ):
        assert encode(pictures, cpu_used=4, options=options).ivf != plain, options
    (frame,) = Trees(
        encode(pictures, cpu_used=4, options={"max-partition-size": 16}).packets,
        "small blocks",
        load_libaom(),
    )
    assert frame.nodes().query("size > 16")["type"].eq(3).all()


def test_quantiser_is_that_of_the_block():
    "It was once taken to be 80 everywhere, although streams say it for each block."
    for cq_level, qindex in ((20, 80), (55, 220)):
        (frame,) = Trees(
            encode(scene(128, 64), cq_level=cq_level, cpu_used=6).packets, "one", load_libaom()
        )
        assert set(frame.nodes()["qindex"]) == {frame.base_qindex} == {qindex}
    key = next(frame for frame in read_trees(KNOWN_STREAM) if frame.key)
    assert key.nodes()["qindex"].nunique() > 3  # delta-q


CASES = {
    "8 bits": (scene(90, 70, 2, bit_depth=8), dict(bit_depth=8)),
    "monochrome": ([p[0] for p in scene(90, 70, 2)], dict(monochrome=True)),
    "superblocks of 128": (scene(300, 270), dict(options={"sb-size": 128})),
    "inter frames, superblocks of 128": (
        scene(300, 270, 4),
        dict(mode="good", options={"sb-size": 128, "kf-max-dist": 99}),
    ),
    "tiles": (scene(600, 270), dict(options={"tile-columns": 2, "tile-rows": 1})),
    "tile groups": (
        scene(600, 270),
        dict(options={"tile-columns": 2, "tile-rows": 1, "num-tile-groups": 3}),
    ),
    "one pixel": (scene(1, 1, 2), {}),
    "odd size": (scene(65, 127, 2), {}),
    "still picture": (scene(90, 70), dict(options={"limit": 1})),
    "forward key frames": (
        scene(96, 64, 40),
        dict(
            mode="good",
            options={"enable-fwd-kf": 1, "kf-max-dist": 16, "kf-min-dist": 16, "lag-in-frames": 19},
        ),
    ),
    "lossless": (scene(90, 70), dict(options={"lossless": 1})),
    "film grain": (
        scene(96, 64, 3),
        dict(mode="good", options={"film-grain-test": 1, "kf-max-dist": 99}),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_pixels_and_trees(case, tmp_path):
    pictures, arguments = CASES[case]
    encode(pictures, tmp_path / "case.ivf", cpu_used=6, **arguments)
    frames = check_frames(tmp_path / "case.ivf", len(pictures), None)
    assert frames[0].sb_size == (128 if "128" in case else 64)
    assert frames[0].bit_depth == arguments.get("bit_depth", 10)
    assert frames[0].monochrome == (case == "monochrome")


def test_every_libaom_reads_the_same(system_libaom, tmp_path):
    pictures = scene(229, 131, 5)
    for mode, options in (("allintra", {}), ("good", {"kf-max-dist": 99})):
        encode(pictures, tmp_path / "a.ivf", mode=mode, options=options, cpu_used=5)
        read = [
            describe_frames(read_trees(tmp_path / "a.ivf", library))
            for library in (load_libaom(), system_libaom)
        ]
        assert read[0] == read[1]


def test_library_is_found_in_the_said_order(monkeypatch, tmp_path, system_libaom):
    named = tmp_path / "libaom-patched.so"
    named.symlink_to(Path(find_libaom()[0]))
    assert find_libaom()[1] == "imagecodecs wheel"
    monkeypatch.setenv("AV1NB_LIBAOM", str(named))
    assert find_libaom() == (named.resolve(), "environment variable AV1NB_LIBAOM")
    assert load_libaom().source == "environment variable AV1NB_LIBAOM"
    assert find_libaom(named)[1] == "given path"
    monkeypatch.setenv("AV1NB_LIBAOM", str(tmp_path / "none.so"))
    with pytest.raises(
        LibaomError, match="no libaom library at .*none.so .environment variable AV1NB_LIBAOM"
    ):
        load_libaom()
    monkeypatch.delenv("AV1NB_LIBAOM")

    def not_installed(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(libaom.importlib.metadata, "files", not_installed)
    assert find_libaom()[1] == "system"
    monkeypatch.setattr(libaom, "find_library", lambda name: None)
    with pytest.raises(
        LibaomError, match="No libaom library was found: install the Python package imagecodecs"
    ):
        find_libaom()


def test_release_with_another_layout_is_refused(monkeypatch):
    monkeypatch.setattr(libaom, "_GET_MI_INFO", 9999)  # a control that no release has
    with pytest.raises(
        LibaomError,
        match=(
            r"libaom [\d.]+ \(.*\) is not supported: .* does not say how the frame is partitioned"
        ),
    ):
        check_libaom(Libaom(*find_libaom()))
    monkeypatch.undo()
    monkeypatch.setattr(streams, "_GET_BASE_QINDEX", 294)  # as if two controls had changed places
    with pytest.raises(LibaomError, match="gives other values for base_qindex"):
        check_libaom(Libaom(*find_libaom()))


FUZZ = """
    import random, sys
    from collections import Counter
    from av1nb.files import write_bytes
    from av1nb.bitstream import StreamError
    from av1nb.streams import read_trees
    source, target, way, count = sys.argv[1:5]
    whole, outcomes = open(source, "rb").read(), Counter()
    for n in range(int(count)):
        rng, data = random.Random(n), bytearray(whole)
        if way == "cut": data = data[:n * len(whole) // int(count)]
        else:
            for _ in range(rng.choice((1, 1, 2, 5, 20))): data[rng.randrange(len(data))] = rng.randrange(256)
        write_bytes(target, bytes(data))
        try: outcomes["frames" if list(read_trees(target)) else "nothing"] += 1
        except StreamError as error:
            assert target in str(error), error
            outcomes["refused"] += 1
    print(dict(outcomes))
"""


@pytest.mark.parametrize("way", ["cut", "changed"])
@pytest.mark.parametrize("container", ["ivf", "obu", "mkv", "mp4"])
def test_damaged_streams(container, way, tmp_path):
    """Two hundred damaged variants each: an error that names the file, or frames, but never a
    crash; what is cut off is always refused.
    """
    source = tmp_path / f"source.{container}"
    with av.open(str(KNOWN_STREAM)) as read, av.open(str(source), "w") as write:
        stream = write.add_stream_from_template(read.streams.video[0], opaque=True)
        for packet in read.demux(read.streams.video[0]):
            if packet.size:
                packet.stream = stream
                write.mux(packet)
    command = [
        sys.executable,
        "-c",
        textwrap.dedent(FUZZ),
        source,
        tmp_path / f"damaged.{container}",
        way,
        "200",
    ]
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True)
    assert done.returncode == 0, f"ended with {done.returncode}: {done.stderr[-2000:]}"
    outcomes = eval(done.stdout.splitlines()[-1])
    assert sum(outcomes.values()) == 200
    assert outcomes["refused"] > 150
    if way == "cut" and container != "obu":
        assert outcomes == {"refused": 200}


BARE = """
    import sys

    class Missing:
        def find_spec(self, name, path=None, target=None):
            if name.partition(".")[0] in ("av", "numba", "llvmlite", "imagecodecs"):
                raise ImportError(f"{name} is not installed")

    sys.meta_path.insert(0, Missing())
    from av1nb import encoding, streams
    from av1nb.bitstream import temporal_units

    stream, matroska = sys.argv[1:]
    print(len(list(temporal_units(stream))))
    for read in (lambda: list(temporal_units(matroska)), lambda: list(streams.read_trees(stream))):
        try: read()
        except (ValueError, RuntimeError) as error: print(type(error).__name__, error)
"""


def test_what_a_machine_without_pyav_and_numba_can_do(tmp_path, monkeypatch):
    (tmp_path / "film.mkv").write_bytes(b"\x1a\x45\xdf\xa3" + bytes(60))
    monkeypatch.setenv("AV1NB_LIBAOM", str(find_libaom()[0]))
    command = [sys.executable, "-c", textwrap.dedent(BARE), KNOWN_STREAM, tmp_path / "film.mkv"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    packets, demuxing, walking = done.stdout.splitlines()
    assert packets == "4"
    assert demuxing.startswith(f"StreamError {tmp_path / 'film.mkv'} is a container that PyAV")
    assert walking.startswith("LibaomError") and "pip install numba" in walking
