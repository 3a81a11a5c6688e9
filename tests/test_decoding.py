"Decoded pixels are those that the file's tags describe, or the file is refused by name."

import io
import struct
import zlib
from itertools import product

import numpy as np
import pytest
import tifffile
from PIL import Image, ImageCms
from raw_images import (
    BLACK_IS_ZERO,
    PALETTE,
    RGB,
    SEPARATED,
    WHITE_IS_ZERO,
    YCBCR,
    H,
    W,
    lzw,
    reverse_bits,
    samples,
    write_png,
    write_tiff,
)

from tocsr.core.decoding import ImageError, decode_image, decode_pillow, png_chunk
from tocsr.core.image import read_image


def full_range(a: np.ndarray, bits: int) -> np.ndarray:
    "Samples of any depth as uint8 or uint16, rounded."
    top = 255 if bits <= 8 else 65535
    return np.floor(a * (top / (2**bits - 1)) + 0.5).astype(np.uint8 if bits <= 8 else np.uint16)


GRAY_AND_RGB = [
    (bits, photometric, order, planar, compressed)
    for bits, photometric, order, planar, compressed in product(
        (1, 2, 4, 6, 8, 10, 12, 14, 16),
        (WHITE_IS_ZERO, BLACK_IS_ZERO, RGB),
        "<>",
        (1, 2),
        (None, "zlib", "lzw"),
    )
    if (planar == 1 or photometric == RGB) and not (compressed and bits not in (8, 16))
]


@pytest.mark.parametrize("bits, photometric, order, planar, compressed", GRAY_AND_RGB)
def test_tiff_layouts(bits, photometric, order, planar, compressed):
    a = samples(3 if photometric == RGB else 1, bits)
    how = {}
    if compressed:
        pack, code = dict(zlib=(zlib.compress, 8), lzw=(lzw, 5))[compressed]
        how = dict(pack=pack, t259=code)
    data = write_tiff(a, bits, photometric, order=order, planar=planar, **how)
    expected = full_range(a if photometric != WHITE_IS_ZERO else 2**bits - 1 - a, bits)
    try:
        got = decode_image(data, "x.tif")
    except ImageError as e:
        assert bits == 16 and planar == 2 and compressed == "lzw" and "imagecodecs" in str(e)
        return
    assert got.pixels.dtype == expected.dtype and np.array_equal(got.pixels, expected)
    assert got.kind == "TIFF" and not got.notes


def test_all_but_one_kind_of_layouts_are_decoded():
    "Only planes of 16 bits with LZW may be refused by `test_tiff_layouts`."
    refused = [g for g in GRAY_AND_RGB if g[0] == 16 and g[3] == 2 and g[4] == "lzw"]
    assert len(GRAY_AND_RGB) > 80 and len(refused) == 2


@pytest.mark.parametrize("bits, order, compressed", list(product((8, 16), "<>", (False, True))))
@pytest.mark.parametrize("extra", [(0,), (1,), (2,), (2, 0), (0, 0)])
@pytest.mark.parametrize("color", [1, 3])
def test_extra_channels(bits, order, compressed, extra, color):
    a = samples(color + len(extra), bits)
    top = 2**bits - 1
    straight = a[..., :color].copy()
    alpha = a[..., color : color + 1]
    if extra[0] == 1:
        a[..., :color] = np.floor(straight * (alpha / top) + 0.5)
    how = dict(pack=lzw, t259=5) if compressed else {}
    photometric = RGB if color == 3 else BLACK_IS_ZERO
    data = write_tiff(a, bits, photometric, order=order, t338=extra, **how)
    try:
        got = decode_image(data, "x.tif")
    except ImageError as e:
        refused = compressed and (len(extra) == 2 or color == 1)
        assert refused and "imagecodecs" in str(e) and "\n" not in str(e)
        return
    pixels = got.pixels.astype(int)
    if extra[0] == 0:
        assert np.array_equal(pixels, straight)
    else:
        assert np.array_equal(pixels[..., -1:], alpha)
        step = np.ceil(top / np.maximum(alpha, 1))  # what one level of a premultiplied value is
        error = np.abs(pixels[..., :color] - straight.astype(int))
        assert (error <= (step / 2 + 1) * (extra[0] == 1)).all(where=alpha > 0)
    assert any("extra channel" in n for n in got.notes) == (0 in extra)


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("bits, photometric", [(1, 0), (1, 1), (4, 0), (8, 1), (8, 0), (8, 2)])
def test_fill_order(bits, photometric, order):
    a = samples(3 if photometric == RGB else 1, bits)
    data = write_tiff(a, bits, photometric, order=order, pack=reverse_bits, t266=2)
    expected = full_range(a if photometric else 2**bits - 1 - a, bits)
    try:
        assert np.array_equal(decode_image(data, "x.tif").pixels, expected)
    except ImageError as e:
        assert "TIFF" in str(e)


