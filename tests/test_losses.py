"Losses of the one-step generator: each measures what it says, and adding one is one place."

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tocsr.core.config import DataConfig, OneStepConfig, UNetConfig
from tocsr.core.store import TrainOptions
from tocsr.core.training import step_generator
from tocsr.data.degradations import degrade_images
from tocsr.data.images import load_photos
from tocsr.data.pairs import cache_teacher_latents, make_pairs
from tocsr.models import losses as L
from tocsr.models.autoencoder import LatentAutoencoder, fit_pca
from tocsr.models.diffusion import ddim_sample, nano_unet, noise_schedule
from tocsr.models.generator import SRModel, add_condition_channels, make_sr_model, start_noise
from tocsr.models.lite0 import WeightsError, load_lite0, missing_lite0
from tocsr.models.regression import RegressionNet, train_regression
from tocsr.models.staged_unet import split_into_stages
from tocsr.stages.onestep import distill_to_one_step
from tocsr.stages.student_recipes import (
    PAPER_RECIPE,
    StudentRecipe,
    make_student,
    student_recipes,
)

THIN = UNetConfig(channels=(32, 32, 32, 32), heads=(1, 1, 1, 1), layers=1, groups=8)
CFG = OneStepConfig(steps=12, batch=8, lr=1e-3)
needs_weights = pytest.mark.skipif(
    bool(missing_lite0()), reason="needs the weights of EfficientNet-lite0"
)


@pytest.fixture(scope="module")
def photos():
    return load_photos(DataConfig())


@pytest.fixture(scope="module")
def hr(photos):
    return photos.split("train").crops(4, 64, step_generator(0, 0))


@pytest.fixture(scope="module")
def vae(photos):
    crops = photos.split("train").crops(24, 128, step_generator(0, 0))
    return LatentAutoencoder(fit_pca(crops, 16)).eval()


@pytest.fixture(scope="module")
def pool(tmp_path_factory, vae, photos):
    folder = tmp_path_factory.mktemp("pool")
    train = photos.split("train")
    return make_pairs(folder, vae, train, 24, degradation="realesrgan", patch=64, seed=1)


@pytest.fixture(scope="module")
def teacher(pool):
    torch.manual_seed(0)
    unet = add_condition_channels(split_into_stages(nano_unet(THIN, 16)), 16).eval()
    pair = pool.first(24)
    schedule = noise_schedule("v_prediction")
    return make_sr_model(unet, schedule, target="residual", z_h=pair.z_h, z_l=pair.z_l)


@pytest.fixture(scope="module")
def targets(tmp_path_factory, teacher, pool):
    folder = tmp_path_factory.mktemp("targets")
    return cache_teacher_latents(folder, teacher, pool, 20, steps=3, seed=5)


@pytest.fixture
def train(tmp_path, teacher, vae, pool, targets):
    "Train a student by a recipe; the student and its record."

    def run(recipe, cfg=CFG, name="student", extra=None, **options):
        torch.manual_seed(0)
        student = make_student(teacher, vae, pool, recipe)
        options = TrainOptions(tmp_path / name, device="cpu", **options)
        record = distill_to_one_step(
            student, pool, targets, cfg, recipe, options, noise_seed=5, extra_losses=extra
        )
        return student, record

    return run


def blur(x):
    return F.avg_pool2d(x, 3, 1, 1)


def test_the_gradient_loss_measures_edges_and_not_brightness(hr):
    brighter = hr + (blur(hr) - hr).abs().mean()  # the same L1 distance
    assert (L.gradient_loss(hr, hr) == 0).all()
    assert L.gradient_loss(brighter, hr).max() < 1e-6 < L.gradient_loss(blur(hr), hr).min()
    ramp = torch.linspace(0, 1, 65)[:64].expand(1, 3, 64, 64)  # differences of 1/64, 1/32, 1/16
    flat = torch.zeros_like(ramp)
    want = (1 / 64 + 1 / 32 + 1 / 16) / 3
    assert L.gradient_loss(ramp, flat).item() == pytest.approx(want, rel=1e-4)


def test_gradient_statistics_are_lower_for_displaced_texture_than_for_blur(hr):
    displaced = hr.roll(3, -1)
    assert (L.gradient_statistics_loss(hr, hr) == 0).all()
    refused = L.gradient_statistics_loss(blur(hr), hr).mean()
    assert L.gradient_statistics_loss(displaced, hr).mean() < refused < 1
    assert L.pixel_loss(displaced, hr).mean() > L.pixel_loss(blur(hr), hr).mean()


