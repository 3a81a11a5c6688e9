"Training pairs on disk, and the multi-step models: deterministic, resumable, exact with an oracle."

from copy import deepcopy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from tocsr.core.config import AdaptConfig, DataConfig, UNetConfig
from tocsr.core.files import StoreError
from tocsr.core.image import upsample
from tocsr.core.store import TrainOptions
from tocsr.data.images import load_photos
from tocsr.data.pairs import (
    CHUNK,
    ChunkedTensors,
    PairPool,
    _crop_images,
    cache_teacher_latents,
    make_pairs,
    write_chunks,
)
from tocsr.models.autoencoder import LatentAutoencoder, fit_pca
from tocsr.models.diffusion import nano_unet, noise_schedule, predict_epsilon, signal_noise
from tocsr.models.generator import (
    SRModel,
    add_condition_channels,
    load_sr_model,
    make_sr_model,
    sample_sr,
    save_sr_model,
    start_latent,
    start_noise,
)
from tocsr.models.staged_unet import split_into_stages
from tocsr.stages.adaptation import load_multistep, train_multistep

THIN = UNetConfig(channels=(32, 32, 32, 32), heads=(1, 1, 1, 1), layers=1, groups=8)


@pytest.fixture(scope="module")
def photos():
    return load_photos(DataConfig(patch=64)).split("train")


@pytest.fixture(scope="module")
def vae(photos):
    crops = photos.crops(12, 128, torch.Generator().manual_seed(0))
    return LatentAutoencoder(fit_pca(crops, 16)).eval()


@pytest.fixture(scope="module")
def pool(tmp_path_factory, vae, photos):
    folder = tmp_path_factory.mktemp("pool")
    return make_pairs(folder, vae, photos, 24, degradation="realesrgan", patch=64, seed=1)


@pytest.fixture(scope="module")
def unet():
    torch.manual_seed(0)
    return add_condition_channels(split_into_stages(nano_unet(THIN, 16)), 16).eval()


@pytest.mark.parametrize("kind", ["bicubic", "realesrgan"])
def test_an_interrupted_pool_is_continued_to_the_same_bytes(
    tmp_path, photos, vae, kind, monkeypatch
):
    count = CHUNK + 3
    make_pairs(tmp_path / "whole", vae, photos, count, degradation=kind, patch=32)
    calls = []
    crops = type(photos).crops

    def dying(self, *args):
        calls.append(0)
        if len(calls) == CHUNK + 2:
            raise KeyboardInterrupt
        return crops(self, *args)

    monkeypatch.setattr(type(photos), "crops", dying)
    with pytest.raises(KeyboardInterrupt):
        make_pairs(tmp_path / "killed", vae, photos, count, degradation=kind, patch=32)
    assert [f.name for f in (tmp_path / "killed").iterdir()] == ["chunk-000000.safetensors"]
    make_pairs(tmp_path / "killed", vae, photos, count, degradation=kind, patch=32)
    whole = sorted((tmp_path / "whole").iterdir())
    for a, b in zip(whole, sorted((tmp_path / "killed").iterdir())):
        assert a.read_bytes() == b.read_bytes()


def test_crops_of_pairs_show_one_place_in_images_and_latents(pool, vae):
    g = torch.Generator().manual_seed(0)
    place = torch.arange(64 * 64).view(1, 1, 64, 64).repeat(6, 1, 1, 1)
    pair = dict(hr=place, lr=place[..., ::4, ::4], z_h=place[..., ::8, ::8])
    cropped = _crop_images(pair, 3, g)
    assert torch.equal(cropped["hr"][..., ::4, ::4], cropped["lr"])
    assert torch.equal(cropped["hr"][..., ::8, ::8], cropped["z_h"])
    assert len(cropped["z_h"][:, 0, 0, 0].unique()) > 1  # a place of its own for every pair
    for side in (2, 8):
        batch = pool.draw(0, 4, g, side=side)
        assert batch["lr"].shape[-1] == 2 * side and batch["z_l"].shape[-1] == side
        # a patch PCA sees no further than its patches
        assert torch.allclose(vae.encode(batch["hr"]), batch["z_h"], atol=5e-3)
    with pytest.raises(ValueError, match="crops of 9 latents do not fit in pairs of 8 x 8"):
        pool.draw(0, 4, g, side=9)


