"""AVIF files of every shape: what is read equals dav1d's luma, tile by tile and layer by layer, and
a file that is not read says why.
"""

import ctypes
import io
import struct

import av
import numpy as np
import pytest
from PIL import Image

from av1nb import encoding, streams
from av1nb.bitstream import (
    FRAME,
    MAX_BOX,
    SEQUENCE_HEADER,
    StreamError,
    TEMPORAL_DELIMITER,
    contents,
    split_obus,
)
from av1nb.encoding import encode, synthetic_picture
from av1nb.recordings import RecordingPlan, label_stream, list_recordings, read_frames
from av1nb.streams import read_trees
from conftest import av1nb


def box(kind, *content):
    return struct.pack(">I4s", 8 + sum(map(len, content)), kind.encode()) + b"".join(content)


def full(kind, *content, version=0, flags=0):
    return box(kind, struct.pack(">I", version << 24 | flags), *content)


def avif(items, primary=1, references=(), handler=b"pict", iloc=None):
    """An AVIF file of items (number, type, pieces of data, properties, construction); pieces of
    construction 0 lie in `mdat` in reverse order with gaps between them.
    """
    properties, associations, entries, media, inner = [], b"", b"", b"", b""
    for number, kind, pieces, owned, construction in items:
        indexes = range(len(properties) + 1, len(properties) + 1 + len(owned))
        properties += owned
        associations += struct.pack(">HB", number, len(owned)) + bytes(indexes)
        entries += full("infe", struct.pack(">HH4s", number, 0, kind.encode()), b"\0", version=2)
    kinds = {}
    for kind, start, targets in references:
        kinds.setdefault(kind, []).append(
            box(kind, struct.pack(f">HH{len(targets)}H", start, len(targets), *targets))
        )
    places = []
    for number, _, pieces, _, construction in items:
        spans = {}
        for i in reversed(range(len(pieces))):
            if construction == 0:
                spans[i] = len(media), len(pieces[i])
                media += pieces[i] + b"gap"
            else:
                spans[i] = len(inner), len(pieces[i])
                inner += pieces[i] + b"gap"
        places.append((number, construction, [spans[i] for i in range(len(pieces))]))

    def meta(start):
        located = b"".join(
            struct.pack(">HHHH", number, construction, 0, len(spans))
            + b"".join(
                struct.pack(">II", offset + (0 if construction else start), length)
                for offset, length in spans
            )
            for number, construction, spans in places
        )
        return full(
            "meta",
            full("hdlr", struct.pack(">I4s12s", 0, handler, b""), b"\0"),
            full("pitm", struct.pack(">H", primary)),
            (
                full("iloc", struct.pack(">BBH", 0x44, 0, len(items)), located, version=1)
                if iloc is None
                else iloc
            ),
            full("iinf", struct.pack(">H", len(items)), entries),
            full("iref", *[one for of_kind in kinds.values() for one in of_kind]),
            box(
                "iprp",
                box("ipco", *properties),
                full("ipma", struct.pack(">I", len(items)), associations),
            ),
            *([box("idat", inner)] if inner else []),
        )

    head = box("ftyp", b"avif", bytes(4), b"avifmif1miaf")
    return head + meta(len(head) + len(meta(0)) + 8) + box("mdat", media)


def item_data(packet):
    "OBUs of a packet without its delimiters."
    obus = [o for o in split_obus(packet) if o.kind != TEMPORAL_DELIMITER]
    return b"".join(o.coded for o in obus)


def owned(packet, width, height):
    "The properties that a picture of AV1 must have."
    header = next(o for o in split_obus(packet) if o.kind == SEQUENCE_HEADER)
    setup = bytes([0x81, 0, 0b01001100]) + b"\0" + header.coded  # 10 bits, 4:2:0
    return [
        full("ispe", struct.pack(">II", width, height)),
        full("pixi", bytes([3, 10, 10, 10])),
        box("av1C", setup),
    ]


