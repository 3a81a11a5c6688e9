"""Any image through `upscale`: pixels, alpha, profile, orientation, resolution, tags and texts come
out as they went in, or a note names what did not.
"""

import io
import struct
import tempfile
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import tifffile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms, ImageOps
from raw_images import lzw, write_png, write_tiff

from tocsr.core.decoding import decode_image, png_chunk
from tocsr.inference import batch

EXIF_IFD = 0x8769
GPS_IFD = 0x8825
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><a b="%d" tiff:ImageWidth="14"/></x:xmpmeta>'
MAKER, DESCRIPTION, SOFTWARE, ARTIST, RIGHTS = 0x010F, 0x010E, 0x0131, 0x013B, 0x8298


def nearest(x, progress):
    "Stands for a model: every pixel becomes four."
    return x.repeat_interleave(2, -1).repeat_interleave(2, -2)


class Case(NamedTuple):
    "An image to write."

    source: str  # Pillow's name of the format
    target: str
    channels: int
    bits: int
    seed: int
    orientation: int
    dpi: int | None
    tags: dict  # of EXIF: text by number
    nested: bool  # camera settings and GPS
    xmp: int | None
    icc: bool
    gamma: int | None  # gAMA of a PNG
    text: str | None  # of a PNG


texts = st.text(st.characters(min_codepoint=32, max_codepoint=126), min_size=1, max_size=40)
cases = st.builds(
    Case,
    source=st.sampled_from(["PNG", "TIFF", "JPEG", "WEBP", "BMP"]),
    target=st.sampled_from([".png", ".tif", ".jpg", ".webp", ".bmp", ".jfif"]),
    channels=st.integers(1, 4),
    bits=st.sampled_from([8, 16]),
    seed=st.integers(0, 99),
    orientation=st.integers(1, 8),
    dpi=st.none() | st.sampled_from([72, 96, 150, 300, 1200]),
    tags=st.dictionaries(st.sampled_from([MAKER, DESCRIPTION, SOFTWARE, ARTIST, RIGHTS]), texts),
    nested=st.booleans(),
    xmp=st.none() | st.integers(0, 9),
    icc=st.booleans(),
    gamma=st.none() | st.sampled_from([45455, 100000]),
    text=st.none() | texts,
)


def exif_of(c: Case) -> Image.Exif:
    exif = Image.Exif()
    exif.update(c.tags)
    if c.orientation > 1:
        exif[0x0112] = c.orientation
    if c.nested:
        exif.get_ifd(EXIF_IFD).update({0xA002: 14, 0x9003: "2026:01:02 03:04:05", 0x829D: 2.5})
        exif.get_ifd(GPS_IFD).update({1: "N", 2: (48.0, 8.0, 15.0)})
    return exif


def write_png_case(c: Case, a: np.ndarray) -> bytes:
    chunks = []
    if c.icc:
        chunks.append((b"iCCP", b"p\0\0" + zlib.compress(SRGB)))
    if c.gamma:
        chunks.append((b"gAMA", struct.pack(">I", c.gamma)))
    if c.dpi:
        chunks.append((b"pHYs", struct.pack(">IIB", *[round(c.dpi / 0.0254)] * 2, 1)))
    if len(exif_of(c).tobytes()) > 20:
        chunks.append((b"eXIf", exif_of(c).tobytes()[6:]))
    if c.xmp is not None:
        chunks.append((b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + XMP % c.xmp))
    if c.text:
        chunks.append((b"tEXt", b"Title\0" + c.text.encode()))
    return write_png(a, c.bits, {1: 0, 2: 4, 3: 2, 4: 6}[c.channels], chunks)


def write_tiff_case(c: Case, a: np.ndarray) -> bytes:
    "With tifffile, which writes no nested directories; with Pillow where there are some."
    buffer = io.BytesIO()
    if c.nested and c.bits == 8:
        im = Image.fromarray(a if c.channels > 1 else a[..., 0])
        more = dict(dpi=(c.dpi, c.dpi)) if c.dpi else {}
        im.save(
            buffer, "TIFF", exif=exif_of(c).tobytes(), icc_profile=SRGB if c.icc else None, **more
        )
        return buffer.getvalue()
    extra = [(tag, 2, 0, text, True) for tag, text in c.tags.items()]
    extra.append((0x0112, 3, 1, c.orientation, True))
    if c.xmp is not None:
        extra.append((700, 1, len(XMP % c.xmp), XMP % c.xmp, True))
    tifffile.imwrite(
        buffer,
        a if c.channels > 1 else a[..., 0],
        byteorder="<>"[c.seed % 2],
        photometric="rgb" if c.channels > 2 else "minisblack",
        planarconfig="contig" if c.channels > 1 else None,
        extrasamples=["unassalpha"] if c.channels in (2, 4) else None,
        compression="zlib" if c.seed % 3 else None,
        resolution=(c.dpi, c.dpi) if c.dpi else None,
        resolutionunit="INCH" if c.dpi else None,
        iccprofile=SRGB if c.icc else None,
        extratags=extra,
        metadata=None,
        software=False,
    )
    return buffer.getvalue()