def test_a_pool_of_crops_gives_the_same_crop_of_a_pair_in_every_batch(
    tmp_path, photos, vae, unet, pool
):
    make_pairs(tmp_path / "pool", vae, photos, 24, degradation="realesrgan", patch=64, seed=1)
    crops = PairPool(tmp_path / "pool", side=4)
    together = crops.batch([5, 3])
    assert together.z_h.shape[-1] == 4 and together.hr.shape[-1] == 32
    for k, i in enumerate((5, 3)):
        alone = crops.batch([i])
        assert all(torch.equal(a[0], b[k]) for a, b in zip(alone, together))
    whole = pool.batch([5, 3])
    assert not torch.equal(whole.z_h[..., :4, :4], together.z_h)  # not all at the corner
    assert torch.allclose(vae.encode(together.hr), together.z_h, atol=5e-3)
    teacher = SRModel(unet, noise_schedule())
    targets = cache_teacher_latents(tmp_path / "targets", teacher, crops, 3, steps=1)
    assert targets.read("z_0", [2]).shape[-1] == 4


def test_training_takes_crops_of_several_sides_in_turn(tmp_path, pool, unet):
    model = SRModel(deepcopy(unet).train(), noise_schedule())
    shapes = []
    model.unet.register_forward_pre_hook(lambda _, args: shapes.append(tuple(args[0].shape)))
    cfg = AdaptConfig(steps=3, batch=8, crop_sides=(4, 8))
    train_multistep(model, pool, cfg, TrainOptions(tmp_path, device="cpu"), size=4)
    assert shapes == [(8, 32, 4, 4), (2, 32, 8, 8), (8, 32, 4, 4)]


def test_damaged_and_missing_chunks_are_refused(tmp_path):
    with pytest.raises(StoreError, match="lacks all"):
        PairPool(tmp_path)
    write_chunks(tmp_path, 2 * CHUNK + 1, lambda n: dict(x=torch.tensor(list(n)).float()[:, None]))
    rows = [0, CHUNK, 2 * CHUNK]
    assert ChunkedTensors(tmp_path).read("x", rows).flatten().tolist() == rows
    last = tmp_path / "chunk-000002.safetensors"
    data = last.read_bytes()
    last.write_bytes(data[: len(data) - 3])
    with pytest.raises(StoreError, match="truncated"):
        ChunkedTensors(tmp_path)
    last.write_bytes(data)
    (tmp_path / "chunk-000001.safetensors").unlink()
    with pytest.raises(StoreError, match="lacks some"):
        ChunkedTensors(tmp_path)


def test_a_pair_depends_on_seed_and_index_alone(tmp_path, photos, vae, pool):
    def pairs(count, seed):
        folder = tmp_path / f"{count}-{seed}"
        return make_pairs(folder, vae, photos, count, degradation="realesrgan", patch=64, seed=seed)

    third = pool.batch([3])
    for kept, again in zip(third, pairs(4, 1).batch([3])):
        assert torch.equal(kept, again)
    assert not torch.equal(third.lr, pool.batch([2]).lr)
    assert not torch.equal(third.lr, pairs(4, 2).batch([3]).lr)


def test_latents_of_pairs_are_those_of_their_images(vae, pool):
    pair = pool.batch([3, 20])
    shapes = [tuple(v.shape) for v in pair]
    assert shapes == [(2, 3, 64, 64), (2, 3, 16, 16), (2, 16, 8, 8), (2, 16, 8, 8)]
    assert (vae.encode(pair.hr) - pair.z_h).abs().max() < 0.02  # half precision
    assert (vae.encode(upsample(pair.lr)) - pair.z_l).abs().max() < 0.02
    assert len(pool.first(10**6).hr) == len(pool) == 24


@pytest.mark.parametrize("wrap", [split_into_stages, lambda u: u])
def test_new_condition_channels_change_nothing_and_are_trained(wrap):
    torch.manual_seed(0)
    plain = wrap(nano_unet(THIN, 16)).eval()
    new = add_condition_channels(plain, 16)
    z, condition = torch.randn(2, 2, 16, 16, 16)
    t = torch.tensor([3, 980])
    context = torch.ones(2, 1, 64)
    out = new(torch.cat([z, 9 * condition], 1), t, context).sample
    assert torch.allclose(out, plain(z, t, context).sample, atol=1e-5)
    assert plain.conv_in.in_channels == 16
    out.pow(2).mean().backward()
    assert new.conv_in.weight.grad[:, 16:].abs().max() > 0


