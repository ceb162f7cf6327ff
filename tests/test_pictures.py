"""Every format through every door: the luma that comes out is the one that the rule states.

The rule stands here once more, in numpy, and shares no code with the module.
"""

from dataclasses import dataclass
from fractions import Fraction
from types import SimpleNamespace

import av
import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from av1nb import cli, corpus, encoding, joint, recordings, steering, streams
from av1nb.pictures import read_pictures, write_y4m

WIDTH, HEIGHT = 70, 58  # not whole superblocks, and not whole blocks of 16
BT709 = np.array([2126, 7152, 722])  # ten-thousandths


def smooth(shape, top, seed, count=1):
    "Random pictures from 0 to top, soft enough that an encoder is quick with them."
    rng = np.random.default_rng(seed)
    rows, columns = (np.linspace(0, 6, side) for side in shape)
    for _ in range(count):
        a, b, c = rng.uniform(0.5, 2, 3)
        wave = np.sin(a * rows)[:, None] + np.cos(b * columns) + c * rng.uniform(-0.1, 0.1, shape)
        wave = (wave - wave.min()) / max(np.ptp(wave), 1e-9)
        yield np.rint(top * wave).astype(np.int64)


def narrow(samples, bits):
    "Luma of narrow range: ×4, or divided with halves rounded up."
    return np.minimum(np.floor(samples * 2.0 ** (10 - bits) + 0.5), 1023).astype(int)


def full(samples, bits):
    "Luma of full range, stretched to 64–940."
    return np.rint(64 + 876 * samples.astype(float) / (2**bits - 1)).astype(int)


def colours(pixels, top):
    "Luma of RGB."
    weighed = pixels.astype(np.int64) @ BT709
    return np.floor(64 + 876 * weighed / (10000 * top) + 0.5).astype(int)


@dataclass
class Form:
    "A file, what its luma must be, and how it is to be opened."

    path: object
    luma: np.ndarray  # [frames, H, W]
    bits: int = 10
    yuv: tuple = ()  # width, height and bits of a file without a header


def y4m(
    folder, layout, bits, tags="Ip", frame="FRAME", size=(WIDTH, HEIGHT), count=1, full_range=False
):
    width, height = size
    half = lambda side: (side + 1) // 2
    chroma = {
        "420": (half(height), half(width)),
        "422": (height, half(width)),
        "444": (height, width),
        "mono": None,
    }[layout]
    name = layout if bits == 8 else f"{layout}{bits}" if layout == "mono" else f"{layout}p{bits}"
    path, dtype = folder / "form.y4m", np.uint8 if bits == 8 else "<u2"
    lumas = list(smooth((height, width), 2**bits - 1, bits, count))
    with open(path, "wb") as file:
        file.write(f"YUV4MPEG2 W{width} H{height} C{name} F25:1 {tags}\n".encode())
        for n, luma in enumerate(lumas):
            file.write(f"{frame}\n".encode() + luma.astype(dtype).tobytes())
            for seed in (1, 2) if chroma else ():
                [plane] = smooth(chroma, 2**bits - 1, seed + n)
                file.write(plane.astype(dtype).tobytes())
    rule = full if full_range else narrow
    return Form(path, np.stack([rule(luma, bits) for luma in lumas]), bits)