def write_with_pillow(c: Case, a: np.ndarray) -> bytes:
    im = Image.fromarray(a if c.channels > 1 else a[..., 0])
    if c.source == "WEBP" and im.mode in ("L", "LA"):
        im = im.convert("RGB" if im.mode == "L" else "RGBA")
    how = dict(icc_profile=SRGB if c.icc else None, exif=exif_of(c).tobytes())
    if c.xmp is not None:
        how["xmp"] = XMP % c.xmp
    if c.source == "WEBP":
        how["lossless"] = how["exact"] = True
    if c.source == "JPEG":
        how["quality"] = 100
        how["subsampling"] = 0
    if c.source == "BMP":
        how = dict(dpi=(0, 0))
    if c.dpi and c.source != "WEBP":
        how["dpi"] = (c.dpi, c.dpi)
    buffer = io.BytesIO()
    im.save(buffer, c.source, **how)
    return buffer.getvalue()


def possible(c: Case) -> Case:
    "The case without what its source format does not hold."
    tiff_by_pillow = c.source == "TIFF" and c.nested and c.bits == 8
    if c.source not in ("PNG", "TIFF"):
        c = c._replace(bits=8)
    if c.source in ("JPEG", "BMP"):
        c = c._replace(channels=c.channels - (c.channels in (2, 4)))
    if c.source == "TIFF":
        c = c._replace(nested=tiff_by_pillow, xmp=None if tiff_by_pillow else c.xmp)
    if c.source == "BMP":
        c = c._replace(tags={}, nested=False, xmp=None, icc=False, orientation=1)
    if c.source == "WEBP":
        c = c._replace(dpi=None)
    if c.source != "PNG":
        c = c._replace(gamma=None, text=None)
    return c


def read_back(path: Path) -> tuple[np.ndarray, Image.Image]:
    "Pixels (h, w, c) and Pillow's image of a result."
    im = Image.open(path)
    if im.format == "TIFF":
        a = tifffile.imread(path)
    else:
        a = decode_image(path).pixels  # compared with samples in test_decoding.py
    im.load()
    return a if a.ndim == 3 else a[..., None], im


def as_channels(a: np.ndarray, target: str) -> np.ndarray:
    "What a format makes of pixels (h, w, c), as float in 0..1: gray to RGB, alpha on white."
    x = a / np.iinfo(a.dtype).max
    alpha = x[..., -1:] if x.shape[-1] in (2, 4) else None
    color = x[..., :1] if x.shape[-1] < 3 else x[..., :3]
    deep_alpha = target == ".tif" and a.dtype == np.uint16 and a.shape[-1] == 2
    if target == ".webp" or deep_alpha:  # few programs read 16-bit gray with alpha
        color = np.broadcast_to(color, (*color.shape[:2], 3))
    if alpha is not None and target in (".jpg", ".jfif", ".bmp"):
        return color * alpha + 1 - alpha
    return color if alpha is None else np.concatenate([color, alpha], -1)


def found_dpi(im: Image.Image) -> float | None:
    exif = im.getexif()
    if im.format in ("WEBP", "TIFF"):
        return float(exif[282]) if exif.get(296) == 2 else None
    if im.format == "JPEG":  # Pillow invents 72 dpi for some
        return im.info["jfif_density"][0] if im.info.get("jfif_unit") == 1 else None
    return im.info.get("dpi", (0, 0))[0] or None