@pytest.mark.parametrize(
    "order, tiled, predictor", list(product("<>", (False, True), (False, True)))
)
@pytest.mark.parametrize("dtype", ["u1", "u2"])
@pytest.mark.parametrize("channels, planar", [(1, 1), (3, 1), (3, 2), (4, 1), (4, 2)])
def test_tiffs_of_another_library(order, tiled, predictor, dtype, channels, planar):
    a = (
        np.random.default_rng(1)
        .integers(0, 2 ** (8 * int(dtype[1])), (40, 35, channels))
        .astype(dtype)
    )
    buffer = io.BytesIO()
    how = dict(compression="zlib", predictor=True) if predictor else {}
    stored = a if planar == 1 else np.moveaxis(a, -1, 0)
    if channels > 1:
        how["planarconfig"] = "contig" if planar == 1 else "separate"
    tifffile.imwrite(
        buffer,
        stored if channels > 1 else stored[..., 0],
        byteorder=order,
        photometric="rgb" if channels > 1 else "minisblack",
        extrasamples=["unassalpha"] if channels == 4 else None,
        tile=(16, 16) if tiled else None,
        metadata=None,
        **how,
    )
    assert np.array_equal(decode_image(buffer.getvalue()).pixels, a)


REFUSED = [
    (dict(a=samples(1, 8), bits=8, photometric=BLACK_IS_ZERO, t339=2), "signed"),
    (dict(a=samples(1, 16), bits=16, photometric=BLACK_IS_ZERO, t339=2), "signed"),
    (dict(a=samples(3, 16), bits=16, photometric=RGB, t339=(3, 3, 3)), "floating point"),
    (dict(a=samples(1, 31), bits=32, photometric=BLACK_IS_ZERO), "32-bit integer"),
    (dict(a=samples(1, 31), bits=32, photometric=BLACK_IS_ZERO, t339=3), "floating point"),
    (dict(a=samples(3, 8), bits=8, photometric=YCBCR), "YCbCr"),
    (dict(a=samples(1, 8), bits=8, photometric=32803), "color filter array"),
    (dict(a=samples(1, 8), bits=8, photometric=None), "tag 262"),
    (dict(a=samples(3, 8), bits=8, photometric=RGB, t254=1), "preview"),
    (dict(a=samples(3, 8), bits=8, photometric=9), "ICC Lab"),
    (dict(a=samples(20, 8), bits=8, photometric=BLACK_IS_ZERO), "20 channels"),
    (dict(a=samples(3, 16), bits=16, photometric=8), "Lab"),
    (dict(a=samples(1, 16), bits=16, photometric=PALETTE), "palette"),
    (dict(a=samples(1, 8), bits=8, photometric=777), "photometric 777"),
]


@pytest.mark.parametrize("how, words", REFUSED)
@pytest.mark.parametrize("order", "<>")
def test_refused_by_name(how, words, order, tmp_path):
    data = write_tiff(**how, order=order)
    (tmp_path / "photo.tif").write_bytes(data)
    for read in (decode_image, read_image):
        with pytest.raises(ImageError) as e:
            read(tmp_path / "photo.tif")
        assert words in str(e.value) and "photo.tif" in str(e.value) and "\n" not in str(e.value)