def grid(rows, columns, width, height):
    return bytes([0, 0, rows - 1, columns - 1]) + struct.pack(">HH", width, height)


def picture(seed, width=96, height=64):
    "One coded picture: its packet, and its luma as dav1d decodes it."
    result = encode([synthetic_picture(width, height, seed)], cpu_used=8, cq_level=40)
    return result.packets[0], dav1d(result.ivf)[0]


def dav1d(data):
    "Luma of every picture of a stream, decoded by dav1d."
    with av.open(io.BytesIO(data)) as container:
        return [picture.to_ndarray()[: picture.height] for picture in container.decode(video=0)]


@pytest.fixture(scope="module")
def tiles():
    return [picture(seed) for seed in range(6)]


def plain(packet, pieces=1, construction=0, width=96, height=64, extra=()):
    data = item_data(packet)
    cuts = np.linspace(0, len(data), pieces + 1).astype(int)
    parts = [data[a:b] for a, b in zip(cuts, cuts[1:])]
    return 1, "av01", parts, [*owned(packet, width, height), *extra], construction


def luma(path, part=""):
    return [frame.luma for frame in read_trees(path, hidden="skip", part=part)]


@pytest.mark.parametrize("pieces, construction", [(1, 0), (5, 0), (1, 1), (3, 1)])
def test_pieces_anywhere_are_joined(pieces, construction, tiles, tmp_path):
    packet, expected = tiles[0]
    path = tmp_path / "photo.avif"
    path.write_bytes(avif([plain(packet, pieces, construction)]))
    assert Image.open(path).size == (96, 64)  # libavif takes it for a valid file
    (found,) = luma(path)
    assert np.array_equal(found, expected)


def test_a_grid_is_read_tile_by_tile(tiles, tmp_path):
    path = tmp_path / "photo.avif"
    alpha = (20, "av01", [item_data(tiles[5][0])], owned(tiles[5][0], 96, 64), 0)
    items = [(1, "grid", [grid(2, 3, 288, 128)], [full("ispe", struct.pack(">II", 288, 128))], 1)]
    items += [
        (2 + n, "av01", [item_data(packet)], owned(packet, 96, 64), 0)
        for n, (packet, _) in enumerate(tiles)
    ]
    references = [("dimg", 1, range(2, 8)), ("thmb", 20, [1])]
    path.write_bytes(avif([*items, alpha], 1, references))
    assert Image.open(path).size == (288, 128)
    found = contents(path)
    assert [part.name for part in found.parts] == [f"r{r}_c{c}" for r in range(2) for c in range(3)]
    assert found.left_out == ("a thumbnail",)
    for part, (_, expected) in zip(found.parts, tiles, strict=True):
        (tile,) = luma(path, part.name)
        assert np.array_equal(tile, expected)
    with pytest.raises(StreamError, match="photo.avif .* grid of tiles, each a picture of its own"):
        read_trees(path)
    with pytest.raises(StreamError, match="no such part; name one of the parts r0_c0, r0_c1"):
        read_trees(path, part="r2_c0")
    # one item may be several tiles
    path.write_bytes(avif(items, 1, [("dimg", 1, [2, 3, 2, 2, 3, 4])]))
    for name, (_, expected) in (("r0_c2", tiles[0]), ("r1_c1", tiles[1])):
        (tile,) = luma(path, name)
        assert np.array_equal(tile, expected)
    path.write_bytes(avif([*items[:-1]], 1, references[:1]))
    with pytest.raises(StreamError, match="tile r1_c2 of the grid is 'missing'"):
        read_trees(path)
    path.write_bytes(avif(items, 1, [("dimg", 1, range(2, 7))]))
    with pytest.raises(StreamError, match="a grid of 2×3 tiles has 5"):
        read_trees(path)


class Scaling(ctypes.Structure):
    _fields_ = [("horizontal", ctypes.c_int), ("vertical", ctypes.c_int)]


