"""AVIF files of photographs: what a browser, Pillow (libavif) and our own reader show is the
picture that went in.
"""

import base64
import io
import shutil
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageDraw, ImageOps

from av1nb import stills
from av1nb.encoding import synthetic_picture
from av1nb.libaom import LibaomError
from av1nb.pictures import decode_pictures, read_pictures
from conftest import av1nb

ROOT = Path(__file__).parent.parent
BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
FINE = dict(cq_level=1, cpu_used=6)
# largest mean error of R, G and B at cq level 1, in 8-bit codes: rounding to YCbCr and back takes
# half a code, the quantiser the rest; where four pixels share a chroma sample, only smooth colours
# come back
MEAN_ERROR = 1.0


def smooth(width=61, height=47):
    "Colours that change slowly, so that 4:2:0 loses little of them."
    y, x = np.mgrid[:height, :width]
    red, green = x * 255 // (width - 1), y * 255 // (height - 1)
    blue = (255 * np.sin((x + y) / 40) ** 2).astype(int)
    return np.dstack([red, green, blue]).astype(np.uint8)


def textured(width=61, height=47):
    planes = [synthetic_picture(width, height, seed, bit_depth=8)[0] for seed in range(3)]
    return np.dstack(planes).astype(np.uint8)


def error(shown, pixels):
    return np.abs(np.asarray(shown).astype(float) - pixels).mean()


def opened(data):
    image = Image.open(io.BytesIO(data))
    image.load()
    return image


@pytest.mark.parametrize("bits", [8, 10])
@pytest.mark.parametrize(
    "subsampling, size", [("4:2:0", (61, 47)), ("4:4:4", (61, 47)), ("4:2:0", (1, 1))]
)
def test_colours_come_back(bits, subsampling, size, tmp_path):
    pixels = smooth(*size) if min(size) > 1 else np.full((1, 1, 3), (200, 30, 90), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "in.png")
    still = stills.read_still(tmp_path / "in.png", bits, subsampling)
    image = opened(stills.encode_still(still, **FINE).avif)
    assert image.size == size and image.mode == "RGB"
    assert error(image, pixels) < (MEAN_ERROR if min(size) > 1 else 3)


def test_sixteen_bits_are_ten(tmp_path):
    values = np.linspace(0, 65535, 61 * 47).reshape(47, 61).astype(np.uint16)
    Image.fromarray(values).save(tmp_path / "in.png")
    still = stills.read_still(tmp_path / "in.png")
    assert (still.picture.bits, still.subsampling) == (10, "4:0:0")
    stills.encode_still(still, tmp_path / "out.avif", **FINE)
    back = read_pictures(tmp_path / "out.avif", chroma=False)
    assert back.bit_depth == 10
    # narrow range of 10 bits: a quarter of an 8-bit code is one
    assert error(back.luma[0], 64 + 876 / 65535 * values) < 2


def test_grey_and_palette(tmp_path):
    grey = textured()[..., 0]
    Image.fromarray(grey).save(tmp_path / "grey.png")
    still = stills.read_still(tmp_path / "grey.png")
    assert still.subsampling == "4:0:0"
    image = opened(stills.encode_still(still, **FINE).avif)
    assert error(image.convert("L"), grey) < MEAN_ERROR
    palette = Image.fromarray(smooth()).quantize(16)
    clear = palette.copy()
    clear.info["transparency"] = 3
    for picture, mode in ((palette, "RGB"), (clear, "RGBA")):
        picture.save(tmp_path / "palette.png", transparency=picture.info.get("transparency"))
        with Image.open(tmp_path / "palette.png") as source:
            pixels = np.asarray(source.convert(mode))
        still = stills.read_still(tmp_path / "palette.png")
        image = opened(stills.encode_still(still, **FINE).avif)
        assert image.mode == mode and error(image, pixels) < 2


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_jpeg_stands_upright(orientation, tmp_path):
    note = Image.Exif()
    note[0x0112], note[0x010F] = orientation, "a camera"
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    Image.fromarray(smooth()).save(
        tmp_path / "in.jpg", exif=note, icc_profile=profile, quality=95, subsampling=2
    )
    with Image.open(tmp_path / "in.jpg") as source:
        upright = np.asarray(ImageOps.exif_transpose(source))
    still = stills.read_still(tmp_path / "in.jpg")
    assert (still.subsampling, still.tags.primaries) == ("4:2:0", 2)
    image = opened(stills.encode_still(still, **FINE).avif)
    assert image.info["icc_profile"] == profile
    assert (image.getexif().get(0x0112, 1), image.getexif()[0x010F]) == (1, "a camera")
    assert error(image, upright) < 1.5


