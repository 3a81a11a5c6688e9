"Malformed files: two hundred of them, and none may crash, hang or leave half a result."

import io
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tocsr.inference import batch, image_files
from tocsr.inference.metadata import Metadata

COUNT = 200
LIMIT_S = 40


def double(x, progress):
    return x.repeat_interleave(2, -1).repeat_interleave(2, -2)


def seeds():
    "Whole files of every format and many kinds of pixels."
    a = np.random.default_rng(0).integers(0, 256, (24, 20, 4), dtype=np.uint8)
    a[:12] = np.arange(12, dtype=np.uint8)[:, None, None] * 20  # something that compresses
    rgba = Image.fromarray(a)
    exif = Image.Exif()
    out = {}
    exif[0x0112], exif[0x010F], exif.get_ifd(0x8769)[0xA002] = 6, "a maker", 20
    rgb = rgba.convert("RGB")
    kinds = [
        ("rgb.jpg", rgb, dict(exif=exif)),
        ("progressive.jpg", rgb, dict(progressive=True)),
        ("cmyk.jpg", rgb.convert("CMYK"), {}),
        ("gray.jpg", rgb.convert("L"), {}),
        ("rgba.png", rgba, dict(exif=exif)),
        ("palette.png", rgb.convert("P"), dict(transparency=0)),
        ("gray16.png", Image.fromarray(a[..., 0].astype(np.uint16) * 257), {}),
        ("bits.png", rgb.convert("1"), {}),
        ("rgba.webp", rgba, dict(lossless=True)),
        ("rgb.webp", rgb, dict(exif=exif)),
        ("rgb.tif", rgb, dict(exif=exif)),
        ("lzw.tif", rgba, dict(compression="tiff_lzw")),
        ("jpeg.tif", rgb, dict(compression="jpeg")),
        ("rgb.bmp", rgb, {}),
        ("palette.bmp", rgb.convert("P"), {}),
        ("frames.gif", rgb, dict(save_all=True, append_images=[rgb.rotate(90)])),
        ("frames.webp", rgb, dict(save_all=True, append_images=[rgb.rotate(90)])),
    ]
    for name, im, how in kinds:
        buffer = io.BytesIO()
        im.save(
            buffer,
            {"jpg": "JPEG", "tif": "TIFF"}.get(name[-3:], name.split(".")[-1].upper()),
            **how,
        )
        out[name] = buffer.getvalue()
    deep = torch.from_numpy(a[..., :3].astype(np.float32)).permute(2, 0, 1) / 127.5 - 1
    for kind in ("png", "tiff"):
        out[f"deep.{kind}"] = image_files.encode_image(
            image_files.DecodedImage(deep, bits=16, metadata=Metadata(exif=exif)),
            image_files.FORMATS[kind],
        )[0]
    return out


def damaged(data: bytes, rng: np.random.Generator) -> bytes:
    """Cut off, bits flipped (most in the header, where sizes are), a stretch lost, doubled or
    overwritten.
    """
    b = bytearray(data)
    how = rng.integers(5)
    at = int(rng.integers(len(b)))
    if how == 0:
        return bytes(b[:at])
    if how in (1, 2):
        for _ in range(int(rng.integers(1, 12))):
            b[int(rng.integers(len(b) if how == 1 else min(len(b), 80)))] ^= 1 << int(
                rng.integers(8)
            )
    if how == 3:
        b[at : at + int(rng.integers(1, 64))] = b""
    if how == 4:
        b[at : at + 16] = bytes(rng.integers(0, 256, 16, dtype=np.uint8))
    return bytes(b)


def test_two_hundred_malformed_files(tmp_path, capfd):
    rng = np.random.default_rng(7)
    whole = seeds()
    start = time.monotonic()
    (tmp_path / "in").mkdir()
    for i, name in zip(range(COUNT), list(whole) * COUNT):
        (tmp_path / "in" / f"{i:03d}_{name}").write_bytes(damaged(whole[name], rng))
    out = list(
        batch.upscale_files(
            batch.plan_jobs([str(tmp_path / "in")], str(tmp_path / "out")),
            double,
            2,
            max_pixels=10**6,
        )
    )
    seconds = time.monotonic() - start
    failed = [o for o in out if o.status == "failed"]
    assert len(out) == COUNT and 50 < len(failed) < COUNT and seconds < LIMIT_S, (
        len(out),
        len(failed),
        seconds,
    )
    for o in failed:
        assert o.error and "\n" not in o.error and o.input in o.error and len(o.error) < 700, (
            o.error
        )
    there = {p.name for p in (tmp_path / "out").iterdir()}
    assert there == {Path(o.output).name for o in out if o.status == "done"}
    for o in out:
        if o.status == "done":
            Image.open(o.output).load()


@pytest.mark.parametrize("name", list(seeds()))
def test_whole_files_are_read(name):
    p = image_files.read_image_file(seeds()[name])
    assert set(p.size) == {20, 24} and (p.bits == 16) == (name.startswith(("gray16", "deep")))