def test_a_first_layer_of_several_convolutions_is_refused():
    plain = split_into_stages(nano_unet(THIN, 16))
    plain.conv_in = nn.Sequential(plain.conv_in)
    with pytest.raises(ValueError, match="single convolution"):
        add_condition_channels(plain, 16)


def test_a_multistep_model_is_read_back_and_foreign_weights_are_refused(tmp_path):
    torch.manual_seed(0)
    a, b = (add_condition_channels(split_into_stages(nano_unet(THIN, c)), c) for c in (16, 4))
    scale = torch.rand(16) + 1 / 3
    save_sr_model(tmp_path / "a", SRModel(a, noise_schedule("epsilon"), scale))
    save_sr_model(tmp_path / "b", SRModel(b, noise_schedule("v_prediction")))
    again = load_sr_model(tmp_path / "a")
    assert again.scheduler.config.prediction_type == "epsilon"
    assert torch.equal(again.residual_scale, scale)  # bit for bit
    for name, v in a.state_dict().items():
        assert torch.equal(v, again.unet.state_dict()[name])
    assert load_sr_model(tmp_path / "b").residual_scale is None
    foreign = next((tmp_path / "b/unet").glob("*.safetensors"))
    (tmp_path / "a/unet" / foreign.name).write_bytes(foreign.read_bytes())
    with pytest.raises(StoreError, match="another architecture"):
        load_sr_model(tmp_path / "a")
    with pytest.raises(StoreError, match="config.json is missing"):
        load_sr_model(tmp_path)
    (tmp_path / "a/config.json").write_text("{")
    with pytest.raises(StoreError, match="not valid JSON"):
        load_sr_model(tmp_path / "a")
    (tmp_path / "a/config.json").write_text('{"_class_name": "Other"}')
    with pytest.raises(StoreError, match="describes a Other, not an SRModel"):
        load_sr_model(tmp_path / "a")
    with pytest.raises(StoreError, match="choose one of ours, paper, teacher"):
        load_multistep(SimpleNamespace(path=tmp_path), "bigger")


def test_the_residual_has_the_spread_of_the_latent(unet, pool):
    pair = pool.first(24)
    ours, paper = (
        make_sr_model(unet, noise_schedule(), target=name, z_h=pair.z_h, z_l=pair.z_l)
        for name in ("residual", "latent")
    )
    target = ours.target(pair.z_h, pair.z_l)
    assert torch.allclose(target.std((0, 2, 3)), pair.z_h.std((0, 2, 3)), rtol=0.01)
    zero = torch.zeros_like(pair.z_l)
    assert torch.equal(ours.latent(zero, pair.z_l), pair.z_l)
    assert torch.equal(paper.target(pair.z_h, pair.z_l), pair.z_h)
    for model in (ours, paper):
        round_trip = model.latent(model.target(pair.z_h, pair.z_l), pair.z_l)
        assert torch.allclose(round_trip, pair.z_h, atol=1e-4)
    with pytest.raises(ValueError, match="choose one of residual, latent"):
        make_sr_model(unet, noise_schedule(), target="both", z_h=pair.z_h, z_l=pair.z_l)


def test_the_matched_start_has_the_statistics_of_training():
    schedule = noise_schedule("epsilon")
    z = torch.randn(4, 16, 16, 16)
    noise = start_noise((16, 16, 16), 0, range(4))
    last = torch.full((4,), 999)
    latent = SRModel(None, schedule)
    residual = SRModel(None, schedule, torch.ones(16))
    start = start_latent(latent, z, noise, "matched")
    assert torch.allclose(start, schedule.add_noise(z, noise, last), atol=1e-5)
    assert start_latent(latent, z, noise) is noise
    start = start_latent(residual, z, noise, "matched")
    assert torch.allclose(start, schedule.add_noise(0 * z, noise, last), atol=1e-5)
    assert torch.equal(start_noise((16, 16, 16), 0, [2])[0], noise[2])
    with pytest.raises(ValueError, match="matched"):
        start_latent(latent, z, noise, "pure")