def test_the_checkerboard_loss_measures_what_repeats_with_the_grid(hr):
    pattern = torch.randn(1, 3, 4, 4, generator=step_generator(0, 2)).repeat(1, 1, 16, 16)
    grain = torch.randn(hr.shape, generator=step_generator(0, 3))
    others = [hr + 0.1 * grain, hr.roll(3, -1), blur(hr)]
    largest = max(L.checkerboard_loss(v, hr).mean() for v in others)
    assert (L.checkerboard_loss(hr, hr) == 0).all()
    assert L.checkerboard_loss(hr + 0.1 * pattern, hr).mean() > 5 * largest


@needs_weights
def test_loading_the_features_draws_no_random_numbers():
    "Else a discriminator's start would depend on what the process has loaded before."
    drawn = []
    for _ in range(2):
        load_lite0.cache_clear()
        torch.manual_seed(0)
        L.FrozenFeatures()
        drawn.append(torch.rand(1))
    torch.manual_seed(0)
    assert drawn[0] == drawn[1] == torch.rand(1)


@needs_weights
def test_the_feature_loss_tolerates_a_displacement(hr):
    features = L.FrozenFeatures()
    fx = features(hr)
    fb = features(blur(hr))
    fd = features(hr.roll(2, -1))
    assert [f.shape[1] for f in fx] == list(L.FrozenFeatures.CHANNELS)
    assert [f.shape[-1] for f in fx] == [32, 16, 8, 4]
    assert (L.feature_loss(fx, fx) == 0).all()
    assert L.feature_loss(fd, fx).mean() < L.feature_loss(fb, fx).mean()
    pointwise = [L.feature_loss(f[:1], fx[:1], (1,)).mean() for f in (fd, fb)]
    assert pointwise[0] > pointwise[1]  # what the windows are for


@needs_weights
def test_generator_and_discriminator_get_separate_gradients(hr):
    features = L.FrozenFeatures()
    discriminator = L.Discriminator()
    condition = F.interpolate(F.avg_pool2d(hr, 4), scale_factor=4)
    real = L.Scored(hr, features(hr), condition)
    scores = discriminator.eval()(*real)
    assert len(scores) == 3
    mean = -sum(s.mean() for s in scores) / 3  # a coarse score map counts as much as a fine one
    assert torch.allclose(L.adversarial_loss(discriminator, real).mean(), mean)
    assert not torch.equal(scores[0], discriminator(*real._replace(condition=hr))[0])
    discriminator.train()
    y = blur(hr).requires_grad_(True)
    fake = L.Scored(y, features(y), condition)
    L.adversarial_loss(discriminator, fake).mean().backward(retain_graph=True)
    assert y.grad.abs().max() > 0
    assert all(q.grad is None for q in discriminator.parameters())
    y.grad = None
    L.discriminator_loss(discriminator, fake, real).backward()
    assert y.grad is None
    assert all(q.grad is not None for q in discriminator.parameters())


def test_dmd_moves_the_student_away_from_its_own_distribution(teacher):
    model = teacher._replace(residual_scale=None)
    fake = deepcopy(model.unet)
    z = torch.randn(2, 16, 8, 8, requires_grad=True)
    z_l = torch.randn(2, 16, 8, 8)

    def gradient():
        noised = L.draw_noised(model, z, z_l, step_generator(0, 0))
        return torch.autograd.grad(L.dmd_loss(model, fake, noised, z_l).sum(), z)[0]

    assert gradient().abs().max() == 0  # equal scores
    with torch.no_grad():
        fake.conv_out.bias += 1  # v-prediction: lowers its estimate of the clean latent everywhere
    assert (gradient() < 0).all()  # a descent step moves the student up
    noised = L.draw_noised(model, z, z_l, step_generator(0, 0))
    assert L.fake_score_loss(model, fake, noised, z_l).shape == (2,)
    assert 20 <= noised.t.min() and noised.t.max() <= 980


def test_teacher_latents_are_those_of_ddim(teacher, pool, targets):
    noise = start_noise((16, 8, 8), 5, [17])
    z_l = pool.batch([17]).z_l
    direct = teacher.latent(ddim_sample(teacher.unet, teacher.scheduler, noise, 3, z_l), z_l)
    assert len(targets) == 20
    assert torch.allclose(targets.read("z_0", [17]).float(), direct, atol=1e-2)