def test_deep_cmyk_is_converted_with_notes():
    a = samples(4, 16) // 257 * 257
    got = decode_image(write_tiff(a, 16, SEPARATED))
    as_8_bits = Image.fromarray((a // 257).astype(np.uint8), "CMYK").convert("RGB")
    assert np.array_equal(got.pixels, np.asarray(as_8_bits))
    assert "CMYK" in got.notes[0] and "16 bits" in got.notes[1]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(
    "layout",
    [
        dict(bits=8, photometric=RGB),
        dict(bits=16, photometric=WHITE_IS_ZERO),
        dict(bits=16, photometric=RGB, pack=lzw, t259=5),
        dict(bits=16, photometric=WHITE_IS_ZERO, pack=lzw, t259=5),
    ],
)
def test_orientation_of_every_way_of_reading(layout, orientation):
    a = samples(3 if layout["photometric"] == RGB else 1, layout["bits"])
    upright = decode_image(write_tiff(a, **layout)).pixels
    turned = decode_image(write_tiff(a, **layout, t274=orientation)).pixels
    moves = {
        1: lambda x: x,
        2: lambda x: x[:, ::-1],
        3: lambda x: np.rot90(x, 2),
        4: lambda x: x[::-1],
        5: lambda x: x.swapaxes(0, 1),
        6: lambda x: np.rot90(x, -1),
        7: lambda x: np.rot90(x, 2).swapaxes(0, 1),
        8: lambda x: np.rot90(x, 1),
    }
    assert np.array_equal(turned, moves[orientation](upright))


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8, 0.99])
@pytest.mark.parametrize(
    "layout",
    [
        dict(bits=8, photometric=RGB),
        dict(bits=16, photometric=RGB),
        dict(bits=16, photometric=RGB, planar=2),
        dict(bits=12, photometric=BLACK_IS_ZERO),
        dict(bits=16, photometric=WHITE_IS_ZERO, pack=zlib.compress, t259=8),
        dict(bits=16, photometric=RGB, pack=lzw, t259=5),
    ],
)
def test_truncated_tiffs_are_refused(layout, share):
    whole = write_tiff(samples(3 if layout["photometric"] == RGB else 1, layout["bits"]), **layout)
    with pytest.raises(ImageError):
        decode_image(whole[: int(share * len(whole))])


# PNG


PNG_CHANNELS = {0: 1, 2: 3, 4: 2, 6: 4}
PNG_LAYOUTS = [(b, 0) for b in (1, 2, 4, 8, 16)] + [(b, c) for b in (8, 16) for c in (2, 4, 6)]


@pytest.mark.parametrize("bits, color", PNG_LAYOUTS)
def test_png_layouts(bits, color):
    a = samples(PNG_CHANNELS[color], bits)
    got = decode_image(write_png(a, bits, color)).pixels
    assert np.array_equal(got, full_range(a, bits)) and got.dtype.itemsize == max(1, bits // 8)


@pytest.mark.parametrize("bits, color", [p for p in PNG_LAYOUTS if p[1] in (0, 2)])
@pytest.mark.parametrize("seed", range(4))
def test_a_transparent_color_has_the_depth_of_the_file(bits, color, seed, tmp_path):
    a = samples(PNG_CHANNELS[color], bits, seed)
    key = a[3, 5].copy()
    a[7, 2] = key
    a[8, 8] = key
    if bits == 16:
        a[8, 8, 0] ^= 1  # differs in the low byte alone
    chunk = (b"tRNS", struct.pack(f">{len(key)}H", *key))
    data = write_png(a, bits, color, [chunk])
    got = decode_image(data).pixels
    visible = (a != key).any(-1)
    assert not visible.all() and np.array_equal(got[..., -1] > 0, visible)
    assert np.array_equal(got[..., :-1], full_range(a, bits))
    unread = decode_pillow(Image.open(io.BytesIO(data)))
    assert np.array_equal(unread.pixels, got)
    (tmp_path / "a.png").write_bytes(data)
    assert (read_image(tmp_path / "a.png")[~visible] == 255).all()  # composited on white


def test_interlaced_deep_gray_with_alpha():
    "The seven passes of Adam7 hold pixels of four bytes, whatever they mean."
    a = samples(2, 16)
    passes = [
        (0, 0, 8, 8),
        (0, 4, 8, 8),
        (4, 0, 8, 4),
        (0, 2, 4, 4),
        (2, 0, 4, 2),
        (0, 1, 2, 2),
        (1, 0, 2, 1),
    ]
    raw = b""
    for top, left, down, right in passes:
        for row in a[top::down, left::right]:
            raw += b"\0" + row.astype(">u2").tobytes() if row.size else b""
    head = struct.pack(">IIBBBBB", W, H, 16, 4, 0, 0, 1)
    chunks = ((b"IHDR", head), (b"IDAT", zlib.compress(raw)), (b"IEND", b""))
    data = b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(*c) for c in chunks)
    assert np.array_equal(decode_image(data).pixels, a)