class Oracle(nn.Module):
    "Predicts the exact v for a known z_0."

    def __init__(self, z_0, like, scheduler):
        super().__init__()
        self.z_0 = z_0
        self.config = like.config
        self.scheduler = scheduler
        self.parameter = nn.Parameter(torch.zeros(1))

    def forward(self, x, t, context):
        signal, sigma = (v[:, None, None, None] for v in signal_noise(self.scheduler, t))
        z_t = x[:, :16]
        return SimpleNamespace(sample=(signal * z_t - self.z_0) / sigma)


@pytest.mark.parametrize("start", ["noise", "matched"])
@pytest.mark.parametrize("steps", [1, 3])
def test_a_perfect_network_is_sampled_exactly(vae, pool, unet, start, steps):
    pair = pool.batch([3, 20])
    scheduler = noise_schedule("v_prediction")
    z_l = vae.encode(upsample(pair.lr))
    for scale in (None, torch.linspace(1, 3, 16)):
        model = SRModel(None, scheduler, scale)
        model = model._replace(unet=Oracle(model.target(pair.z_h, z_l), unet, scheduler))
        sr = sample_sr(model, vae, pair.lr, steps, start=start)
        assert torch.allclose(sr, vae.decode(pair.z_h), atol=0.02)


def test_an_image_does_not_depend_on_its_batch(vae, pool, unet):
    model = SRModel(unet, noise_schedule("v_prediction"))
    lr = pool.first(3).lr
    together = sample_sr(model, vae, lr, 2, batch=3)
    assert together.shape == (3, 3, 64, 64)
    assert torch.allclose(together, sample_sr(model, vae, lr, 2, batch=1), atol=1e-4)
    alone = sample_sr(model, vae, lr[2:], 2, indices=[2])
    assert torch.allclose(together[2:], alone, atol=1e-4)


@pytest.mark.parametrize("scale", [None, torch.full((16,), 2.0)])
def test_training_lowers_the_loss_of_algorithm_s3_and_is_resumed_exactly(
    tmp_path, pool, unet, scale
):
    cfg = AdaptConfig(steps=12, batch=8, lr=2e-3)
    scheduler = noise_schedule("v_prediction")

    def train(folder, cfg=cfg, **options):
        model = SRModel(
            add_condition_channels(split_into_stages(nano_unet(THIN, 16)), 16), scheduler, scale
        )
        model.unet.load_state_dict(unet.state_dict())
        options = TrainOptions(tmp_path / folder, device="cpu", **options)
        return model.unet, train_multistep(model, pool, cfg, options)

    def stop(step, metrics):
        if step == 2:
            raise KeyboardInterrupt

    net, curve = train("whole")
    losses = [record["loss"] for record in curve]
    assert len(losses) == 12 and sum(losses[-4:]) < sum(losses[:4])
    short = AdaptConfig(steps=4, batch=2, lr=2e-3)
    net, _ = train("short", short)
    with pytest.raises(KeyboardInterrupt):
        train("interrupted", short, checkpoint_s=0, callback=stop)
    again, _ = train("interrupted", short, checkpoint_s=0)
    for name, v in net.state_dict().items():
        assert torch.equal(v, again.state_dict()[name]), name


def test_the_first_loss_is_the_epsilon_loss_by_hand(tmp_path, pool, unet):
    "L_SR of the first step, computed from the pool with the network as it was."
    scheduler = noise_schedule("v_prediction")
    start = add_condition_channels(split_into_stages(nano_unet(THIN, 16)), 16).eval()
    start.load_state_dict(unet.state_dict())
    model = SRModel(unet, scheduler)
    state = {k: v.clone() for k, v in unet.state_dict().items()}
    options = TrainOptions(tmp_path, device="cpu")
    curve = train_multistep(model, pool, AdaptConfig(steps=1, batch=4), options)
    unet.load_state_dict(state)
    generator = torch.Generator().manual_seed(0)
    pair = pool.batch(torch.randint(len(pool), (4,), generator=generator))
    offset = torch.rand((), generator=generator)
    t = ((offset + torch.arange(4) / 4) % 1 * 1000).long()
    noise = torch.randn(pair.z_h.shape, generator=generator)
    with torch.no_grad():
        z_t = scheduler.add_noise(pair.z_h, noise, t)
        estimate = predict_epsilon(start.train(), z_t, t, scheduler, cond=pair.z_l)
    assert curve[0]["loss"] == pytest.approx((estimate - noise).pow(2).mean().item(), rel=1e-5)