def test_the_papers_loss_is_the_latent_distance_alone(train, teacher, pool, targets):
    student, record = train(PAPER_RECIPE)
    assert record[0].keys() == {"step", "lr", "loss", "latent"}
    assert sum(r["loss"] for r in record[-4:]) < sum(r["loss"] for r in record[:4])
    i = torch.randint(20, (8,), generator=step_generator(0, 0)).tolist()
    noise = start_noise((16, 8, 8), 5, i)
    z_l = pool.batch(i).z_l
    with torch.no_grad():
        z_0 = ddim_sample(teacher.unet, teacher.scheduler, noise, 1, z_l)
        z = teacher.latent(z_0, z_l)
    want = (z - targets.read("z_0", i).float()).pow(2).mean().item()
    assert record[0]["loss"] == pytest.approx(want, rel=1e-4)


IMAGE_LOSSES = {"latent": 0.1, "pixel": 1.0, "gradient": 1.0}


@pytest.mark.parametrize("change", [{}, dict(train_decoder=True), dict(refiner_blocks=1)])
def test_only_the_parts_of_the_recipe_are_trained(train, vae, change):
    student, record = train(StudentRecipe("", IMAGE_LOSSES, **change))
    assert sum(r["pixel"] for r in record[-4:]) < sum(r["pixel"] for r in record[:4])
    before = vae.state_dict()
    changed = [k for k, v in student.vae.state_dict().items() if not torch.equal(v, before[k])]
    assert all("decoder" in name for name in changed)
    if change.get("refiner_blocks"):
        _, without = train(StudentRecipe("", IMAGE_LOSSES), name="without")
        assert record[0]["pixel"] == without[0]["pixel"]  # the identity at the start
        assert record[-1]["pixel"] != without[-1]["pixel"]


def test_a_distillation_is_resumed_exactly(train):
    losses = IMAGE_LOSSES | {"dmd": 0.1}
    recipe = StudentRecipe("", losses, refiner_blocks=1, tileable=True)
    cfg = replace(CFG, steps=4, batch=2)

    def stop(step, metrics):
        if step == 2:
            raise KeyboardInterrupt

    whole, record = train(recipe, cfg)
    with pytest.raises(KeyboardInterrupt):
        train(recipe, cfg, name="interrupted", checkpoint_s=0, callback=stop)
    again, resumed = train(recipe, cfg, name="interrupted", checkpoint_s=0)
    assert resumed == record
    for name, v in whole.state_dict().items():
        assert torch.equal(v, again.state_dict()[name]), name


@needs_weights
def test_all_losses_together_are_finite_and_recorded(train):
    recipe = student_recipes(CFG)["ours"]
    student, record = train(replace(recipe, refiner_blocks=1), replace(CFG, steps=2, batch=2))
    assert record[0].keys() == {"step", "lr", "loss", *L.LOSSES, *L.JOINT_NETWORKS}
    assert student.is_tileable


def mean_brightness(image, hr):
    return (image.mean((1, 2, 3)) - hr.mean((1, 2, 3))).abs()


def test_adding_a_loss_is_one_place(train, monkeypatch):
    "A row of the registry: weight in the profile, training, record and ablation follow."
    term = L.LossTerm("brightness", mean_brightness, 0.5)
    monkeypatch.setitem(L.LOSSES, "brightness", term)
    assert student_recipes(CFG)["ours"].losses["brightness"] == 0.5
    ablation = replace(CFG, losses=dict(brightness=0.25), ablation=("without_brightness",))
    recipes = student_recipes(ablation)
    assert recipes["ours"].losses["brightness"] == 0.25
    without = recipes["without_brightness"]
    assert without.losses == recipes["ours"].losses | {"brightness": 0.0}
    _, record = train(StudentRecipe("", {"brightness": 0.25}), replace(CFG, steps=2))
    assert len(record) == 2 and record[0].keys() == {"step", "lr", "loss", "brightness"}
    assert record[0]["loss"] == pytest.approx(0.25 * record[0]["brightness"])
    assert record[0]["brightness"] > 0