def test_alpha_is_whole_in_both_depths(tmp_path):
    pixels = np.dstack([smooth(), textured()[..., 0]])
    Image.fromarray(pixels, "RGBA").save(tmp_path / "in.png")
    for bits in (8, 10):
        still = stills.read_still(tmp_path / "in.png", bits)
        image = opened(stills.encode_still(still, **FINE).avif)
        assert image.mode == "RGBA"
        assert np.abs(np.asarray(image)[..., 3].astype(int) - pixels[..., 3]).max() <= bits // 10
    pixels[..., 3] = 255  # nothing shows through: no second picture
    Image.fromarray(pixels, "RGBA").save(tmp_path / "in.png")
    still = stills.read_still(tmp_path / "in.png")
    assert still.picture.alpha is None


def inks_profile(of_first_ink=(0, 128, 0)):
    """A profile of printing inks (ICC.1:2022) that no formula guesses: the first ink is green, the
    others are grey, and paper is white.
    """
    to_lab = ImageCms.buildTransform(
        ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB"
    )

    def lab(*rgb):
        sample = ImageCms.applyTransform(Image.new("RGB", (1, 1), rgb), to_lab)
        lightness, a, b = sample.tobytes()  # a and b are signed
        return bytes([lightness, a ^ 128, b ^ 128])

    ramp, nodes = bytes(range(256)), b""
    for first, *others in np.ndindex(2, 2, 2, 2):  # the last ink runs fastest
        grey = 255 * (3 - sum(others)) // 3
        nodes += lab(*(of_first_ink if first and not any(others) else 3 * (grey,)))
    unit = struct.pack(">9i", *(65536 * (k in (0, 4, 8)) for k in range(9)))
    table = b"mft1" + bytes(4) + bytes([4, 3, 2, 0]) + unit + 4 * ramp + nodes + 3 * ramp
    white = b"XYZ " + bytes(4) + struct.pack(">3i", 63190, 65536, 54061)
    shelf = {b"A2B0": table + bytes(-len(table) % 4), b"wtpt": white}
    place, entries, data = 128 + 4 + 12 * len(shelf), b"", b""
    for name, content in shelf.items():
        entries += name + struct.pack(">II", place + len(data), len(content))
        data += content
    head = bytes(8) + b"\x02\x40\0\0" + b"prtrCMYKLab " + bytes(12) + b"acsp" + bytes(28)
    head += struct.pack(">3i", 63190, 65536, 54061) + bytes(48)
    body = head + struct.pack(">I", len(shelf)) + entries + data
    return struct.pack(">I", len(body)) + body[4:]


def test_inks_become_srgb_by_their_profile(tmp_path):
    inks = np.zeros((40, 64, 4), np.uint8)
    inks[:, 32:, 0] = 255
    picture = Image.fromarray(inks, "CMYK")
    for profile, said, right in (
        (inks_profile(), "CMYK to sRGB by its colour profile", (0, 128, 0)),
        (b"", "CMYK to RGB without a profile", (0, 255, 255)),
    ):
        picture.save(tmp_path / "in.jpg", quality=100, subsampling=0, icc_profile=profile)
        still = stills.read_still(tmp_path / "in.jpg")
        assert said in str(still) and (still.picture.icc, still.tags.primaries) == (b"", 1)
        image = opened(stills.encode_still(still, **FINE).avif)
        assert "icc_profile" not in image.info
        assert np.abs(np.subtract(image.getpixel((10, 20)), 255)).max() < 4  # paper
        assert np.abs(np.subtract(image.getpixel((50, 20)), right)).max() < 6


def png(path, samples, cicp=None):
    "Write a PNG of 8 or 16 bits, with a chunk cICP."

    def chunk(kind, content):
        head = struct.pack(">I", len(content)) + kind + content
        return head + struct.pack(">I", zlib.crc32(kind + content))

    height, width, channels = samples.shape
    kind = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    head = struct.pack(">IIBBBBB", width, height, 8 * samples.itemsize, kind, 0, 0, 0)
    rows = samples.astype(samples.dtype.newbyteorder(">")).reshape(height, -1)
    data = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    colours = chunk(b"cICP", bytes(cicp)) if cicp else b""
    body = chunk(b"IHDR", head) + colours + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)