SET_SCALE, SET_LAYER, SET_LAYERS = 11, 12, 27  # controls of libaom's encoder
THREE_FIFTHS = 3  # of the size


def layered(smaller):
    "A temporal unit of two spatial layers, the first one smaller if wanted."
    library = streams.load_libaom()
    encoding._check_encoder(library)
    config = encoding._encoder_config(library, "good", (200, 120), 10)
    config.kf_max_dist, config.g_lag_in_frames = 9999, 0
    unit, settings = b"", {"cpu-used": "6", "cq-level": "30"}
    with encoding._Encoder(library, config, settings) as encoder:
        context = ctypes.byref(encoder.context)
        library.aom_codec_control(context, SET_LAYERS, ctypes.c_int(2))
        for target, plane in zip(encoder.planes, synthetic_picture(200, 120, 4)):
            target[:] = plane
        for layer in range(2):
            library.aom_codec_control(context, SET_LAYER, ctypes.c_int(layer))
            if smaller:
                scale = Scaling(*[0 if layer else THREE_FIFTHS] * 2)
                library.aom_codec_control(context, SET_SCALE, ctypes.byref(scale))
            unit += b"".join(data for _, _, data, _ in encoder._encode(encoder.image, 0))
    return unit


@pytest.mark.parametrize("smaller", [False, True])
def test_layers_are_frames_and_parts(smaller, tmp_path):
    unit, path = layered(smaller), tmp_path / "photo.avif"
    base, top = [split for split in split_obus(unit) if split.kind == FRAME]
    assert (base.layer, top.layer) == (0, 1)
    sizes = [(150, 90) if smaller else (200, 120), (200, 120)]
    path.write_bytes(avif([plain(unit, width=200, height=120)]))
    assert [part.name for part in contents(path).parts] == ["l0", "l1"]
    both = list(read_trees(path))
    assert [(f.width, f.height) for f in both] == sizes
    head = struct.pack("<4sHH4sHHIIII", b"DKIF", 0, 32, b"AV01", 200, 120, 30, 1, 1, 0)
    shown = dav1d(head + struct.pack("<IQ", len(unit), 0) + unit)[-1]  # the largest layer
    assert np.array_equal(both[1].luma, shown)
    for layer, frame in enumerate(both):
        (one,) = read_trees(path, part=f"l{layer}")
        assert one.index == 0 and np.array_equal(one.luma, frame.luma)
        assert one.nodes().assign(frame=layer).equals(frame.nodes())

    # one layer is selected
    for layer, frame in enumerate(both):
        selected = box("lsel", struct.pack(">H", layer))
        path.write_bytes(avif([plain(unit, width=200, height=120, extra=[selected])]))
        (one,) = read_trees(path)
        assert np.array_equal(one.luma, frame.luma)
    selected = box("lsel", struct.pack(">H", 2))
    path.write_bytes(avif([plain(unit, width=200, height=120, extra=[selected])]))
    with pytest.raises(StreamError, match="holds no frame of layer 2"):
        list(read_trees(path))

    # the second operating point is the first layer alone; there is no third
    path.write_bytes(avif([plain(unit, width=200, height=120, extra=[box("a1op", b"\1")])]))
    assert [part.name for part in contents(path).parts] == [""]
    (one,) = read_trees(path)
    assert np.array_equal(one.luma, both[0].luma)
    path.write_bytes(avif([plain(unit, width=200, height=120, extra=[box("a1op", b"\2")])]))
    with pytest.raises(StreamError, match="has no operating point 2"):
        read_trees(path)


def rgb(seed):
    return Image.fromarray(
        np.dstack([synthetic_picture(96, 64, seed + k, bit_depth=8)[0] for k in range(3)]).astype(
            np.uint8
        )
    )


