"""Sources of training images other than single folders: pairs, mixtures, held-out sets, datasets,
tars; and training pairs made from them.
"""

import json
import os
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from tocsr.core.config import DataConfig, get_profile, override
from tocsr.core.image import ImageError, to_array, to_tensor
from tocsr.data import benchmarks, images
from tocsr.data.images import MixedNames, load_photos
from tocsr.data.pairs import FreshPairs, HeldOutPairs, crop_pairs, fresh_pairs, make_pairs
from tocsr.models.autoencoder import LatentAutoencoder, fit_pca


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TOCSR_CACHE", str(tmp_path / "cache"))


def noise(i, side=160):
    return np.random.default_rng(i).integers(0, 256, (side, side, 3), dtype=np.uint8)


def folder_of(path, numbers, prefix=""):
    path.mkdir(parents=True)
    for i in numbers:
        Image.fromarray(noise(i)).save(path / f"{prefix}{i}.png")
    return str(path)


def level(i):
    "An image of one color that tells its number."
    return np.full((160, 160, 3), i, np.uint8)


def flat_folder(path, levels):
    path.mkdir(parents=True)
    for i in levels:
        Image.fromarray(level(i) ^ np.uint8(np.eye(160)[..., None] > 0)).save(path / f"{i}.png")
    return str(path)


# mixtures