@pytest.mark.parametrize("dtype, channels", [("u2", 3), ("u1", 3), ("u2", 1), ("u1", 1)])
def test_colours_that_a_png_names_in_numbers_are_kept(dtype, channels, tmp_path):
    values = smooth()[..., :channels].astype(dtype)
    values = values * 257 if dtype == "u2" else values
    png(tmp_path / "in.png", values, (9, 16, 0, 1))
    still = stills.read_still(tmp_path / "in.png")
    assert "tagged 9/16/9" in str(still)
    stills.encode_still(still, tmp_path / "out.avif", **FINE)
    [(_, found)] = decode_pictures(tmp_path / "out.avif")
    assert (found.cicp, found.full) == ((9, 16, 9), True)
    assert found.bits == (10 if dtype == "u2" else 8)
    shares = values / np.iinfo(dtype).max
    luma = shares @ (0.2627, 0.678, 0.0593) if channels == 3 else shares[..., 0]
    assert error(found.planes[0] / ((1 << found.bits) - 1), luma) < 1 / 255


def test_of_several_pictures_the_first_is_taken_and_said(tmp_path):
    first, *others = (Image.fromarray(smooth() // part) for part in (1, 2, 3))
    folder, out = tmp_path / "photos", tmp_path / "out"
    folder.mkdir()
    paths = [folder / f"{ending}.{ending}" for ending in ("gif", "png", "tif", "webp")]
    for path in paths:
        first.save(path, save_all=True, append_images=others, lossless=True)
    done = av1nb("encode", folder, "--out", out, "--stock", "--speed", 4, "--cq-level", 1)
    for path, line in zip(paths, done.stdout.splitlines(), strict=False):
        assert path.name in line and "the first of 3 pictures in the file" in line
        shown = np.asarray(Image.open(out / f"{path.stem}.avif").convert("RGB"))
        with Image.open(path) as source:
            assert error(shown, np.asarray(source.convert("RGB"))) < 2.5  # a palette's colours jump


@pytest.mark.parametrize("options, said", [(("--stock",), "stock"), ((), "No masks at speed 9")])
def test_the_fastest_preset_writes_a_picture(tmp_path, request, options, said):
    if "--stock" not in options:
        request.getfixturevalue("encoder")
    Image.fromarray(smooth()).save(tmp_path / "in.png")
    out = tmp_path / "out.avif"
    done = av1nb("encode", tmp_path / "in.png", "--out", out, "--speed", 9, *options)
    assert said in done.stdout and np.asarray(Image.open(out)).shape == smooth().shape


def test_colours_multiplied_by_alpha_are_divided_again(tmp_path):
    tifffile = pytest.importorskip("tifffile")
    alpha = np.full((47, 61), 128, np.uint8)
    alpha[:, 30:] = 255
    for deep in (False, True):
        straight = np.dstack([smooth(), alpha]).astype(np.uint16) * (257 if deep else 1)
        top = 65535 if deep else 255
        for extra, part in (("assocalpha", straight[..., 3:] / top), ("unassalpha", 1)):
            colours = np.rint(straight[..., :3] * part)
            stored = np.dstack([colours, straight[..., 3]]).astype(np.uint16 if deep else np.uint8)
            tifffile.imwrite(tmp_path / "in.tif", stored, photometric="rgb", extrasamples=[extra])
            still = stills.read_still(tmp_path / "in.tif", 10 if deep else 8, "4:4:4")
            image = opened(stills.encode_still(still, **FINE).avif)
            assert image.mode == "RGBA" and error(np.asarray(image)[..., :3], smooth()) < 1.5
            assert np.abs(np.asarray(image)[..., 3].astype(int) - alpha).max() <= 1


def test_one_picture_that_fails_in_any_way_does_not_stop_the_others(tmp_path, monkeypatch):
    folder, out = tmp_path / "photos", tmp_path / "out"
    folder.mkdir()
    for name in ("a", "b", "c", "d", "e"):
        Image.fromarray(smooth()).save(folder / f"{name}.png")
    Image.fromarray(smooth(300, 200)).save(folder / "huge.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20000)
    faults = {
        "b": LibaomError("libaom is at fault"),
        "c": MemoryError(),
        "d": RuntimeError("a thread cannot start"),
    }
    code = stills.encode_still

    def faulty(still, target, **settings):
        if target.stem in faults:
            raise faults[target.stem]
        return code(still, target, **settings)

    monkeypatch.setattr(stills, "encode_still", faulty)
    from typer.testing import CliRunner

    from av1nb import cli

    command = ["encode", str(folder), "--out", str(out), "--stock", "--speed", "4"]
    done = CliRunner().invoke(cli.app, command)
    assert done.exit_code == 1
    said = [line for line in done.stderr.splitlines() if "not written: " in line]
    assert len(said) == 5 and "4 of 6 pictures not written" in said[-1]
    for name, words in (
        ("b", "libaom is at fault"),
        ("c", "needs more memory than there is"),
        ("d", "a thread cannot start"),
        ("huge", "exceeds limit"),
    ):
        assert sum(words in line and f"{name}.png" in line for line in said) == 1
    assert sorted(path.name for path in out.iterdir()) == ["a.avif", "e.avif"]


PIXELS = """
const [url, done] = arguments, image = new Image();
image.onerror = () => done("the browser cannot show it");
image.onload = () => {
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [image.naturalWidth, image.naturalHeight];
  const context = canvas.getContext("2d");
  context.drawImage(image, 0, 0);
  const {data} = context.getImageData(0, 0, canvas.width, canvas.height);
  done([canvas.width, canvas.height, ...data]);
};
image.src = url;
"""


@pytest.fixture(scope="module")
def driver():
    pytest.importorskip("selenium.webdriver")
    if not (BROWSER and DRIVER):
        pytest.skip("no browser: install the Debian packages chromium and chromium-driver")
    from test_view import browser

    with browser("--force-color-profile=srgb") as found:
        yield found


def shown_by(driver, data):
    "Pixels that a browser shows of an AVIF file, uint8 [rows, columns, 4]."
    driver.get("about:blank")
    url = f"data:image/avif;base64,{base64.b64encode(data).decode()}"
    found = driver.execute_async_script(PIXELS, url)
    assert isinstance(found, list), found
    return np.array(found[2:]).reshape(found[1], found[0], 4)


@pytest.mark.parametrize("size", [(61, 47), (1, 1)])
@pytest.mark.parametrize(
    "bits, subsampling, mode",
    [
        (8, "4:2:0", "RGB"),
        (8, "4:4:4", "RGB"),
        (10, "4:2:0", "RGB"),
        (10, "4:4:4", "RGB"),
        (8, "4:2:0", "L"),
        (10, "4:2:0", "L"),
        (8, "4:2:0", "LA"),
        (8, "4:4:4", "RGBA"),
        (10, "4:4:4", "RGBA"),
    ],
)
def test_a_browser_shows_what_the_decoder_gives(bits, subsampling, mode, size, driver, tmp_path):
    pixels = smooth(*size) if min(size) > 1 else np.full((1, 1, 3), (200, 30, 90), np.uint8)
    image = Image.fromarray(pixels).convert(mode)
    if mode.endswith("A"):
        image.putalpha(Image.fromarray(np.where(pixels[..., 0] > 90, 255, 0).astype(np.uint8)))
    image.save(tmp_path / "in.png")
    still = stills.read_still(tmp_path / "in.png", bits, subsampling)
    data = stills.encode_still(still, **FINE).avif
    shown = shown_by(driver, data)
    assert shown.shape[1::-1] == size
    decoded = np.asarray(opened(data).convert("RGBA")).astype(int)
    seen = decoded[..., 3] > 0
    # two programs round apart, and interpolate chroma apart
    assert np.abs(shown - decoded)[seen].max() <= 4
    assert np.array_equal(shown[..., 3], decoded[..., 3])
    least = 1.5 if min(size) > 1 else 4
    assert error(shown[seen][:, :3], np.asarray(image.convert("RGB"))[seen]) < least


@pytest.mark.parametrize("orientation", [3, 5, 6])
def test_a_browser_shows_a_photograph_upright(orientation, driver, tmp_path):
    note = Image.Exif()
    note[0x0112] = orientation
    path = tmp_path / "in.jpg"
    Image.fromarray(smooth()).save(path, exif=note, quality=95, subsampling=2)
    data = stills.encode_still(stills.read_still(path), **FINE).avif
    with Image.open(path) as source:
        upright = np.asarray(ImageOps.exif_transpose(source))
    shown = shown_by(driver, data)[..., :3]
    assert np.abs(shown - np.asarray(opened(data)).astype(int)).max() <= 4
    assert error(shown, upright) < 1.5


def test_the_command_line(tmp_path):
    folder, out = tmp_path / "photos", tmp_path / "out"
    folder.mkdir()
    Image.fromarray(textured()).save(folder / "one.png")
    Image.fromarray(textured()).save(folder / "three.jpg")
    (folder / "two.png").write_bytes((folder / "one.png").read_bytes()[:300])
    done = av1nb("encode", folder, "--out", out, "--stock", "--speed", 4, check=False)
    assert done.returncode == 1
    assert "1 of 3 pictures not written" in done.stderr and "two.png" in done.stderr
    assert sorted(path.name for path in out.iterdir()) == ["one.avif", "three.avif"]
    assert "4:2:0" in done.stdout and "stock" in done.stdout


def test_with_predictions_or_said_why_not(tmp_path):
    Image.fromarray(textured(128, 96)).save(tmp_path / "in.png")
    common = ("encode", tmp_path / "in.png", "--chroma", "4:2:0")
    lost = av1nb(
        *common, "--out", tmp_path / "stock.avif", AV1NB_CACHE=str(tmp_path), AV1NB_ENCODER=""
    )
    assert "Encoding without predictions" in lost.stderr and "stock" in lost.stdout
    from av1nb.libaom import LibaomError
    from av1nb.steering import load_encoder

    try:
        load_encoder()
    except LibaomError as missing:
        pytest.skip(str(missing))
    done = av1nb(*common, "--out", tmp_path / "ours.avif", "--budget", 8)
    assert "predicted, masks" in done.stdout
    for name in ("stock.avif", "ours.avif"):
        assert Image.open(tmp_path / name).size == (128, 96)
    bad = av1nb(*common, "--out", tmp_path / "no.ivf", check=False)
    assert bad.returncode == 1 and "are for AVIF" in bad.stderr


def page_of_text(width=160, height=96):
    page = Image.new("L", (width, height), 255)
    for row in range(4, height, 12):
        ImageDraw.Draw(page).text((4, row), "Twenty letters a line", fill=0)
    return page


def test_drawings_are_coded_without_masks_and_that_is_said(tmp_path):
    from av1nb.pictures import write_y4m
    from av1nb.steering import load_encoder, shipped_policies

    try:
        load_encoder()
    except LibaomError as missing:
        pytest.skip(str(missing))
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    page_of_text().save(folder / "page.png")
    Image.fromarray(textured(160, 96)).save(folder / "photo.png")
    Image.new("RGB", (160, 96), (9, 9, 200)).save(folder / "plain.png")
    common = ("--speed", 4, "--policies", shipped_policies())
    page, photo, plain = av1nb("encode", folder, "--out", out, *common).stdout.splitlines()[1:4]
    assert "stock, without masks: drawings or text" in page
    assert "stock, without masks: 100% of its blocks are empty" in plain
    assert "predicted, masks" in photo and "without" not in photo
    luma = np.asarray(page_of_text()).astype(np.uint16) * 3 + 64
    write_y4m(tmp_path / "in.y4m", [luma, synthetic_picture(160, 96)[0]])
    film = ("encode", tmp_path / "in.y4m", "--out", tmp_path / "out.ivf", "--no-compare")
    assert "1 of 2 frames are coded without masks" in av1nb(*film, *common).stdout


def test_a_film_keeps_rate_and_colours_in_its_container(tmp_path):
    import av

    from av1nb.libaom import LibaomError
    from av1nb.steering import load_encoder

    try:
        load_encoder()
    except LibaomError as missing:
        pytest.skip(str(missing))
    luma, blue, red = synthetic_picture(64, 48)
    with av.open(str(tmp_path / "in.mkv"), "w") as file:
        stream = file.add_stream("ffv1", rate=24, width=64, height=48, pix_fmt="yuv420p10le")
        context = stream.codec_context
        context.color_primaries, context.color_trc, context.colorspace = 9, 16, 9
        frame = av.VideoFrame(64, 48, "yuv420p10le")
        for plane, values in zip(frame.planes, (luma, blue, red)):
            rows = np.zeros((plane.height, plane.line_size // 2), np.uint16)
            rows[:, : values.shape[1]] = values
            plane.update(rows.tobytes())
        file.mux([*stream.encode(frame), *stream.encode()])
    av1nb("encode", tmp_path / "in.mkv", "--out", tmp_path / "out.mp4", "--no-compare")
    with av.open(str(tmp_path / "out.mp4")) as file:
        [shown] = file.decode(video=0)
        assert file.streams.video[0].guessed_rate == 24
    tags = (shown.color_primaries, shown.color_trc, shown.colorspace, shown.color_range)
    assert [int(n) for n in tags] == [9, 16, 9, 1]
    bad = av1nb("encode", tmp_path / "in.mkv", "--out", tmp_path / "out.mov", check=False)
    assert bad.returncode == 1 and "ends in none of" in bad.stderr
