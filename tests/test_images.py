"Images: formats, faults, folders of any size, splits, benchmark sets, downloads."

import hashlib
import http.server
import json
import os
import struct
import threading
import zlib
from collections import Counter

import numpy as np
import pytest
import tifffile
import torch
from benchmark_sets import find_set
from PIL import Image
from raw_images import write_tiff

from tocsr.core import download as net
from tocsr.core import image as C
from tocsr.core.config import DataConfig
from tocsr.data import benchmarks as B
from tocsr.data import images as I
from tocsr.data import index as X

H = 24
W = 40


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TOCSR_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("TOCSR_DATA", raising=False)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "photos").mkdir()
    return tmp_path / "photos"


def smooth():
    "A color image that JPEG keeps well, uint8 (H, W, 3)."
    y, x = np.mgrid[:H, :W]
    return np.stack([x * 255 // (W - 1), y * 255 // (H - 1), 128 + 0 * x], -1).astype(np.uint8)


def noise(i, h=140, w=150):
    return np.random.default_rng(i).integers(0, 256, (h, w, 3), dtype=np.uint8)


def save(path, array, **kw):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **kw)
    return path


def cfg(folder, **kw):
    return DataConfig(source=str(folder), **kw)


def png(path, array, color):
    "An uncompressed-filter PNG of any bit depth; Pillow writes no 16-bit color."
    h, w = array.shape[:2]
    rows = array.astype(">u2").reshape(h, -1)
    raw = b"".join(b"\0" + r.tobytes() for r in rows)

    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    head = struct.pack(">IIBBBBB", w, h, 16, color, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + chunk(b"IDAT", zlib.compress(raw))
        + chunk(b"IEND", b"")
    )
    return path


# reading: what is converted, and to what


@pytest.mark.parametrize(
    "name, options, tolerance",
    [
        ("a.png", {}, 0),
        ("a.PNG", {}, 0),
        ("a.bmp", {}, 0),
        ("a.tif", {}, 0),
        ("a.tiff", dict(compression="tiff_lzw"), 0),
        ("a.webp", dict(lossless=True), 0),
        ("a.webp", dict(quality=95), 12),
        ("a.jpg", dict(quality=95), 8),
        ("a.jpeg", dict(quality=95, progressive=True), 8),
    ],
)
def test_formats(folder, name, options, tolerance):
    x = C.read_image(save(folder / name, smooth(), **options))
    assert x.dtype == np.uint8 and x.shape == (H, W, 3)
    assert np.abs(x.astype(int) - smooth()).max() <= tolerance


@pytest.mark.parametrize(
    "mode, name, tolerance",
    [
        ("L", "a.png", 0),
        ("L", "a.jpg", 4),
        ("1", "a.png", 0),
        ("P", "a.png", 0),
        ("P", "a.bmp", 0),
        ("LA", "a.png", 0),
        ("CMYK", "a.jpg", 4),
        ("CMYK", "a.tif", 1),
        ("YCbCr", "a.jpg", 6),
        ("LAB", "a.tif", 6),
    ],
)
def test_modes_become_rgb(folder, mode, name, tolerance):
    y = np.mgrid[:H, :W][0]
    gray = np.repeat((y * 255 // (H - 1)).astype(np.uint8)[..., None], 3, -1)
    if mode == "1":
        gray = np.where(gray > 127, 255, 0).astype(np.uint8)
    source = Image.fromarray(gray)
    if mode == "LAB":
        from PIL import ImageCms

        im = ImageCms.profileToProfile(
            source, ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB"
        )
    else:
        im = source.convert("L").convert("P") if mode == "P" else source.convert(mode)
    im.save(folder / name, **(dict(quality=95) if name.endswith("jpg") else {}))
    x = C.read_image(folder / name)
    assert x.shape == (H, W, 3) and np.abs(x.astype(int) - gray).max() <= tolerance


def test_16_bits_are_rounded_to_8(folder):
    v = np.arange(0, 65536, 64).reshape(32, 32)
    expected = np.round(v / 257).astype(int)
    Image.fromarray(v.astype(np.uint16)).save(folder / "gray.png")
    Image.fromarray(v.astype(np.uint16)).save(folder / "gray.tif")
    tifffile.imwrite(
        folder / "rgb.tif", np.repeat(v[..., None], 3, -1).astype(np.uint16), photometric="rgb"
    )
    png(folder / "rgb.png", np.repeat(v[..., None], 3, -1), 2)
    for name, tolerance in (("gray.png", 0), ("gray.tif", 0), ("rgb.tif", 1), ("rgb.png", 1)):
        x = C.read_image(folder / name).astype(int)
        assert np.abs(x - expected[..., None]).max() <= tolerance, name


def test_alpha_is_composited_on_white(folder):
    rgba = np.dstack([smooth(), np.full((H, W), 255, np.uint8)])
    rgba[:, : W // 2, 3] = 0
    x = C.read_image(save(folder / "a.png", rgba))
    assert (x[:, : W // 2] == 255).all() and (x[:, W // 2 :] == smooth()[:, W // 2 :]).all()
    half = C.read_image(save(folder / "b.png", np.full((4, 4, 4), (0, 0, 0, 128), np.uint8)))
    assert np.abs(half.astype(int) - 127).max() <= 1
    palette = Image.fromarray(np.array([[0, 1]], np.uint8).repeat(4, 0), "L").convert("P")
    palette.putpalette([255, 0, 0, 0, 0, 255])
    palette.save(folder / "p.png", transparency=0)
    assert C.read_image(folder / "p.png")[0].tolist() == [[255, 255, 255], [0, 0, 255]]


@pytest.mark.parametrize(
    "orientation, turned",
    [
        (1, lambda x: x),
        (2, lambda x: x[:, ::-1]),
        (3, lambda x: x[::-1, ::-1]),
        (4, lambda x: x[::-1]),
        (5, lambda x: x.transpose(1, 0, 2)),
        (6, lambda x: np.rot90(x, -1)),
        (7, lambda x: np.rot90(x, 2).transpose(1, 0, 2)),
        (8, lambda x: np.rot90(x, 1)),
    ],
)
def test_exif_orientation_is_applied(folder, orientation, turned):
    exif = Image.Exif()
    exif[0x0112] = orientation
    for name in ("a.png", "a.jpg"):
        x = C.read_image(save(folder / name, smooth(), exif=exif, quality=95))
        assert (
            x.shape == turned(smooth()).shape
            and np.abs(x.astype(int) - turned(smooth())).max() <= 8
        )


# reading: what is refused, and how


def fault_truncated(p):
    save(p, noise(0))
    p.write_bytes(p.read_bytes()[: p.stat().st_size // 2])


def fault_text(p):
    p.write_text("dear diary")


def fault_empty(p):
    p.touch()


def fault_float(p):
    Image.fromarray(np.ones((8, 8), np.float32)).save(p, "TIFF")


def fault_int32(p):
    Image.fromarray(np.full((8, 8), 70_000, np.int32)).save(p, "TIFF")


def fault_bomb(p):
    "A header that promises 60000 x 60000 pixels."
    png(p, np.zeros((2, 2, 3)), 2)
    b = bytearray(p.read_bytes())
    b[16:24] = struct.pack(">II", 60_000, 60_000)
    b[29:33] = struct.pack(">I", zlib.crc32(b[12:29]))
    p.write_bytes(b)


def fault_large(p):
    "Between our limit and Pillow's."
    png(p, np.zeros((2, 2, 3)), 2)
    b = bytearray(p.read_bytes())
    b[16:24] = struct.pack(">II", 10_000, 8_500)
    b[29:33] = struct.pack(">I", zlib.crc32(b[12:29]))
    p.write_bytes(b)


FAULTS = [
    (fault_truncated, "damaged"),
    (fault_text, "not an image"),
    (fault_empty, "not an image"),
    (fault_float, "floating point pixels"),
    (fault_int32, "32-bit integer pixels"),
    (fault_bomb, "too many pixels"),
    (fault_large, "too many pixels"),
    (lambda p: None, "no such file"),
]


@pytest.mark.parametrize("make, reason", FAULTS)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_faults_name_file_reason_and_hint(folder, make, reason):
    p = folder / "holiday.png"
    make(p)
    with pytest.raises(C.ImageError) as e:
        C.read_image(p)
    assert (
        e.value.reason == reason and "holiday.png" in str(e.value) and e.value.hint in str(e.value)
    )


@pytest.mark.filterwarnings("ignore:.*:UserWarning:PIL")
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
def test_no_cut_and_no_flipped_byte_escapes_as_another_exception(folder, suffix):
    whole = save(folder / f"a.{suffix}", noise(1, 40, 40)).read_bytes()
    rng = np.random.default_rng(0)
    p = folder / f"b.{suffix}"
    for trial in range(60):
        b = bytearray(whole[: rng.integers(1, len(whole))] if trial % 2 else whole)
        for _ in range(3):
            b[rng.integers(0, min(len(b), 200))] = rng.integers(0, 256)
        p.write_bytes(b)
        try:
            x = C.read_image(p)
        except C.ImageError:
            continue
        assert x.dtype == np.uint8 and x.ndim == 3 and x.shape[2] == 3


def test_tensors_and_arrays_are_inverse():
    a = noise(2)
    t = C.to_tensor(np.stack([a, a]))
    assert (
        t.shape == (2, 3, 140, 150) and t.dtype == torch.float32 and (C.to_array(t)[1] == a).all()
    )


# folders


def test_embedded_photographs_need_nothing_but_the_installed_packages():
    photos = I.load_photos(DataConfig())
    assert len(photos) == len(I.EMBEDDED) == len({p.name for p in I.EMBEDDED})
    assert all(min(photos.read(i).shape[:2]) >= 300 for i in range(len(photos)))
    assert all(p.license and p.credit for p in I.EMBEDDED)


@pytest.mark.parametrize(
    "source, words", [("", ("data.source",)), ("nowhere", ("nowhere", "no such folder"))]
)
def test_a_missing_source_is_named(source, words):
    with pytest.raises(C.ImageError) as e:
        I.load_photos(DataConfig(source=source))
    assert all(w in str(e.value) for w in words)


def test_an_empty_folder_is_named_with_what_was_skipped(folder):
    (folder / "notes.txt").touch()
    with pytest.raises(C.ImageError) as e:
        I.load_photos(cfg(folder))
    assert str(folder) in str(e.value) and "not an image file" in str(e.value)


def test_a_mixed_folder_is_read_or_counted(folder):
    for i, n in enumerate(("a.jpg", "b.png", "deep/er/c.webp", "deep/d.tif")):
        save(folder / n, noise(i))
    save(folder / "copy.png", noise(1))
    save(folder / "small.png", noise(9)[:100])
    fault_text(folder / "text.png")
    fault_truncated(folder / "cut.png")
    (folder / "notes.txt").touch()
    save(folder / ".hidden.png", noise(8))
    photos = I.load_photos(cfg(folder))
    assert photos.names == ("a.jpg", "b.png", "deep/d.tif", "deep/er/c.webp")
    assert photos.report() == {
        "usable": 4,
        "not an image file": 1,
        "damaged": 1,
        "not an image": 1,
        "smaller than the crop": 1,
        "duplicate": 1,
    }
    assert (photos.read(1) == noise(1)).all() and photos.name(1) == "b.png"


@pytest.mark.parametrize("eager", [2_000, 1])
def test_what_a_folder_holds_besides_images_is_named(folder, tmp_path, monkeypatch, eager):
    monkeypatch.setattr(I, "MAX_INSPECTED", eager)
    for i, n in enumerate(("a.jfif", "b.jpe", "c.png")):
        save(folder / n, noise(i), **(dict(format="JPEG") if n != "c.png" else {}))
    for n in ("d.avif", "e.AVIF", "f.heic", "g.jp2", "h.gif", "notes.txt", "raw.dng"):
        (folder / n).touch()
    (tmp_path / "elsewhere").mkdir()
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    expected = {f"format not read ({s})": 1 for s in (".heic", ".jp2", ".gif", ".dng")}
    expected |= {"format not read (.avif)": 2, "not an image file": 1, "linked folder": 1}
    assert I.load_photos(cfg(folder)).report() == {"usable": 3, **expected}


def test_an_index_of_an_earlier_version_is_built_again(folder, tmp_path):
    save(folder / "a.png", noise(0))
    known = X.build_index(folder, tmp_path / "index")
    (tmp_path / "index/index.json").write_text(json.dumps(known | dict(other=3)))
    assert X.build_index(folder, tmp_path / "index") == known


@pytest.mark.parametrize("order", "<>")
def test_layouts_that_pillow_misreads_train_as_they_look(folder, order):
    "White is zero, separate planes, 12 bits."
    a = np.random.default_rng(0).integers(0, 2**12, (140, 150, 3))
    (folder / "w.tif").write_bytes(write_tiff(65535 - a[..., :1] * 16, 16, 0, order=order))
    (folder / "p.tif").write_bytes(write_tiff(a * 16, 16, 2, planar=2, order=order))
    (folder / "t.tif").write_bytes(write_tiff(a, 12, 2, order=order))
    photos = I.load_photos(cfg(folder))
    assert photos.names == ("p.tif", "t.tif", "w.tif")
    for i, scale in ((0, 16 / 257), (1, 255 / 4095), (2, 16 / 257)):
        want = a[..., :1].repeat(3, -1) if i == 2 else a
        assert np.abs(photos.read(i) - want * scale).max() < 0.51 + 0.01


def test_the_manifest_hash_follows_content_and_not_time_or_place(folder, tmp_path):
    for i in range(3):
        save(folder / f"{i}.png", noise(i))
    first = I.load_photos(cfg(folder)).manifest_hash
    os.utime(folder / "0.png", (1, 1))
    assert I.load_photos(cfg(folder)).manifest_hash == first
    moved = folder.rename(tmp_path / "elsewhere")
    assert I.load_photos(cfg(moved)).manifest_hash == first
    save(moved / "0.png", noise(7))
    assert I.load_photos(cfg(moved)).manifest_hash != first


def test_inspections_are_remembered(folder, monkeypatch):
    for i in range(3):
        save(folder / f"{i}.png", noise(i))
    I.load_photos(cfg(folder))
    looked = []
    monkeypatch.setattr(
        I, "inspect_file", lambda p, real=I.inspect_file: looked.append(p.name) or real(p)
    )
    save(folder / "1.png", noise(5))
    save(folder / "3.png", noise(3))
    assert len(I.load_photos(cfg(folder))) == 4 and looked == ["1.png", "3.png"]


# splits and crops


def test_adding_photographs_moves_no_other(folder):
    for i in range(40):
        save(folder / f"{i}.png", noise(i, 16, 16))
    c = cfg(folder, patch=16, val_share=0.3)
    old = {p: set(I.load_photos(c).split(p).names) for p in ("train", "val")}
    for i in range(40, 80):
        save(folder / f"{i}.png", noise(i, 16, 16))
    new = {p: set(I.load_photos(c).split(p).names) for p in ("train", "val")}
    assert (
        old["train"] <= new["train"] and old["val"] <= new["val"] and not new["train"] & new["val"]
    )
    assert 10 <= len(new["val"]) <= 40


def test_every_side_gets_a_photograph_or_an_error(folder):
    for i in range(2):
        save(folder / f"{i}.png", noise(i))
    for seed in range(6):
        photos = I.load_photos(cfg(folder, seed=seed))
        assert len(photos.split("train")) == len(photos.split("val")) == 1
    (folder / "1.png").unlink()
    with pytest.raises(C.ImageError, match="no photograph for (train|val)"):
        for part in ("train", "val"):
            I.load_photos(cfg(folder)).split(part)
    with pytest.raises(ValueError, match="test"):
        photos.split("test")


def test_crops_are_pieces_of_the_photographs_and_depend_on_the_generator_alone(folder):
    yy, xx = np.mgrid[:200, :200]
    save(folder / "a.png", np.stack([xx, yy, 0 * xx + 7], -1).astype(np.uint8))
    photos = I.load_photos(cfg(folder))
    c = C.to_array(photos.crops(50, 64, torch.Generator().manual_seed(1)))
    flips = 0
    for t in c.astype(int):
        step = t[0, 1, 0] - t[0, 0, 0]
        assert (
            abs(step) == 1
            and (np.diff(t[..., 0], axis=1) == step).all()
            and (np.diff(t[..., 1], axis=0) == 1).all()
            and (t[..., 2] == 7).all()
        )
        flips += step < 0
    assert 10 < flips < 40 and len({t.tobytes() for t in c}) > 40
    assert (
        c == C.to_array(I.load_photos(cfg(folder)).crops(50, 64, torch.Generator().manual_seed(1)))
    ).all()


def test_the_bias_prefers_texture_and_does_not_forbid_the_rest(folder):
    x = np.full((256, 512, 3), 128, np.uint8)
    x[:, 256:] = noise(0, 256, 256)
    save(folder / "a.png", x)
    photos = I.load_photos(cfg(folder))
    share = {}
    for bias in (True, False):
        c = photos.crops(200, 32, torch.Generator().manual_seed(0), bias)
        share[bias] = (c.std((1, 2, 3)) > 0.1).float().mean().item()
    assert 0.4 < share[False] < 0.65 < share[True] < 1


def test_crops_larger_than_some_photographs_use_the_others_and_say_so(folder):
    save(folder / "a.png", noise(0, 130, 130))
    save(folder / "b.png", noise(1, 300, 300))
    photos = I.load_photos(cfg(folder))
    assert photos.crops(8, 256, torch.Generator().manual_seed(0)).shape == (8, 3, 256, 256)
    assert photos.report()["smaller than a 256 pixel crop"] == 1
    with pytest.raises(C.ImageError, match="301 pixel"):
        photos.crops(1, 301, torch.Generator())


def test_the_cache_stays_below_its_limit(folder, monkeypatch):
    for i in range(6):
        save(folder / f"{i}.png", noise(i))
    monkeypatch.setattr(I, "CACHE_BYTES", 3 * 140 * 150 * 3)
    photos = I.load_photos(cfg(folder))
    for i in (0, 1, 2, 0, 3):
        photos.read(i)
    assert list(photos._cache) == ["2.png", "0.png", "3.png"]
    with pytest.raises(ValueError):
        photos.read(0)[0] = 0  # shared pixels are read-only


# folders too large to list


def test_an_index_of_20k_files_resumes_where_it_was_killed(folder, tmp_path, monkeypatch):
    names = sorted(
        [f"{i:05d}.jpg" for i in range(10_000)] + [f"d{i % 7}/{i:05d}.png" for i in range(10_000)],
        key=os.fsencode,
    )
    for d in range(7):
        (folder / f"d{d}").mkdir()
    for n in names:
        (folder / n).touch()
    reference = X.build_index(folder, tmp_path / "whole", run=1_000)
    seen = []
    whole = X.FolderWalk.__iter__

    def killed(self):
        for item in whole(self):
            if len(seen) == 12_345:
                raise KeyboardInterrupt
            seen.append(item)
            yield item

    monkeypatch.setattr(X.FolderWalk, "__iter__", killed)
    with pytest.raises(KeyboardInterrupt):
        X.build_index(folder, tmp_path / "index", run=1_000)
    monkeypatch.setattr(
        X.FolderWalk, "__iter__", lambda self: (seen.append(x) or x for x in whole(self))
    )
    record = X.build_index(folder, tmp_path / "index", run=1_000)
    assert (
        len(seen) == 12_345 + 8_000
    )  # only what followed the last of twelve full runs was walked again
    lines = X.LineIndex(tmp_path / "index/names.txt", tmp_path / "index/names.offsets")
    assert (
        list(lines) == names
        and lines[-1] == names[-1]
        and record["sha256"] == reference["sha256"]
        and record["count"] == 20_000
    )
    assert sorted(p.name for p in (tmp_path / "index").iterdir()) == [
        "index.json",
        "names.offsets",
        "names.txt",
    ]
    with pytest.raises(IndexError):
        lines[20_000]
    seen.clear()
    assert X.build_index(folder, tmp_path / "index") == record and not seen
    (folder / "d3/new.png").touch()
    assert X.build_index(folder, tmp_path / "index")["count"] == 20_001


def test_a_large_folder_behaves_like_a_small_one(folder, monkeypatch):
    for i in range(12):
        save(folder / f"{i}.png", noise(i))
    fault_text(folder / "text.png")
    save(folder / "small.png", noise(0)[:64])
    eager = I.load_photos(cfg(folder, val_share=0.4))
    monkeypatch.setattr(I, "MAX_INSPECTED", 5)
    lazy = I.load_photos(cfg(folder, val_share=0.4))
    assert (
        isinstance(lazy.names, X.LineIndex)
        and len(lazy) == 14
        and lazy.manifest_hash != eager.manifest_hash
    )
    for part in ("train", "val"):
        assert set(eager.split(part).names) == set(lazy.split(part).names) - {
            "text.png",
            "small.png",
        }
    assert lazy.crops(60, 96, torch.Generator().manual_seed(0)).shape == (60, 3, 96, 96)
    assert lazy.report() == {"usable": 14, "not an image": 1, "smaller than a 96 pixel crop": 1}
    assert set(lazy.split("val").names) == set(
        I.load_photos(cfg(folder, val_share=0.4)).split("val").names
    )


def test_the_split_of_a_changed_large_folder_is_made_again(folder, monkeypatch):
    monkeypatch.setattr(I, "MAX_INSPECTED", 3)
    for i in range(8):
        save(folder / f"{i}.png", noise(i))
    before = len(I.load_photos(cfg(folder, val_share=0.5)).split("train")) + len(
        I.load_photos(cfg(folder, val_share=0.5)).split("val")
    )
    save(folder / "8.png", noise(8))
    photos = I.load_photos(cfg(folder, val_share=0.5))
    assert before == 8 and len(photos.split("train")) + len(photos.split("val")) == 9


# benchmark sets


@pytest.fixture
def planted(monkeypatch):
    "An image that counts as one of Set5's."
    x = noise(77)
    known = {(150, 140): {hashlib.sha256(x.tobytes()).hexdigest(): "Set5"}}
    monkeypatch.setattr(B, "_benchmark_pixels", lambda: known)
    return x


@pytest.mark.parametrize("name", ["holiday.png", "holiday.bmp", "holiday.tif"])
@pytest.mark.parametrize("eager", [2_000, 1])
def test_a_benchmark_image_never_enters_training(folder, monkeypatch, planted, name, eager):
    monkeypatch.setattr(I, "MAX_INSPECTED", eager)
    for i in range(3):
        save(folder / f"{i}.png", noise(i))
    save(folder / name, planted)
    photos = I.load_photos(cfg(folder))
    crops = C.to_array(photos.crops(100, 140, torch.Generator().manual_seed(0)))
    assert photos.report()["benchmark image (Set5)"] == 1
    pieces = {
        t.tobytes()
        for s in (planted, planted[:, ::-1])
        for t in (s[:, v : v + 140] for v in range(11))
    }
    assert not any(c.tobytes() in pieces for c in crops)


@pytest.mark.parametrize("name, count", [("Set5", 5), ("Set14", 14)])
def test_real_sets_are_verified_and_recognized(name, count, folder):
    found = find_set(name)
    assert len(found) == count and found.complete and found.lr is None
    assert {B.find_benchmark(C.read_image(p)) for p in found.hr} == {name}
    save(folder / "renamed.bmp", C.read_image(found.hr[0]))
    with pytest.raises(C.ImageError, match=name):
        I.load_photos(cfg(folder))


def small_set(monkeypatch, url, content):
    manifest = {
        "Set5": dict(
            url=url,
            files=[
                [n, len(c), hashlib.sha256(c).hexdigest(), 1, 1, "0" * 64]
                for n, c in content.items()
            ],
        )
    }
    monkeypatch.setattr(B, "read_manifest", lambda: manifest)


def test_an_altered_benchmark_file_is_an_error_that_names_it(tmp_path, monkeypatch):
    small_set(monkeypatch, "http://127.0.0.1:9/", {"a.png": b"right"})
    (tmp_path / "bench/Set5").mkdir(parents=True)
    (tmp_path / "bench/Set5/a.png").write_bytes(b"wrong")
    with pytest.raises(net.FetchError, match="a.png.*sha256 differs"):
        B.load_benchmark("Set5", root=tmp_path)
    (tmp_path / "bench/Set5/a.png").write_bytes(b"right")
    monkeypatch.setenv("TOCSR_DATA", str(tmp_path))
    assert [p.read_bytes() for p in B.load_benchmark("Set5").hr] == [b"right"]


def test_paired_sets_want_equal_names(tmp_path):
    with pytest.raises(ValueError, match="Set6.*Set5"):
        B.load_benchmark("Set6")
    with pytest.raises(net.FetchError, match="TOCSR_DATA.*not set.*StableSR"):
        B.load_benchmark("DRealSR")
    for n in ("gt/a.png", "gt/b.png", "lq/a.png"):
        save(tmp_path / "DIV2K_V2_val" / n, noise(0, 8, 8))
    with pytest.raises(net.FetchError, match="unpaired.*b.png"):
        B.load_benchmark("DIV2K-Val", root=tmp_path)
    save(tmp_path / "DIV2K_V2_val/lq/b.png", noise(0, 8, 8))
    found = B.load_benchmark("DIV2K-Val", root=tmp_path)
    assert (
        len(found) == 2 and not found.complete and [p.parent.name for p in found.lr] == ["lq", "lq"]
    )


# the fetcher


class Server:
    "Serves `files`; closes the first `cuts` connections after `cut` bytes; honors Range if told."

    def __init__(self, files, cut=None, cuts=0, ranges=True):
        self.asked = []
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                span = self.headers.get("Range")
                outer.asked.append((self.path, span))
                body = files.get(self.path)
                if body is None:
                    self.send_error(404)
                    return
                start = int(span[6:-1]) if span and ranges else 0
                if start and start >= len(body):
                    self.send_error(416)
                    return
                self.send_response(206 if start else 200)
                self.send_header("Content-Length", str(len(body) - start))
                self.end_headers()
                self.wfile.write(
                    body[start : start + cut] if len(outer.asked) <= cuts else body[start:]
                )

            def log_message(self, *args):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *args):
        self.server.shutdown()
        self.server.server_close()


BODY = np.random.default_rng(0).bytes(300_000)
SHA = hashlib.sha256(BODY).hexdigest()


def test_fetch_resumes_a_cut_connection(tmp_path):
    with Server({"/x": BODY}, cut=100_000, cuts=2) as s:
        got = net.fetch_file([s.url + "/x"], sha256=SHA, dest=tmp_path / "deep/x")
    assert got.read_bytes() == BODY and [a[1] for a in s.asked] == [
        None,
        "bytes=100000-",
        "bytes=200000-",
    ]
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["x"]


def test_fetch_resumes_in_a_later_process(tmp_path):
    (tmp_path / "x.part").write_bytes(BODY[:123_456])
    with Server({"/x": BODY}) as s:
        net.fetch_file([s.url + "/x"], sha256=SHA, dest=tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == BODY and s.asked == [("/x", "bytes=123456-")]


def test_fetch_starts_again_where_the_server_cannot_resume(tmp_path):
    with Server({"/x": BODY}, cut=100_000, cuts=1, ranges=False) as s:
        net.fetch_file([s.url + "/x"], sha256=SHA, dest=tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == BODY and len(s.asked) == 2


@pytest.mark.parametrize("left", [b"other bytes", BODY + b"too much", BODY])
def test_fetch_recovers_from_a_foreign_or_complete_part(tmp_path, left):
    (tmp_path / "x.part").write_bytes(left)
    with Server({"/x": BODY}) as s:
        net.fetch_file([s.url + "/x"], sha256=SHA, dest=tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == BODY


def test_fetch_never_renames_wrong_content(tmp_path):
    with (
        Server({"/x": b"an error page"}) as s,
        pytest.raises(net.FetchError, match="x: content differs.*" + SHA[:12]),
    ):
        net.fetch_file([s.url + "/x"], sha256=SHA, dest=tmp_path / "x")
    assert not list(tmp_path.glob("x*"))


def test_fetch_tries_the_next_address_and_reports_all(tmp_path):
    with Server({"/good": BODY}) as s:
        assert (
            net.fetch_file(
                [s.url + "/gone", s.url + "/good"], sha256=SHA, dest=tmp_path / "x"
            ).read_bytes()
            == BODY
        )
        assert len(s.asked) == 2  # a missing file is not asked for again
        assert (
            net.fetch_file([s.url + "/gone"], sha256=SHA, dest=tmp_path / "x").read_bytes() == BODY
            and len(s.asked) == 2
        )  # already there
    with pytest.raises(net.FetchError) as e:
        net.fetch_file([s.url + "/a", s.url + "/b"], sha256=SHA, dest=tmp_path / "y")
    assert "/a" in str(e.value) and "/b" in str(e.value) and "refused" in str(e.value)


def test_a_set_is_downloaded_once_and_then_found_offline(tmp_path, monkeypatch):
    content = {"a.png": b"one", "b.png": b"two"}
    with Server({f"/{n}": c for n, c in content.items()}) as s:
        small_set(monkeypatch, s.url + "/", content)
        assert [p.read_bytes() for p in B.load_benchmark("Set5").hr] == [b"one", b"two"]
    assert [p.read_bytes() for p in B.load_benchmark("Set5", download=False).hr] == [b"one", b"two"]
    (tmp_path / "cache/bench/Set5/b.png").unlink()
    with pytest.raises(net.FetchError, match="b.png.*refused"):
        B.load_benchmark("Set5")
    with pytest.raises(net.FetchError, match="b.png.*TOCSR_DATA"):
        B.load_benchmark("Set5", download=False)


# the seam: an image source is one class and one row


def open_synthetic(rest, cfg):
    "A source that is no folder: `rest` images of noise, one of them planted."

    class Synthetic:
        names = [f"{i}.x" for i in range(int(rest))]
        fingerprint = f"synthetic {rest}"
        inspected = False

        def __init__(self):
            self.skipped = Counter()

        def read(self, name):
            return noise(int(name[:-2]))

    return Synthetic()


def test_adding_an_image_source_is_one_place(monkeypatch):
    monkeypatch.setitem(I.SOURCES, "synthetic", open_synthetic)
    photos = I.load_photos(DataConfig(source="synthetic:40"))
    train = photos.split("train")
    val = photos.split("val")
    assert len(photos) == 40 == len(train) + len(val) and photos.manifest_hash == "synthetic 40"
    assert train.manifest_hash != val.manifest_hash
    assert train.crops(3, 128, torch.Generator().manual_seed(0)).shape == (3, 3, 128, 128)
    assert set(photos.subset(["1.x", "3.x"]).names) == {"1.x", "3.x"}
    x = noise(7)
    known = {(x.shape[1], x.shape[0]): {hashlib.sha256(x.tobytes()).hexdigest(): "Set14"}}
    monkeypatch.setattr(B, "_benchmark_pixels", lambda: known)
    with pytest.raises(C.ImageError, match="Set14"):
        I.load_photos(DataConfig(source="synthetic:40")).read(7)


def test_a_folder_named_like_no_source_stays_a_folder(tmp_path):
    with pytest.raises(C.ImageError, match="other:3.*no such folder"):
        I.load_photos(DataConfig(source=str(tmp_path / "other:3")))
    with pytest.raises(C.ImageError, match="embedded, folder"):
        I.load_photos(DataConfig(source=""))
