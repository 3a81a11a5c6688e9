"The fidelity error: zero for the teacher, paired, independent of the batch size."

import math

import pytest
import torch

from tocsr.models.architecture import PAPER_ARCHITECTURE, REMOVED, StageError
from tocsr.models.diffusion import noise_schedule, null_context, predict_epsilon
from tocsr.models.staged_unet import split_into_stages
from tocsr.models.surrogates import (
    SurrogateLibrary,
    assemble,
    build_library,
    default_designs,
    trainable_copy,
)
from tocsr.search.fidelity import Fidelity, single_block_scores


@pytest.fixture(scope="module")
def teacher(nano):
    return split_into_stages(nano)


@pytest.fixture(scope="module")
def library(nano, teacher):
    return build_library(teacher, context=null_context(nano, 1))


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_fidelity_is_the_mean_squared_difference(nano, teacher, library, prediction):
    schedule = noise_schedule(prediction)
    latents = torch.randn(20, 16, 8, 8)
    fidelity = Fidelity.draw(teacher, schedule, latents, seed=3, batch=7)
    assert fidelity(nano).mean == 0
    net = assemble(teacher, library, PAPER_ARCHITECTURE)
    r = fidelity(net)
    with torch.no_grad():
        ours, theirs = (predict_epsilon(n, fidelity.z_t, fidelity.t, schedule) for n in (net, nano))
    assert r.mean == pytest.approx((ours - theirs).square().mean().item(), rel=1e-4)
    assert r.normalized == pytest.approx(r.mean / theirs.square().mean().item(), rel=1e-4)
    assert r.interval()[0] < r.mean < r.interval()[1] and fidelity(net) == r
    other_batch = Fidelity.draw(teacher, schedule, latents, seed=3, batch=20)
    assert other_batch(net).mean == pytest.approx(r.mean, rel=1e-4)


def test_common_noise_makes_differences_more_certain(teacher, library):
    fidelity = Fidelity.draw(teacher, noise_schedule("epsilon"), torch.randn(20, 16, 8, 8))
    nets = [assemble(teacher, library, teacher.architecture.swap(D1=d)) for d in ("RAA", "R")]
    a, b = map(fidelity, nets)
    difference, stderr = b.difference(a)
    assert difference == pytest.approx(b.mean - a.mean, abs=1e-6) and stderr < math.hypot(
        a.stderr, b.stderr
    )


def test_single_block_scores_cover_designs_and_removals(teacher, library):
    fidelity = Fidelity.draw(teacher, noise_schedule("epsilon"), torch.randn(4, 16, 8, 8))
    scores = single_block_scores(
        fidelity, teacher, SurrogateLibrary({"E1": library.surrogates["E1"]}, ("E4",))
    )
    assert set(scores["E1"]) == set(default_designs(teacher.shapes["E1"]))
    assert set(scores["E4"]) == {REMOVED} and scores["E4"][REMOVED].mean > 0 and scores["D1"] == {}
    alone = fidelity(assemble(teacher, library, teacher.architecture.swap(E1="R")))
    assert scores["E1"]["R"] == alone


def test_an_output_that_is_not_finite_is_an_error(teacher):
    fidelity = Fidelity.draw(teacher, noise_schedule("epsilon"), torch.randn(2, 16, 8, 8))
    broken = trainable_copy(teacher)
    with torch.no_grad():
        broken.conv_out.bias.fill_(float("inf"))
    with pytest.raises(StageError, match="not finite"):
        fidelity(broken)