# Pillow images


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize(
    "layout",
    [
        dict(bits=16, photometric=WHITE_IS_ZERO),
        dict(bits=16, photometric=RGB, planar=2),
        dict(bits=12, photometric=BLACK_IS_ZERO),
    ],
)
def test_a_pillow_image_is_read_from_its_file_or_refused(layout, order):
    a = samples(3 if layout["photometric"] == RGB else 1, layout["bits"])
    data = write_tiff(a, order=order, **layout)
    try:
        im = Image.open(io.BytesIO(data))
    except OSError:
        return  # Pillow refuses it, too
    assert np.array_equal(decode_pillow(im).pixels, decode_image(data).pixels)
    im.load()
    with pytest.raises(ImageError, match="Pillow"):
        decode_pillow(im)


def test_loaded_pillow_images_that_are_right_are_taken():
    a = samples(3, 16)
    im = Image.open(io.BytesIO(write_tiff(a, 16, RGB)))
    im.load()
    assert np.array_equal(decode_pillow(im).pixels, a >> 8)
    gray = samples(1, 16)
    im = Image.open(io.BytesIO(write_tiff(gray, 16, BLACK_IS_ZERO)))
    im.load()
    assert np.array_equal(decode_pillow(im).pixels, gray)
    im = Image.open(io.BytesIO(write_png(a, 16, 2, [(b"tRNS", struct.pack(">3H", *a[0, 0]))])))
    im.load()
    with pytest.raises(ImageError, match="16 bits"):
        decode_pillow(im)


def test_a_later_page_of_a_pillow_image():
    buffer = io.BytesIO()
    pages = [Image.fromarray(samples(3, 8, seed).astype(np.uint8)) for seed in range(3)]
    pages[0].save(buffer, "TIFF", save_all=True, append_images=pages[1:])
    im = Image.open(buffer)
    im.seek(2)
    assert np.array_equal(decode_pillow(im).pixels, np.asarray(pages[2]))
    assert decode_image(buffer.getvalue()).notes == ("the first of 3 frames",)


def test_cmyk_is_converted_by_its_profile(tmp_path):
    im = Image.new("CMYK", (8, 8), (0, 200, 100, 30))
    im.info["icc_profile"] = b"no profile"
    got = decode_pillow(im)
    assert np.array_equal(got.pixels, np.asarray(im.convert("RGB"))) and "CMYK" in got.notes[0]


@pytest.mark.parametrize(
    "mode",
    ["1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "YCbCr", "HSV", "LAB", "I;16"],
)
def test_modes_in_memory(mode):
    "Gray stays gray, alpha stays, premultiplied color is divided."
    gray = Image.fromarray(samples(1, 8)[..., 0].astype(np.uint8))
    rgb = Image.fromarray(samples(3, 8).astype(np.uint8))
    if mode == "I;16":
        im = Image.fromarray(samples(1, 16)[..., 0].astype(np.uint16))
    elif mode == "LAB":
        profiles = [ImageCms.createProfile(n) for n in ("sRGB", "LAB")]
        im = ImageCms.profileToProfile(rgb, *profiles, outputMode="LAB")
    elif mode in ("La", "RGBa"):
        im = (
            rgb.convert("RGBA").convert("RGBa")
            if mode == "RGBa"
            else gray.convert("LA").convert("La")
        )
    elif mode == "PA":
        im = rgb.convert("P").convert("PA")
    else:
        im = (gray if mode in ("1", "LA", "L") else rgb).convert(mode)
    got = decode_pillow(im).pixels
    channels = {"1": 1, "L": 1, "I;16": 1, "LA": 2, "La": 2, "PA": 4, "RGBA": 4, "RGBa": 4}.get(
        mode, 3
    )
    assert got.shape == (H, W, channels)
    if mode in ("1", "L", "LA", "La"):
        assert np.array_equal(
            got[..., 0], np.asarray(im.convert("LA" if mode == "La" else "L").convert("L"))
        )
    elif mode == "I;16":
        assert np.array_equal(got[..., 0], np.asarray(im))
    elif mode == "LAB":
        assert np.abs(got.astype(int) - np.asarray(rgb)).mean() < 3
    else:
        assert np.array_equal(got[..., :3], np.asarray(im.convert("RGBA").convert("RGB")))
