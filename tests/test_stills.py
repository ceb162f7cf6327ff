"""AVIF files of photographs: what a browser, Pillow (libavif) and our own reader show is the
picture that went in.
"""

import base64
import io
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from av1nb import stills
from av1nb.encoding import synthetic_picture
from av1nb.pictures import read_pictures
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
        from PIL import ImageOps

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


@pytest.mark.parametrize(
    "bits, subsampling, mode",
    [
        (8, "4:2:0", "RGB"),
        (8, "4:4:4", "RGB"),
        (10, "4:2:0", "RGB"),
        (10, "4:4:4", "RGB"),
        (8, "4:2:0", "L"),
        (8, "4:4:4", "RGBA"),
    ],
)
def test_a_browser_shows_what_the_decoder_gives(bits, subsampling, mode, driver, tmp_path):
    image = Image.fromarray(smooth()).convert(mode)
    if mode == "RGBA":
        image.putalpha(Image.fromarray(np.where(smooth()[..., 0] > 90, 255, 0).astype(np.uint8)))
    image.save(tmp_path / "in.png")
    still = stills.read_still(tmp_path / "in.png", bits, subsampling)
    data = stills.encode_still(still, **FINE).avif
    driver.get("about:blank")
    url = f"data:image/avif;base64,{base64.b64encode(data).decode()}"
    found = driver.execute_async_script(PIXELS, url)
    assert found[:2] == [61, 47], found
    shown = np.array(found[2:]).reshape(47, 61, 4)
    decoded = np.asarray(opened(data).convert("RGBA")).astype(int)
    seen = decoded[..., 3] > 0
    # two programs round apart, and interpolate chroma apart
    assert np.abs(shown - decoded)[seen].max() <= 4
    assert np.array_equal(shown[..., 3], decoded[..., 3])
    assert error(shown[seen][:, :3], np.asarray(image.convert("RGB"))[seen]) < 1.5


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
    done = av1nb(*common, "--out", tmp_path / "ours.avif")
    assert "predicted, masks" in done.stdout
    for name in ("stock.avif", "ours.avif"):
        assert Image.open(tmp_path / name).size == (128, 96)
    bad = av1nb(*common, "--out", tmp_path / "no.ivf", check=False)
    assert bad.returncode == 1 and "are for AVIF" in bad.stderr


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