@pytest.mark.parametrize("alpha", [False, True])
def test_of_an_animation_the_track_is_read(alpha, tmp_path):
    pictures = [rgb(seed) for seed in range(4)]
    if alpha:
        for picture, mask in zip(pictures, (7, 8, 9, 10)):
            picture.putalpha(rgb(mask).convert("L"))
    path = tmp_path / "film.avif"
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=100)
    assert contents(path).left_out == (("an alpha track",) if alpha else ())
    with av.open(str(path)) as container:  # the stills come first, then colour
        track = [s for s in container.streams if s.frames == 4][0]
        expected = [frame.to_ndarray(format="yuv420p")[:64] for frame in container.decode(track)]
    found = luma(path)
    assert len(found) == 4
    for frame, picture in zip(found, expected, strict=True):
        assert np.array_equal(frame, picture)
    # a still picture that FFmpeg cannot demux does not hide the track
    data = bytearray(path.read_bytes())
    data[data.index(b"av01", data.index(b"infe"))] = ord("x")
    path.write_bytes(data)
    assert all(np.array_equal(a, b) for a, b in zip(luma(path), found, strict=True))


def test_alpha_of_a_still_picture_is_left_out_and_named(tmp_path):
    path, picture = tmp_path / "photo.avif", rgb(0)
    picture.putalpha(rgb(5).convert("L"))
    picture.save(path)
    assert contents(path).left_out == ("an alpha plane",)
    with av.open(str(path)) as container:
        (expected,) = [
            frame.to_ndarray(format="yuv420p")[:64] for frame in container.decode(video=0)
        ]
    (found,) = luma(path)
    assert np.array_equal(found, expected)


def test_what_is_not_read_says_why(tiles, tmp_path):
    packet, path = tiles[0][0], tmp_path / "photo.avif"
    number, kind, data, properties, _ = plain(packet)
    for content, message in (
        (avif([(1, "hvc1", data, properties, 0)]), "its picture is of the type 'hvc1'"),
        (avif([(1, "iovl", data, properties, 0)]), "its picture is of the type 'iovl'"),
        (
            avif([(1, kind, data, properties, 2)]),
            "data lie in another item, which is not supported",
        ),
        (avif([plain(packet)], primary=3), "its picture, item 3, is not described"),
        (
            avif([plain(packet)], iloc=full("iloc", bytes([0x44, 0, 0, 0]))),
            "the picture has no data",
        ),
        (
            avif([(1, kind, [data[0] + b"\x0a\x7f"], properties, 0)]),
            "cut off: an OBU of 127 bytes has only 0",
        ),
    ):
        path.write_bytes(content)
        with pytest.raises(StreamError, match="cannot be read as AVIF") as caught:
            list(read_trees(path))
        text = str(caught.value)
        assert message in text and str(path) in text and "save it there as a plain AVIF" in text
        assert "damaged" not in text
    path.write_bytes(avif([plain(packet)])[:-20])
    with pytest.raises(StreamError, match="is cut off"):
        read_trees(path)


def test_a_hostile_file_allocates_nothing(tiles, tmp_path):
    packet, path = tiles[0][0], tmp_path / "photo.avif"
    good = avif([plain(packet)])
    # every piece is the whole file: 1,000 of them are more than the file has
    pieces = struct.pack(">HHHH", 1, 0, 0, 1000) + struct.pack(">II", 0, len(good)) * 1000
    path.write_bytes(
        avif([plain(packet)], iloc=full("iloc", struct.pack(">BBH", 0x44, 0, 1), pieces, version=1))
    )
    with pytest.raises(StreamError, match="more bytes than the file"):
        read_trees(path)
    # 65,535 items of 65,535 pieces that take no byte each
    entries = struct.pack(">HHHH", 1, 0, 0, 65535) * 65535
    iloc = full("iloc", struct.pack(">BBH", 0, 0, 65535), entries, version=1)
    path.write_bytes(avif([plain(packet)], iloc=iloc))
    with pytest.raises(StreamError, match="more than 262144 pieces"):
        read_trees(path)
    # a box of 8 MB in a sparse file
    start, entry = good.index(b"meta") - 4, good.index(b"iinf") - 4
    with open(path, "wb") as file:
        file.write(good[:start] + struct.pack(">I", 2**25 - start) + good[start + 4 : entry])
        file.write(struct.pack(">I4s", MAX_BOX + 2**22, b"iinf"))
        file.write(bytes(8))
        file.truncate(entry + MAX_BOX + 2**22)
        rest = 2**25 - file.seek(0, io.SEEK_END)
        file.write(struct.pack(">I4s", rest, b"free"))
        file.truncate(2**25)
    with pytest.raises(StreamError, match="'iinf' has 8388600 bytes, more than the 4194304"):
        read_trees(path)