def check_metadata(c: Case, im: Image.Image, notes: str):
    "Every item is in the result, or its title in a note."
    exif = im.getexif()
    for tag, text in c.tags.items():
        assert exif.get(tag) == text.rstrip() or exif.get(tag) == text or "EXIF" in notes, tag
    assert exif.get(0x0112, 1) == 1
    if c.nested:
        turned = c.orientation > 4
        camera = exif.get_ifd(EXIF_IFD)
        kept = camera.get(0xA002) == (2 * 11 if turned else 2 * 14)
        kept = kept and camera.get(0x829D) == 2.5 and exif.get_ifd(GPS_IFD).get(1) == "N"
        assert kept or "EXIF" in notes
    if not c.nested:  # no empty directories either
        assert not exif.get_ifd(EXIF_IFD) and EXIF_IFD not in exif and GPS_IFD not in exif
    dpi = found_dpi(im)
    assert (dpi is None) == (c.dpi is None) or "resolution" in notes
    assert dpi is None or abs(dpi - c.dpi) < 0.1
    if c.xmp is not None:
        xmp = im.info.get("xmp") or im.info.get("XML:com.adobe.xmp") or exif.get(700) or b""
        xmp = xmp.encode() if isinstance(xmp, str) else xmp
        wide = b'tiff:ImageWidth="%d"' % im.width
        assert (b'b="%d"' % c.xmp in xmp and wide in xmp) or "XMP" in notes
    if c.icc and c.channels > 2:
        assert im.info.get("icc_profile") == SRGB or "color profile" in notes
    if c.icc and c.channels < 3 and c.source != "WEBP":
        assert "color profile of another color space" in notes
    if c.gamma == 100000 and not (c.icc and c.channels > 2):
        assert im.info.get("gamma") == 1.0 or "gAMA" in notes
    if c.text:
        assert im.info.get("Title") == c.text or "Title" in notes


@settings(
    max_examples=250,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)
@given(cases)
def test_images_come_out_as_they_went_in(c):
    c = possible(c)
    rng = np.random.default_rng(c.seed)
    smooth = (
        np.add.outer(np.arange(11) * 9, np.arange(14) * 7)[..., None] + np.arange(c.channels) * 3
    )
    noise = rng.integers(0, 2**c.bits, (11, 14, c.channels))
    a = noise if c.source not in ("JPEG",) else smooth  # JPEG keeps smooth images alone
    if c.channels in (2, 4):
        # bicubic interpolation keeps a constant alpha; colors under alpha 0 would be replaced
        a[..., -1] = max(1, a[0, 0, -1])
    a = a.astype(np.uint8 if c.bits == 8 else np.uint16)
    write = dict(PNG=write_png_case, TIFF=write_tiff_case).get(c.source, write_with_pillow)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / f"in.{c.source.lower()}"
        target = Path(folder) / f"out{c.target}"
        source.write_bytes(write(c, a))
        (result,) = batch.upscale_files(batch.plan_jobs([str(source)], str(target)), nearest, 2)
        assert result.status == "done", result.error
        got, im = read_back(target)
        notes = "; ".join(result.notes)
        check_metadata(c, im, notes)
    deep = c.bits == 16 and c.target in (".png", ".tif")
    assert (got.dtype == np.uint16) == deep and (deep or c.bits == 8 or "16 bits" in notes)
    turned = upright(a, c.orientation).repeat(2, 0).repeat(2, 1)
    if c.source == "WEBP" and c.channels < 3:  # it has no gray
        turned = np.concatenate([turned[..., :1]] * 3 + [turned[..., 1:]], -1)
    wanted = as_channels(turned, c.target)
    assert got.shape == wanted.shape
    error = np.abs(got / np.iinfo(got.dtype).max - wanted)
    if c.target in (".jpg", ".jfif", ".webp"):
        assert error.mean() < (0.02 if c.source == "JPEG" else 0.35)  # noise is lossy there
    else:
        assert error.max() <= (0.02 if c.source == "JPEG" else 0.51 / np.iinfo(got.dtype).max)
    assert ("transparency" in notes) == (
        c.channels in (2, 4) and c.target in (".jpg", ".jfif", ".bmp")
    )


def upright(a: np.ndarray, orientation: int) -> np.ndarray:
    "EXIF's orientation by Pillow's own function, channel by channel."
    exif = Image.Exif()
    exif[0x0112] = orientation
    planes = []
    for i in range(a.shape[-1]):
        plane = Image.fromarray(np.ascontiguousarray(a[..., i]).astype(np.int32), "I")
        plane.info["exif"] = exif.tobytes()
        planes.append(np.asarray(ImageOps.exif_transpose(plane)))
    return np.stack(planes, -1).astype(a.dtype)


ORDINARY = [
    {},
    {MAKER: "a maker"},
    {SOFTWARE: "a program"},
    {ARTIST: "somebody"},
    {DESCRIPTION: "a description"},
    {RIGHTS: "\u00a9 somebody".encode()},  # not ASCII, as many cameras write it
    {0x0132: "2026:01:02 03:04:05"},
    {MAKER: "a maker", SOFTWARE: "a program", ARTIST: "somebody", DESCRIPTION: "a description"},
]