def yuv(folder, bits):
    path = folder / "form.yuv"
    planes = [(HEIGHT, WIDTH)] + 2 * [(HEIGHT // 2, WIDTH // 2)]
    stored = [next(smooth(s, 2**bits - 1, n)) for n, s in enumerate(planes)]
    path.write_bytes(b"".join(p.astype(np.uint8 if bits == 8 else "<u2").tobytes() for p in stored))
    return Form(path, narrow(stored[0], bits)[None], bits, (WIDTH, HEIGHT, bits))


def film(
    folder, ending, layout, bits, codec="ffv1", full_range=False, rgb=False, count=2, **options
):
    "A lossless film; the planes of RGB are G, B, R."
    path, lumas = folder / f"form.{ending}", []
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25, width=WIDTH, height=HEIGHT, pix_fmt=layout)
        stream.options = options
        if full_range:
            stream.codec_context.color_range = 2
        for n in range(count):
            frame = av.VideoFrame(WIDTH, HEIGHT, layout)
            frame.color_range = 2 if full_range else 0
            planes = []
            for k, plane in enumerate(frame.planes):
                [samples] = smooth((plane.height, plane.width), 2**bits - 1, 3 * n + k)
                rows = np.zeros(
                    (plane.height, plane.line_size // (1 if bits == 8 else 2)),
                    np.uint8 if bits == 8 else np.uint16,
                )
                rows[:, : plane.width] = samples
                plane.update(rows.tobytes())
                planes.append(samples)
            if rgb:
                lumas.append(colours(np.stack([planes[2], planes[0], planes[1]], 2), 2**bits - 1))
            else:
                lumas.append((full if full_range else narrow)(planes[0], bits))
            frame.pts, frame.time_base = n, Fraction(1, 25)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return Form(path, np.stack(lumas), bits)


def turned(folder):
    "A film whose track is to be turned clockwise by a quarter."
    form = film(folder, "mp4", "yuv420p", 8, "libx264", qp="0", preset="ultrafast")
    data = bytearray(form.path.read_bytes())
    place = data.index(b"tkhd") + 4 + 40
    one = 1 << 16
    for n, value in enumerate((0, one, 0, -one, 0, 0, 0, 0, 1 << 30)):
        data[place + 4 * n : place + 4 * n + 4] = value.to_bytes(4, "big", signed=True)
    form.path.write_bytes(data)
    return Form(form.path, np.rot90(form.luma, -1, (1, 2)), 8)


def picture(folder, kind):
    rgb = np.stack([next(smooth((HEIGHT, WIDTH), 255, n)) for n in range(3)], 2).astype(np.uint8)
    path, grey = folder / "form.png", rgb[..., 0]
    if kind == "rgb":
        Image.fromarray(rgb).save(path)
        return Form(path, colours(rgb, 255)[None], 8)
    if kind == "rgb 16":
        deep = rgb.astype(np.uint16) * 257 + np.arange(3, dtype=np.uint16)
        deep = np.minimum(deep, 65535 - 3).astype(np.uint16)
        frame = av.VideoFrame.from_ndarray(deep, format="rgb48le").reformat(format="rgb48be")
        writer = av.CodecContext.create("png", "w")
        writer.width, writer.height, writer.pix_fmt = WIDTH, HEIGHT, "rgb48be"
        writer.time_base = Fraction(1, 25)
        path.write_bytes(b"".join(bytes(p) for p in [*writer.encode(frame), *writer.encode()]))
        return Form(path, colours(deep, 65535)[None], 16)
    if kind == "grey":
        Image.fromarray(grey).save(path)
        return Form(path, full(grey, 8)[None], 8)
    if kind == "grey 16":
        deep = grey * np.uint16(251)
        Image.fromarray(deep).save(path)
        return Form(path, full(deep, 16)[None], 16)
    if kind == "palette":
        few = Image.fromarray(rgb).quantize(32)
        few.save(path)
        return Form(path, colours(np.asarray(few.convert("RGB")), 255)[None], 8)
    if kind == "alpha":
        Image.fromarray(np.dstack([rgb, grey])).save(path)
        return Form(path, colours(rgb, 255)[None], 8)
    if kind == "turned":
        exif = Image.Exif()
        exif[0x0112] = 8
        Image.fromarray(rgb).save(path, exif=exif)
        return Form(path, np.rot90(colours(rgb, 255))[None], 8)
    path = folder / "form.jpg"
    Image.fromarray(rgb).save(path, quality=92)
    return Form(path, colours(np.asarray(Image.open(path)), 255)[None], 8)


FORMS = {
    "y4m 420 8": lambda f: y4m(f, "420", 8, count=2),
    "y4m 420 10 FULL": lambda f: y4m(f, "420", 10, "Ip XCOLORRANGE=FULL", full_range=True),
    "y4m 420 10 tags": lambda f: y4m(
        f, "420", 10, "XYSCSS=420P10 XCOLORRANGE=LIMITED XA Ip A1:1", "FRAME Ip XB=1", count=3
    ),
    "y4m 422 12": lambda f: y4m(f, "422", 12),
    "y4m 420 16": lambda f: y4m(f, "420", 16),
    "y4m 444 8 FULL": lambda f: y4m(f, "444", 8, "XCOLORRANGE=FULL XC", full_range=True),
    "y4m 444 16": lambda f: y4m(f, "444", 16),
    "y4m mono 8": lambda f: y4m(f, "mono", 8),
    "y4m mono 10": lambda f: y4m(f, "mono", 10),
    "y4m mono 12 FULL": lambda f: y4m(f, "mono", 12, "XCOLORRANGE=FULL", full_range=True),
    "y4m odd": lambda f: y4m(f, "420", 10, size=(63, 47)),
    "y4m odd 422": lambda f: y4m(f, "422", 8, size=(63, 47)),
    "yuv 8": lambda f: yuv(f, 8),
    "yuv 10": lambda f: yuv(f, 10),
    "mkv 420 8": lambda f: film(f, "mkv", "yuv420p", 8),
    "mkv 422 10 full": lambda f: film(f, "mkv", "yuv422p10le", 10, full_range=True),
    "avi rgb 8": lambda f: film(f, "avi", "gbrp", 8, "utvideo", rgb=True),
    "mp4 turned": turned,
    "png rgb": lambda f: picture(f, "rgb"),
    "png rgb 16": lambda f: picture(f, "rgb 16"),
    "png grey": lambda f: picture(f, "grey"),
    "png grey 16": lambda f: picture(f, "grey 16"),
    "png palette": lambda f: picture(f, "palette"),
    "png alpha": lambda f: picture(f, "alpha"),
    "png turned": lambda f: picture(f, "turned"),
    "jpeg": lambda f: picture(f, "jpeg"),
}


@pytest.fixture(scope="module")
def network():
    return joint.JointPredictor.load()


@pytest.fixture
def asked(network, monkeypatch):
    "Luma planes that the joint network is asked about, in order; answers are kept short."
    seen, answers = [], {}

    def maps(self, luma, qindex, chroma=None):
        seen.append(np.array(luma, int))
        if luma.shape not in answers:
            answers[luma.shape] = network_maps(network, luma, qindex)
        return answers[luma.shape]

    network_maps = joint.JointPredictor.maps
    monkeypatch.setattr(joint.JointPredictor, "maps", maps)
    return seen


def invoke(*arguments):
    done = CliRunner().invoke(cli.app, [str(a) for a in arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def options(form):
    return [o for k, v in zip(("width", "height", "bits"), form.yuv) for o in (f"--{k}", v)]


@pytest.mark.parametrize("name", FORMS)
def test_one_luma_through_every_door(name, tmp_path, asked, monkeypatch):
    form = FORMS[name](tmp_path)
    count, height, width = form.luma.shape
    read = read_pictures(form.path, None, *form.yuv)
    np.testing.assert_array_equal(read.luma, form.luma)
    assert read.bit_depth == form.bits and read.said
    chroma = (count, (height + 1) // 2, (width + 1) // 2)
    assert all(np.stack([p[k] for p in read.planes]).shape == chroma for k in (1, 2))

    # training: the pictures of a recording, imported with its encode and with logs
    keys = dict(zip(("width", "height", "bits"), form.yuv))
    [made] = recordings.import_videos(
        tmp_path / "raw", [form.path], qindexes=(220,), cpu_used=9, excel=False, **keys
    )
    np.testing.assert_array_equal(recordings.read_frames(tmp_path / "raw", made), form.luma)
    assert made.source_bit_depth == form.bits and read.said[0] in made.source
    logs = tmp_path / "raw/logs" / made.name
    [again] = recordings.import_logs(tmp_path / "raw2", [logs], [form.path], excel=False, **keys)
    np.testing.assert_array_equal(recordings.read_frames(tmp_path / "raw2", again), form.luma)

    # what a network is asked about
    stream = tmp_path / "raw/streams" / f"{made.name}.ivf"
    said = invoke(
        "predict",
        form.path,
        "--qindex",
        220,
        "--frames",
        0,
        "--out",
        tmp_path / "p.csv",
        *options(form),
    )
    np.testing.assert_array_equal(asked, form.luma)
    assert read.said[0] in said
    asked.clear()
    invoke("evaluate", stream, "--video", form.path, "--out", tmp_path / "e.json", *options(form))
    np.testing.assert_array_equal(asked[:count], form.luma)

    # what the encoder gets
    given = []

    def encoded(planes, *_, before=None, **__):
        given.extend(planes)
        for number in range(len(planes) if before else 0):
            before(number)  # frames are predicted while those before them are encoded
        raise ValueError("enough")

    asked.clear()
    library = SimpleNamespace(version=steering.RELEASE)
    monkeypatch.setattr(steering, "load_encoder", lambda *_: library)
    monkeypatch.setattr(steering, "encode_masked", encoded)
    # drawn as these pictures are, they would be coded without being looked at
    monkeypatch.setattr(steering, "why_aside", lambda *_, **__: "")
    done = CliRunner().invoke(
        cli.app,
        ["encode", str(form.path), "--out", str(tmp_path / "o.ivf"), *map(str, options(form))],
    )
    assert "enough" in done.output + str(done.exception), done.output
    np.testing.assert_array_equal([p[0] for p in given], form.luma)
    # a warm-up is asked about nothing but zeros
    np.testing.assert_array_equal([luma for luma in asked if luma.any()], form.luma)
    for one, other in zip(given, read.planes):
        assert all((a == b).all() for a, b in zip(one, other))

    # a corpus takes more than 8 bits as they are, and reduces 8 bits
    if form.yuv:
        return
    [crop], facts = corpus.prepare(form.path, frames=1, crop=512)
    number = facts["frames"][0]
    rows, columns = (side // 2 * 2 for side in (height, width))
    if form.bits > 8:
        np.testing.assert_array_equal(crop[0], form.luma[number][:rows, :columns])
    else:
        rows, columns = (int(side / 1.5) // 2 * 2 for side in (height, width))
        small = Image.fromarray(form.luma[number].astype(np.float32)).resize(
            (columns, rows), Image.Resampling.LANCZOS, box=(0, 0, columns * 1.5, rows * 1.5)
        )
        # the rule's luma was rounded before it was made smaller, the corpus rounds once
        assert np.abs(crop[0] - np.clip(np.asarray(small), 4, 1019)).max() < 1.6


@pytest.mark.parametrize("bits, full_range", [(8, False), (8, True), (10, False), (10, True)])
def test_label_keeps_the_luma_of_the_stream(bits, full_range, tmp_path):
    if "libsvtav1" not in av.codecs_available:
        pytest.skip("this PyAV has no SVT-AV1 encoder")
    layout = "yuv420p" if bits == 8 else "yuv420p10le"
    form = film(
        tmp_path, "mkv", layout, bits, "libsvtav1", full_range, preset="10", crf="30", count=1
    )
    invoke("label", form.path, "--out", tmp_path / "out", "--no-excel")
    stored = recordings.read_frames(tmp_path / "out", "form")
    read = read_pictures(form.path, chroma=False)
    np.testing.assert_array_equal(stored, read.luma)
    assert ("full range by its tag" in read.said[0]) == full_range
    assert np.abs(stored - form.luma).mean() < 12  # as lossy coding leaves it
    [frame] = streams.read_trees(form.path)
    [seen] = joint.intra_frames(form.path)
    assert frame.full_range == full_range
    np.testing.assert_array_equal(seen.luma, stored[0])


INTERLACED = pytest.mark.parametrize(
    "tags, frame", [("It", "FRAME"), ("XA Ib", "FRAME"), ("Im", "FRAME"), ("Ip", "FRAME Itip")]
)


@INTERLACED
def test_interlaced_is_refused_everywhere(tags, frame, tmp_path):
    form = y4m(tmp_path, "420", 10, tags, frame)
    invalid = tmp_path / "out"
    for door in (
        lambda: read_pictures(form.path),
        lambda: recordings.import_videos(invalid, [form.path]),
        lambda: recordings.import_logs(invalid, [tmp_path], [form.path]),
        lambda: corpus.prepare(form.path),
    ):
        with pytest.raises(ValueError, match="form.y4m.* is interlaced; .* Deinterlace it first"):
            door()
    stream = tmp_path / "s.ivf"
    encoding.encode([np.full((HEIGHT, WIDTH), 512, np.uint16)], stream, cpu_used=9, cq_level=55)
    for asked in (
        ["predict", str(form.path), "--out", str(invalid), "--qindex", "80"],
        ["evaluate", str(stream), "--video", str(form.path)],
    ):
        done = CliRunner().invoke(cli.app, asked)
        assert done.exit_code and "is interlaced" in done.output + str(done.exception)
    assert not invalid.exists()


@INTERLACED
def test_interlaced_is_not_encoded(tags, frame, tmp_path, encoder):
    form, out = y4m(tmp_path, "420", 10, tags, frame), tmp_path / "out.ivf"
    done = CliRunner().invoke(cli.app, ["encode", str(form.path), "--out", str(out)])
    assert done.exit_code and "is interlaced" in done.output + str(done.exception)
    assert not out.exists()


def test_an_interlaced_film_is_refused(tmp_path):
    path = tmp_path / "i.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg2video", rate=25, width=64, height=64, pix_fmt="yuv420p")
        stream.options = {"flags": "+ildct+ilme"}
        for n in range(2):
            frame = av.VideoFrame(64, 64, "yuv420p")
            for plane in frame.planes:
                plane.update(np.full(plane.buffer_size, 90, np.uint8).tobytes())
            frame.pts = n
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with pytest.raises(ValueError, match="frame 0 is interlaced"):
        read_pictures(path)


def test_one_pixel_wide_comes_in_whole(tmp_path):
    for layout, bits in (("420", 10), ("422", 8), ("mono", 12), ("444", 16)):
        form = y4m(tmp_path, layout, bits, size=(1, 33), count=2)
        read = read_pictures(form.path)
        np.testing.assert_array_equal(read.luma, form.luma)
        assert read.planes[1][1].shape == (17, 1)
        write_y4m(tmp_path / "again.y4m", read.planes)
        np.testing.assert_array_equal(read_pictures(tmp_path / "again.y4m").luma, form.luma)
        with pytest.raises(ValueError, match="1×33|smallest block|16×16"):
            corpus.prepare(form.path)
