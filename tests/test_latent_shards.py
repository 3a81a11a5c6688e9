"Latent crops in files: contents, resuming, several processes, damaged photographs, held-out crops."

import numpy as np
import pytest
import torch
from PIL import Image

from tocsr.core.config import DataConfig, get_profile, override
from tocsr.core.random import shared_step_generator
from tocsr.data import latent_shards, pairs
from tocsr.data.images import load_photos
from tocsr.data.latent_shards import (
    SHARD_SEED,
    LatentShards,
    held_out_latents,
    training_latents,
    write_latent_shards,
)
from tocsr.data.latents import CachedLatents
from tocsr.models.autoencoder import LatentAutoencoder, fit_pca


@pytest.fixture(scope="module")
def vae():
    crops = torch.rand(8, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return LatentAutoencoder(fit_pca(crops, 4)).eval()


@pytest.fixture(scope="module")
def photos():
    return load_photos(DataConfig(patch=64)).split("train")


def test_the_shards_hold_the_latents_of_their_crops(tmp_path, vae, photos):
    shards = write_latent_shards(tmp_path, vae, photos, 20, 70, seed=5, rows=8)
    assert len(shards) == 20 and len(list(tmp_path.glob("*.safetensors"))) == 3
    assert shards.side == 8  # 70 pixels are cut to 64
    for i in (0, 7, 8, 19):
        x = photos.crops(1, 64, shared_step_generator(5, i))
        stored = shards.read("z", [i])
        assert stored.dtype == torch.float16
        assert torch.allclose(stored[0].float(), vae.encode(x)[0], atol=2e-3, rtol=1e-3)


def test_an_interrupted_encoding_continues_at_the_next_file(tmp_path, vae, photos, monkeypatch):
    whole = write_latent_shards(tmp_path / "whole", vae, photos, 20, 64, seed=5, rows=8)
    calls = []

    def encode(*args, real=pairs.encode_in_batches):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(latent_shards, "encode_in_batches", encode)
    for _ in range(2):
        try:
            write_latent_shards(tmp_path / "cut", vae, photos, 20, 64, seed=5, rows=8)
        except KeyboardInterrupt:
            assert len(list((tmp_path / "cut").glob("*.safetensors"))) == 1
    assert len(calls) == 4  # three files and the interrupted one
    cut = LatentShards(tmp_path / "cut", 8)
    assert torch.equal(cut.read("z", range(20)), whole.read("z", range(20)))


def test_processes_write_the_files_of_one(tmp_path, vae, photos, monkeypatch):
    one = write_latent_shards(tmp_path / "one", vae, photos, 20, 64, seed=5, rows=8)
    written = []
    monkeypatch.setattr(pairs, "world_size", lambda: 2)
    monkeypatch.setattr(pairs, "wait_for_all", lambda: None)
    for rank in (1, 0):
        monkeypatch.setattr(pairs, "rank", lambda rank=rank: rank)
        if rank:
            with pytest.raises(pairs.StoreError, match="lacks some"):
                write_latent_shards(tmp_path / "two", vae, photos, 20, 64, seed=5, rows=8)
        else:
            two = write_latent_shards(tmp_path / "two", vae, photos, 20, 64, seed=5, rows=8)
        written.append(len(list((tmp_path / "two").glob("*.safetensors"))))
    assert written == [1, 3]
    assert torch.equal(two.read("z", range(20)), one.read("z", range(20)))


def test_crops_are_pieces_of_stored_crops_and_depend_on_the_generator(tmp_path, vae, photos):
    shards = write_latent_shards(tmp_path, vae, photos, 6, 64, seed=5)
    stored = shards.read("z", range(6)).float()
    for size in (8, 3):
        z = shards.crops(40, size, torch.Generator().manual_seed(1))
        assert torch.equal(z, shards.crops(40, size, torch.Generator().manual_seed(1)))
        pieces = stored.unfold(2, size, 1).unfold(3, size, 1).permute(0, 2, 3, 1, 4, 5)
        pieces = pieces.reshape(-1, *z.shape[1:])
        found = {int((pieces == c).all((1, 2, 3)).nonzero()[0]) for c in z}
        assert len(found) > 4
    with pytest.raises(ValueError, match="8 latents"):
        shards.crops(1, 9, torch.Generator())


def test_the_profile_decides_and_statistics_agree(tmp_path, vae, photos):
    p = get_profile("smoke")
    memory = training_latents(vae, photos, p, tmp_path)
    assert isinstance(memory, CachedLatents) and not list(tmp_path.iterdir())
    p = override(p, data=dict(latent_crops=200, patch=64))
    files = training_latents(vae, photos, p, tmp_path, sizes=(1.0, 0.5), jitter=0.2)
    assert isinstance(files, LatentShards) and len(files) == 200
    again = training_latents(vae, photos, p, tmp_path, sizes=(1.0, 0.5), jitter=0.2)
    assert len(list(tmp_path.iterdir())) == 1 and len(again) == 200
    plain = training_latents(vae, photos, p, tmp_path)
    assert len(list(tmp_path.iterdir())) == 2  # other settings, another folder
    x = photos.crops(1, 64, shared_step_generator(p.data.seed + SHARD_SEED, 3))
    assert torch.allclose(plain.maps_of(4)[3], vae.encode(x)[0], atol=2e-3, rtol=1e-3)


def test_stored_crops_hold_the_largest_crops_of_training(tmp_path, vae, photos):
    side = 3 * 64 // vae.factor
    teacher = dict(crop_sides=(64 // vae.factor, side))
    p = override(get_profile("smoke"), data=dict(patch=64, latent_crops=2), teacher=teacher)
    latents = training_latents(vae, photos, p, tmp_path)
    assert latents.side == side
    assert latents.crops(1, side, torch.Generator()).shape[-1] == side


def test_only_the_held_out_crops_are_encoded(tmp_path, vae, photos, monkeypatch):
    encoded = []
    p = override(get_profile("smoke"), data=dict(latent_crops=200, patch=64))

    def encode(x, real=vae.encode):
        encoded.append(x.shape)
        return real(x)

    monkeypatch.setattr(vae, "encode", encode)
    z = held_out_latents(vae, photos, p, 20, torch.Generator().manual_seed(3))
    assert z.shape == (20, 4, 8, 8) and sum(len(shape) > 0 and shape[0] for shape in encoded) == 20
    assert {tuple(shape[1:]) for shape in encoded} == {(3, 64, 64)}
    g = torch.Generator().manual_seed(3)
    pixels = torch.cat([photos.crops(16, 64, g), photos.crops(4, 64, g)])
    assert torch.allclose(z, vae.encode(pixels), atol=1e-5)


def test_a_damaged_photograph_is_counted_and_the_rest_encoded(tmp_path, vae, monkeypatch):
    monkeypatch.setenv("TOCSR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("tocsr.data.images.MAX_INSPECTED", 3)  # larger folders are not inspected
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(6):
        x = np.random.default_rng(i).integers(0, 256, (80, 80, 3), dtype=np.uint8)
        Image.fromarray(x).save(folder / f"{i}.png")
    data = (folder / "2.png").read_bytes()
    (folder / "2.png").write_bytes(data[: len(data) // 2])
    photos = load_photos(DataConfig(source=str(folder), patch=64))
    shards = write_latent_shards(tmp_path / "z", vae, photos, 30, 64, seed=0)
    assert len(shards) == 30 and photos.skipped["damaged"] == 1