def test_any_damage_ends_in_a_sentence(tiles, tmp_path):
    "Changed bytes in the description of a grid: read, or refused by name, in bounded time."
    items = [(1, "grid", [grid(1, 2, 192, 64)], [full("ispe", struct.pack(">II", 192, 64))], 1)]
    items += [
        (2 + n, "av01", [item_data(packet)], owned(packet, 96, 64), 0)
        for n, (packet, _) in enumerate(tiles[:2])
    ]
    good = avif(items, 1, [("dimg", 1, [2, 3])])
    end, path, rng = good.index(b"mdat"), tmp_path / "photo.avif", np.random.default_rng(0)
    outcomes = set()
    for _ in range(300):
        data = bytearray(good)
        for position in rng.integers(0, end, rng.integers(1, 4)):
            data[position] = rng.integers(256)
        path.write_bytes(data)
        try:
            for part in contents(path).parts:
                list(read_trees(path, part=part.name))
            outcomes.add("read")
        except StreamError as error:
            assert str(path) in str(error)
            outcomes.add("refused")
    assert outcomes == {"read", "refused"}


def test_label_writes_tiles_and_layers_as_recordings(tiles, tmp_path, recwarn):
    items = [(1, "grid", [grid(1, 2, 192, 64)], [full("ispe", struct.pack(">II", 192, 64))], 1)]
    items += [
        (2 + n, "av01", [item_data(packet)], owned(packet, 96, 64), 0)
        for n, (packet, _) in enumerate(tiles[:3])
    ]
    (tmp_path / "photo.avif").write_bytes(avif(items, 1, [("dimg", 1, [2, 3]), ("thmb", 4, [1])]))
    plan = RecordingPlan("photo", sizes=(8, 16), excel=False)
    found = label_stream(tmp_path / "raw", tmp_path / "photo.avif", plan)
    assert [(r.name, r.sequence) for r in found] == [
        ("photo_r0_c0", "photo"),
        ("photo_r0_c1", "photo"),
    ]
    assert [str(w.message) for w in recwarn] == [
        f"{tmp_path / 'photo.avif'}: left out: a thumbnail."
    ]
    for recording, (_, expected) in zip(found, tiles):
        (picture,) = read_frames(tmp_path / "raw", recording)
        assert np.array_equal(picture, expected)
    unit = layered(smaller=True)
    (tmp_path / "steps.avif").write_bytes(avif([plain(unit, width=200, height=120)]))
    av1nb("label", tmp_path / "steps.avif", "--out", tmp_path / "raw", "--size", 8)
    sizes = [
        (r.name, r.width, r.height)
        for r in list_recordings(tmp_path / "raw")
        if r.sequence == "steps"
    ]
    assert sizes == [("steps_l0", 150, 90), ("steps_l1", 200, 120)]
    # the second tile is damaged: nothing at all is written
    items[2] = (3, "av01", [item_data(tiles[1][0])[:-40]], items[2][3], 0)
    (tmp_path / "bad.avif").write_bytes(avif(items[:3], 1, [("dimg", 1, [2, 3])]))
    with pytest.raises(StreamError, match="bad.avif"):
        label_stream(tmp_path / "bad", tmp_path / "bad.avif", plan)
    assert not (tmp_path / "bad").exists()