@pytest.mark.parametrize("tags", ORDINARY)
@pytest.mark.parametrize("source", ["tiff", "jpeg", "png"])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dpi", [None, (300, 300)])
def test_ordinary_tags_into_a_tiff(tags, source, nested, dpi, tmp_path, capfd):
    exif = Image.Exif()
    exif.update(tags)
    if nested:
        exif.get_ifd(EXIF_IFD)[0xA002] = 8
    im = Image.new("RGB", (8, 8), "red")
    more = dict(dpi=dpi) if dpi else {}
    im.save(tmp_path / f"in.{source}", exif=exif.tobytes(), **more)
    jobs = batch.plan_jobs([str(tmp_path / f"in.{source}")], str(tmp_path / "out.tif"))
    (result,) = batch.upscale_files(jobs, nearest, 2)
    assert result.status == "done" and not result.notes, (result.error, result.notes)
    back = Image.open(tmp_path / "out.tif")
    back.load()
    for tag, text in tags.items():
        given = Image.open(tmp_path / f"in.{source}").getexif()[tag]
        assert back.getexif()[tag] == given and (given == text or not text.isascii())
    assert back.getexif().get_ifd(EXIF_IFD) == ({0xA002: 16} if nested else {})
    found = back.info.get("dpi")
    assert found == dpi or np.allclose(found, dpi, atol=0.01)  # a PNG counts pixels per meter
    assert back.size == (16, 16)
    assert capfd.readouterr().err == ""  # no line of a decoder or encoder


@pytest.mark.parametrize(
    "value", [b"\0" * 70_000, "x" * 70_000, (1.5, 2.5), -7, 2**31, "\U0001f600"]
)
@pytest.mark.parametrize("target", ["png", "tif", "jpg", "webp", "bmp"])
def test_unusual_tags_never_lose_the_pixels(value, target, tmp_path):
    exif = Image.Exif()
    exif[0xC7A1] = value
    im = Image.new("RGB", (8, 8), "red")
    try:
        im.save(tmp_path / "in.webp", exif=exif.tobytes())
    except Exception:
        pytest.skip("Pillow does not write this value")
    jobs = batch.plan_jobs([str(tmp_path / "in.webp")], str(tmp_path / f"out.{target}"))
    (result,) = batch.upscale_files(jobs, nearest, 2)
    assert result.status == "done", result.error
    assert 0xC7A1 in Image.open(tmp_path / f"out.{target}").getexif() or "EXIF" in str(result.notes)


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("compressed", [False, True])
def test_wide_layouts_through_upscale(order, compressed, tmp_path):
    "What a camera or a scanner writes: white is zero, 12 bits, LZW."
    how = dict(pack=lzw, t259=5) if compressed else {}
    a = np.random.default_rng(0).integers(0, 65536, (5, 6, 1))
    (tmp_path / "a.tif").write_bytes(write_tiff(a, 16, 0, order=order, **how))
    jobs = batch.plan_jobs([str(tmp_path / "a.tif")], str(tmp_path / "b.tif"))
    (result,) = batch.upscale_files(jobs, nearest, 2)
    want = (65535 - a[..., 0]).repeat(2, 0).repeat(2, 1)
    assert np.array_equal(tifffile.imread(tmp_path / "b.tif"), want) and not result.notes


PNG_COLOR = [
    (b"cICP", bytes([9, 16, 0, 1]), "cICP"),
    (b"mDCV", bytes(24), "mDCV"),
    (b"cLLI", bytes(8), "cLLI"),
    (b"gAMA", struct.pack(">I", 100_000), "gAMA"),
    (b"cHRM", struct.pack(">8I", *range(8)), "cHRM"),
    (b"gAMA", struct.pack(">I", 45455), None),
    (b"sRGB", b"\0", None),
    (b"cICP", bytes([1, 13, 0, 1]), None),
]


@pytest.mark.parametrize("name, data, noted", PNG_COLOR)
@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("target", ["png", "tif", "jpg", "webp", "bmp"])
def test_color_description_of_a_png(name, data, noted, bits, target, tmp_path):
    a = np.random.default_rng(0).integers(0, 2**bits, (5, 6, 3))
    (tmp_path / "in.png").write_bytes(write_png(a, bits, 2, [(name, data)]))
    jobs = batch.plan_jobs([str(tmp_path / "in.png")], str(tmp_path / f"out.{target}"))
    (result,) = batch.upscale_files(jobs, nearest, 2)
    content = (tmp_path / f"out.{target}").read_bytes()
    assert (png_chunk(name, data) in content) == (target == "png")
    assert any(noted in n for n in result.notes) if noted and target != "png" else True
    assert noted or not any("PNG color" in n for n in result.notes)