def test_sources_are_drawn_by_weight_and_their_images_alike(tmp_path):
    one = flat_folder(tmp_path / "one", range(10, 14))
    two = flat_folder(tmp_path / "two", range(100, 120, 2))
    cfg = DataConfig(sources=((one, 3.0), (two, 1.0, 5)), patch=16, val_share=0.0)
    photos = load_photos(cfg)
    assert len(photos) == 4 + 5
    x = to_array(photos.crops(2000, 16, torch.Generator().manual_seed(0))).astype(int)
    drawn = Counter((np.median(x, (1, 2, 3)) // 2 * 2).tolist())
    share = sum(n for v, n in drawn.items() if v < 50) / 2000
    assert abs(share - 0.75) < 0.04
    used = sorted(v for v in drawn if v > 50)  # the first five in the order of names
    assert used == sorted(int(s) for s in sorted(map(str, range(100, 120, 2)))[:5])
    assert min(drawn[v] for v in used) > 0.6 * 500 / 5


@pytest.mark.parametrize("u", [0.0, 0.3, 0.7499, 0.75, 0.999999])
def test_the_index_of_a_uniform_number_is_that_of_the_cumulative_weights(u):
    names = MixedNames([("a", "b"), (), ("c",)], [3.0, 9.0, 1.0])
    expected = ["0/a", "0/b", "2/c"][0 if u < 0.375 else 1 if u < 0.75 else 2]
    assert names[names.draw(u)] == expected and len(names) == 3


def test_the_split_of_a_mixture_holds_out_images_of_every_source(tmp_path):
    one = folder_of(tmp_path / "one", range(20))
    two = folder_of(tmp_path / "two", range(20, 40))
    photos = load_photos(DataConfig(sources=((one, 1.0), (two, 1.0)), val_share=0.3))
    parts = {part: set(photos.split(part).names) for part in ("train", "val")}
    assert not parts["train"] & parts["val"] and len(parts["train"] | parts["val"]) == 40
    assert all(any(n.startswith(f"{k}/") for n in names) for names in parts.values() for k in "01")
    alone = set(load_photos(DataConfig(source=one, val_share=0.3)).split("val").names)
    assert {n[2:] for n in parts["val"] if n.startswith("0/")} == alone
    calibration = photos.split("train").every_nth(4)
    assert isinstance(calibration.names, MixedNames)
    assert calibration.names.weights == [1.0, 1.0] and len(calibration) < len(parts["train"]) / 3


def test_a_mixture_in_a_file_equals_that_of_the_profile(tmp_path):
    one = folder_of(tmp_path / "one", range(3))
    two = folder_of(tmp_path / "two", range(3, 6))
    rows = [[one, 1.0], [two, 0.5, 2]]
    (tmp_path / "sources.json").write_text(json.dumps(rows))
    from_file = load_photos(DataConfig(source=f"mix:{tmp_path / 'sources.json'}"))
    profile = override(get_profile("smoke"), data=dict(sources=rows))
    hash(profile)
    assert from_file.manifest_hash == load_photos(profile.data).manifest_hash
    heavier = DataConfig(sources=((one, 2.0), (two, 0.5, 2)))
    assert load_photos(heavier).manifest_hash != from_file.manifest_hash


@pytest.mark.parametrize(
    "rows, words",
    [
        ((("embedded",),), "cannot use"),
        ((("embedded", 0.0),), "gives no image"),
        ((("embedded", 1.0, 0),), "gives no image"),
        ((("nowhere", 1.0),), "no such folder"),
    ],
)
def test_a_wrong_row_is_named(rows, words):
    with pytest.raises(ImageError, match=words):
        load_photos(DataConfig(sources=rows))


def test_a_missing_or_wrong_file_of_sources_is_named(tmp_path):
    for text in (None, "{}", "no json"):
        if text:
            (tmp_path / "s.json").write_text(text)
        with pytest.raises(ImageError, match="no list of sources"):
            load_photos(DataConfig(source=f"mix:{tmp_path / 's.json'}"))


# validation by name


def test_held_out_images_come_from_the_named_source(tmp_path):
    train = folder_of(tmp_path / "train", range(10))
    val = folder_of(tmp_path / "val", range(10, 13), prefix="v")
    photos = load_photos(DataConfig(source=train, validation=val))
    assert len(photos.split("train")) == 10
    assert photos.split("val").names == ("v10.png", "v11.png", "v12.png")
    assert photos.manifest_hash != load_photos(DataConfig(source=train)).manifest_hash
    assert photos.manifest_hash != photos.split("val").manifest_hash
    p = override(get_profile("smoke"), data=dict(source=train, validation=val, patch=64))
    pairs = HeldOutPairs(p, 128, 8)
    hr = torch.cat([pairs.pair(i)[0] for i in range(len(pairs))])
    held = [noise(i) for i in range(10, 13)]
    assert all(any(contains(x, crop) for x in held) for crop in to_array(hr))


def test_test_images_may_be_held_out_but_never_train(tmp_path, monkeypatch):
    train = folder_of(tmp_path / "train", range(4))
    val = folder_of(tmp_path / "val", range(4, 6))
    known = noise(4).tobytes(), noise(0).tobytes()
    monkeypatch.setattr(
        images, "find_benchmark", lambda x: "Set14" if x.tobytes() in known else None
    )
    monkeypatch.setattr(images, "MAX_INSPECTED", images.MAX_INSPECTED)
    photos = load_photos(DataConfig(source=train, validation=val))
    assert len(photos) == 3 and photos.skipped["benchmark image (Set14)"] == 1
    assert len(photos.split("val")) == 2
    assert benchmarks.find_benchmark(noise(4)) is None


def contains(image, crop):
    "Whether `crop`, or its mirror image, is a piece of `image`."
    h, w = crop.shape[:2]
    for tile in (crop, crop[:, ::-1]):
        rows, columns = np.where((image[: -h + 1 or None, : -w + 1 or None] == tile[0, 0]).all(-1))
        if any((image[y : y + h, x : x + w] == tile).all() for y, x in zip(rows, columns)):
            return True
    return False


# pairs


def pair_folders(tmp_path, n=4, scale=4, suffix=""):
    "HR images of noise and LR images whose pixels are the top left pixels of 4x4 blocks."
    hr = folder_of(tmp_path / "hr", range(n))
    (tmp_path / "lr").mkdir()
    for i in range(n):
        Image.fromarray(noise(i)[::scale, ::scale]).save(tmp_path / "lr" / f"{i}{suffix}.png")
    return f"pairs:{hr}{os.pathsep}{tmp_path / 'lr'}"


@pytest.mark.parametrize("suffix, scale, factor", [("", 4, 8), ("x4", 4, 1), ("x2", 2, 8)])
def test_both_crops_of_a_pair_are_of_one_place(tmp_path, suffix, scale, factor):
    source = pair_folders(tmp_path, scale=scale, suffix=suffix)
    photos = load_photos(DataConfig(source=source, scale=scale, patch=64))
    assert len(photos) == 4 and photos.pair_scale == scale
    options = dict(degradation="bicubic", scale=scale, seed=3, degradation_seeds=range(12))
    hr, lr = crop_pairs(photos, 70, factor, indices=range(12), **options)
    assert hr.shape[-1] == 70 // max(scale, factor) * max(scale, factor) == scale * lr.shape[-1]
    flipped = 0
    for high, low in zip(hr, lr):
        same = torch.equal(high[:, ::scale, ::scale], low)
        mirrored = torch.equal(high.flip(-1)[:, ::scale, ::scale], low.flip(-1))
        assert same or mirrored
        flipped += mirrored
    assert 0 < flipped < 12
    again = crop_pairs(photos, 70, factor, indices=[5], **options | dict(degradation_seeds=[5]))
    assert torch.equal(again[0][0], hr[5]) and torch.equal(again[1][0], lr[5])


def test_files_without_a_counterpart_and_wrong_sizes_are_counted(tmp_path):
    source = pair_folders(tmp_path)
    (tmp_path / "lr/0.png").unlink()
    Image.fromarray(noise(1)[::2, ::2]).save(tmp_path / "lr/1.png")
    photos = load_photos(DataConfig(source=source, patch=64))
    assert len(photos) == 3 and photos.skipped["no LR image"] == 1
    options = dict(degradation="bicubic", scale=4, seed=0)
    crop_pairs(photos, 64, 8, indices=range(20), degradation_seeds=range(20), **options)
    assert photos.skipped["LR image of another size"] == 1
    for f in (tmp_path / "lr").iterdir():
        f.write_text("text")
    with pytest.raises(ImageError, match="no usable pair"):
        crop_pairs(photos, 64, 8, indices=[0], degradation_seeds=[0], **options)
    for f in (tmp_path / "lr").iterdir():
        f.unlink()
    with pytest.raises(ImageError, match="no LR image"):
        load_photos(DataConfig(source=source, patch=64))
    with pytest.raises(ImageError, match="names no two folders"):
        load_photos(DataConfig(source="pairs:here"))
    with pytest.raises(ImageError, match="no such folder"):
        load_photos(DataConfig(source=f"pairs:{tmp_path / 'hr'}{os.pathsep}{tmp_path / 'no'}"))


def test_pairs_of_another_scale_are_refused(tmp_path):
    photos = load_photos(DataConfig(source=pair_folders(tmp_path), patch=64))
    with pytest.raises(ImageError, match="pairs of scale 4"):
        crop_pairs(
            photos,
            64,
            8,
            degradation="bicubic",
            scale=2,
            seed=0,
            indices=[0],
            degradation_seeds=[0],
        )


def test_a_mixture_of_pairs_and_photographs_degrades_only_the_photographs(tmp_path):
    plain = flat_folder(tmp_path / "plain", (200,))
    rows = ((pair_folders(tmp_path), 1.0), (plain, 1.0))
    photos = load_photos(DataConfig(sources=rows, patch=64, val_share=0.0))
    hr, lr = crop_pairs(
        photos,
        64,
        8,
        degradation="bicubic",
        scale=4,
        seed=0,
        indices=range(20),
        degradation_seeds=range(20),
    )
    kinds = Counter()
    for high, low in zip(hr, lr):
        if high.std() < 0.1:
            kinds["photograph"] += 1
            assert (low.mean() - high.mean()).abs() < 0.02
        else:
            mirrored = torch.equal(high.flip(-1)[:, ::4, ::4], low.flip(-1))
            kinds["pair"] += mirrored or torch.equal(high[:, ::4, ::4], low)
    assert sum(kinds.values()) == 20 and min(kinds.values()) > 3


@pytest.fixture(scope="module")
def vae():
    crops = torch.rand(8, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return LatentAutoencoder(fit_pca(crops, 4)).eval()


def test_fresh_pairs_are_the_pool_s_and_never_end(tmp_path, vae):
    photos = load_photos(DataConfig(patch=64))
    options = dict(degradation="realesrgan", patch=64, seed=2)
    pool = make_pairs(tmp_path / "pool", vae, photos, 3, **options)
    fresh = FreshPairs(vae, photos, **options)
    old = pool.batch([2, 0])
    new = fresh.batch([2, 0])
    assert torch.allclose(old.hr, new.hr, atol=1e-6) and torch.allclose(old.lr, new.lr, atol=1e-6)
    assert torch.allclose(old.z_h, new.z_h, atol=2e-3) and old.z_l.shape == new.z_l.shape
    far = fresh.batch([10**12, 2 * 10**12])
    assert not torch.equal(far.hr[0], far.hr[1])
    in_two_steps = fresh.encode(fresh.images([2, 0]))
    assert all(torch.equal(a, b) for a, b in zip(in_two_steps, new))
    smaller = [
        fresh.draw(step, n, None, side=side, stride=4) for step, n, side in ((0, 4, 4), (1, 1, 8))
    ]
    assert [tuple(b["hr"].shape) for b in smaller] == [(4, 3, 32, 32), (1, 3, 64, 64)]
    assert torch.equal(smaller[1]["hr"], fresh.images([4])["hr"])
    same = pool.encode(pool.images([2, 0]))
    assert all(torch.equal(a, b) for a, b in zip(same, old))


def test_training_and_evaluation_read_the_lr_images_of_pairs(tmp_path, vae):
    "LR images of a color of their own, which no degradation makes."
    hr = folder_of(tmp_path / "hr", range(8))
    (tmp_path / "lr").mkdir()
    for i in range(8):
        h, w = noise(i).shape[:2]
        low = np.full((h // 4, w // 4, 3), 10 * i, np.uint8)
        Image.fromarray(low).save(tmp_path / f"lr/{i}.png")
    data = dict(source=f"pairs:{hr}:{tmp_path / 'lr'}", patch=64)
    p = override(get_profile("smoke"), data=data, eval=dict(crops=2, crop=64))
    drawn = fresh_pairs(p, vae).draw(0, 3, torch.Generator())
    held_out = [HeldOutPairs(p, 64, vae.factor).pair(i)[1] for i in range(2)]
    for low in (*drawn["lr"], *held_out):
        assert low.max() == low.min() and round((low.mean().item() + 1) * 127.5) % 10 == 0


def test_worker_processes_prepare_the_same_fresh_pairs(vae):
    photos = load_photos(DataConfig(patch=64))
    fresh = FreshPairs(vae, photos, degradation="realesrgan", patch=64, seed=2)

    class Steps(torch.utils.data.Dataset):
        def __len__(self):
            return 2

        def __getitem__(self, step):
            return fresh.draw(step, 2, torch.Generator())

    own = [Steps()[i] for i in range(2)]
    loader = torch.utils.data.DataLoader(Steps(), batch_size=None, num_workers=1)
    for a, b in zip(own, loader):
        assert torch.equal(a["hr"], b["hr"]) and torch.equal(a["lr"], b["lr"])


# datasets and tars


@pytest.mark.parametrize("form", ["disk", "disk with splits", "parquet"])
def test_images_of_a_hugging_face_dataset(tmp_path, form):
    datasets = pytest.importorskip("datasets")
    files = folder_of(tmp_path / "files", range(5))
    paths = [f"{files}/{i}.png" for i in range(5)]
    table = datasets.Dataset.from_dict(dict(label=list(range(5)), photo=paths))
    table = table.cast_column("photo", datasets.Image())
    where = tmp_path / "table"
    if form == "disk":
        table.save_to_disk(where)
    elif form == "disk with splits":
        datasets.DatasetDict(test=table).save_to_disk(where)
    else:
        where.mkdir()
        rows = [dict(bytes=open(p, "rb").read(), path=None) for p in paths]
        features = datasets.Features(label=datasets.Value("int64"), photo=datasets.Image())
        made = datasets.Dataset.from_dict(dict(label=list(range(5)), photo=rows), features)
        made.to_parquet(where / "train.parquet")
    split = "test" if form == "disk with splits" else "train"
    photos = load_photos(DataConfig(source=f"hf:{where}:{split}:photo", patch=64))
    assert len(photos) == 5 and all((photos.read(i) == noise(i)).all() for i in range(5))
    assert len(photos.split("train")) + len(photos.split("val")) == 5
    again = load_photos(DataConfig(source=f"hf:{where}:{split}", patch=64))
    assert again.manifest_hash == photos.manifest_hash
    assert photos.crops(2, 64, torch.Generator().manual_seed(0)).shape == (2, 3, 64, 64)
    with pytest.raises(ImageError, match="no column 'image'.*label, photo"):
        load_photos(DataConfig(source=f"hf:{where}:{split}:image"))
    with pytest.raises(ImageError, match="no such dataset or split 'none'"):
        load_photos(DataConfig(source=f"hf:{where}:none:photo"))


def test_images_of_webdataset_tars(tmp_path):
    webdataset = pytest.importorskip("webdataset")
    for k in range(2):
        with webdataset.TarWriter(str(tmp_path / f"x-{k}.tar")) as tar:
            for i in (3 * k, 3 * k + 1, 3 * k + 2):
                tar.write({"__key__": f"image{i}", "png": noise(i), "json": dict(number=i)})
    source = f"wds:{tmp_path}/x-{{0..1}}.tar"
    photos = load_photos(DataConfig(source=source, patch=64))
    assert len(photos) == 6 and photos.skipped == {"not an image file": 6}
    assert all((photos.read(i) == noise(i)).all() for i in range(6))
    folder_of(tmp_path / "folder", range(6), prefix="image")

    def split(source, part):
        return load_photos(DataConfig(source=source, val_share=0.5)).split(part).names

    kept = {
        s: {os.path.basename(n) for n in split(s, "val")}
        for s in (source, str(tmp_path / "folder"))
    }
    assert len(set(map(frozenset, kept.values()))) == 1  # the split follows the stems alone
    assert load_photos(DataConfig(source=source, patch=64)).manifest_hash == photos.manifest_hash
    with pytest.raises(ImageError, match=r"no such tar.*1 of 3 are missing"):
        load_photos(DataConfig(source=f"wds:{tmp_path}/x-{{0..2}}.tar"))
    with pytest.raises(ImageError, match="an address"):
        load_photos(DataConfig(source="wds:https://example.org/x.tar"))


def test_one_damaged_image_or_tar_is_a_counted_skip(tmp_path):
    webdataset = pytest.importorskip("webdataset")
    for k in range(2):
        with webdataset.TarWriter(str(tmp_path / f"x-{k}.tar")) as tar:
            for i in range(4):
                tar.write({"__key__": f"{k}{i}", "png": noise(4 * k + i)})
    data = (tmp_path / "x-1.tar").read_bytes()
    (tmp_path / "x-1.tar").write_bytes(data[: len(data) // 2])  # in the middle of the third image
    whole = bytearray((tmp_path / "x-0.tar").read_bytes())
    start = whole.index(b"\x89PNG")
    whole[start : start + 8] = bytes(8)  # the first image's header
    (tmp_path / "x-0.tar").write_bytes(whole)
    photos = load_photos(DataConfig(source=f"wds:{tmp_path}/x-{{0..1}}.tar", patch=64))
    assert photos.crops(60, 64, torch.Generator().manual_seed(0)).shape[0] == 60
    assert photos.skipped["not an image"] == 1
    assert photos.skipped["truncated or damaged tar"] == 1
    assert len(photos) >= 6 and to_tensor(noise(0)).shape == (3, 160, 160)