def test_a_loss_can_be_given_by_a_call(train):
    extra = dict(brightness=(mean_brightness, 2.0))
    _, record = train(PAPER_RECIPE, replace(CFG, steps=2), extra=extra)
    for r in record:
        assert r["loss"] == pytest.approx(r["latent"] + 2 * r["brightness"])
    with pytest.raises(ValueError, match="pixel is registered already"):
        train(PAPER_RECIPE, extra=dict(pixel=(mean_brightness, 2.0)))


def test_joint_networks_and_learning_rates_follow_from_the_losses(teacher, vae, pool):
    student = make_student(teacher, vae, pool, PAPER_RECIPE)
    assert L.WeightedLoss(L.PAPER_LOSS).build_networks(student) == {}
    both = L.WeightedLoss(dict(adversarial=0.1, dmd=0.1))
    assert both.learning_rates == dict(discriminator=4.0, fake_score=1.0)
    networks = both.build_networks(student)
    assert isinstance(networks["discriminator"], L.Discriminator)
    for name, v in student.unet.state_dict().items():
        assert torch.equal(networks["fake_score"].state_dict()[name], v)
    assert not L.WeightedLoss(dict(adversarial=0.0, pixel=1.0)).network_names
    assert both.needs_features and not L.WeightedLoss(dict(pixel=1.0)).needs_features


class Constants:
    "Inputs with constant images, so that only the weights matter."

    def __init__(self, hr, lr):
        self.hr = hr
        self.lr = lr
        self.z = torch.zeros(len(hr))
        self.networks = {}

    def get(self, name):
        return self.hr if name == "hr" else self.hr + 1


def test_weights_of_bicubic_inputs_and_of_the_start(monkeypatch, photos):
    hr = photos.split("val").crops(2, 64, step_generator(0, 3))
    lr = torch.cat(
        [degrade_images(hr[:1], "bicubic"), degrade_images(hr[1:], "realesrgan", 4, [0])]
    )
    assert L.is_bicubic_only(hr, lr).tolist() == [True, False]

    def ones(image, hr):
        return torch.ones(len(hr))

    def total(**term):
        monkeypatch.setitem(L.LOSSES, "ones", L.LossTerm("ones", ones, 1.0, **term))
        objective = L.WeightedLoss(dict(ones=2.0), bicubic_factor=3.0)
        return [objective(Constants(hr, lr), share)["loss"].item() for share in (0.05, 0.25, 1.0)]

    assert total() == [2, 2, 2]
    assert total(bicubic="more") == [4, 4, 4]  # mean of 2*3 and 2
    assert total(bicubic="less") == pytest.approx([4 / 3] * 3)  # mean of 2/3 and 2
    assert total(start=0.1, rise=0.3) == pytest.approx([0, 1, 2])


def test_wrong_names_and_missing_weights_are_refused(monkeypatch):
    with pytest.raises(ValueError, match="names texture; registered losses: latent"):
        L.loss_weights(dict(texture=1.0))
    with pytest.raises(ValueError, match="ablation is .*features.*without_feature"):
        student_recipes(replace(CFG, ablation=("features",)))
    with pytest.raises(ValueError, match="all losses have weight 0"):
        L.WeightedLoss(dict(pixel=0.0))
    monkeypatch.setattr(L, "missing_lite0", lambda: "not installed")
    with pytest.raises(WeightsError, match="feature, adversarial need EfficientNet.*not installed"):
        L.FrozenFeatures()


def test_the_regression_network_is_trained_with_l1(tmp_path, pool):
    torch.manual_seed(0)
    net = RegressionNet(1, 8)
    record = train_regression(net, pool, CFG, TrainOptions(tmp_path, device="cpu"))
    i = torch.randint(24, (8,), generator=step_generator(0, 0))
    pair = pool.batch(i)
    bicubic = RegressionNet(1, 8)(pair.lr)
    assert record[0]["loss"] == pytest.approx((bicubic - pair.hr).abs().mean().item(), rel=1e-4)
    assert sum(r["loss"] for r in record[-4:]) < sum(r["loss"] for r in record[:4])
    assert net.tail.weight.abs().max() > 0


def test_a_student_on_another_device_than_its_pool_can_be_made(teacher, pool, vae):
    meta = SRModel(deepcopy(teacher.unet).to("meta"), teacher.scheduler, teacher.residual_scale)
    recipe = replace(PAPER_RECIPE, tileable=True)
    student = make_student(meta, vae, pool, recipe)
    assert not any(isinstance(m, nn.GroupNorm) for m in student.unet.modules())
