"The paper's numbers, the claims of the last run, and the README that quotes them."

import json
import math
import re
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from tocsr.evaluation import claims as R
from tocsr.evaluation import paper_claims
from tocsr.evaluation import reported as P
from tocsr.evaluation.release_run import read_release, release_claims

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def claim():
    return R.Claim(
        id="vae.psnr_16ch",
        claim="round trip",
        paper=29.0284,
        ours=29.14,
        spread=(28.6, 29.7),
        unit="dB",
        scale="nano",
        profile="cpu",
        status="partial",
        source="nbs/01_expansion.ipynb",
        command="make reproduce",
        reason="other photographs",
    )


def test_the_committed_claims_hold_together():
    claims = R.read_claims(ROOT / "paper_figures/claims.json")
    assert not R.REQUIRED_CLAIMS - {c.id for c in claims}


def test_claims_without_a_stage_are_recomputed_from_files(tmp_path, claim):
    for name in ("peers_set5.json", "tocsr_set5.json"):
        (tmp_path / name).write_text((ROOT / "paper_figures" / name).read_text())
    outdated = replace(claim, id="sr.set5.psnry_removed")
    R.write_claims([claim, outdated], tmp_path / "claims.json")
    found = {c.id: c for c in paper_claims.refresh_claims(tmp_path)}
    assert found[claim.id] == claim and outdated.id not in found
    assert found["count.table1_gmacs"].ours == pytest.approx(273.0, abs=0.05)
    assert found["count.table1_gmacs"].paper == 273
    assert found["sr.set5.psnry_bicubic"].ours == pytest.approx(28.43, abs=0.01)
    assert found["sr.tile_seam"].status == "not attempted"
    committed = {c.id: c for c in R.read_claims(ROOT / "paper_figures/claims.json")}
    assert all(committed[i].ours == pytest.approx(c.ours) for i, c in found.items() if "set5" in i)


def test_the_claims_of_the_release_run_are_those_of_its_records():
    committed = {c.id: c for c in R.read_claims(ROOT / "paper_figures/claims.json")}
    own = {c.id: c for c in release_claims(read_release(ROOT / "tocsr/weights/release"))}
    assert {id for id in committed if id.startswith("release.")} == set(own)
    for id, claim in own.items():
        assert committed[id].ours == pytest.approx(claim.ours), "run tocsr readme"
        assert committed[id].status == claim.status


def test_the_readme_says_what_the_claims_say():
    readme = (ROOT / "README.md").read_text()
    claims = R.read_claims(ROOT / "paper_figures/claims.json")
    assert len(R.find_marks(readme)) >= 3
    assert R.find_readme_drift(readme, claims) == []


def test_the_headline_ratios_follow_from_the_tables():
    full = P.reported_value("table_s4", "v2", "params M")
    compact = P.reported_value("table_1", "TOC-SR", "params M")
    assert round(full / compact, 1) == P.reported_value("abstract", "parameters", "factor") == 6.6
    assert (
        P.reported_value("table_s7", "130 M, 4ch", "MACs G") == 1871
        and P.reported_value("table_3", "130 M, 4ch", "steps") == 1
    )
    assert (
        "MACs G" not in P.find_reported_table("table_3").columns
    )  # the paper prints them in S7 only


def test_values_marked_best_in_the_paper_are_best_in_our_copy():
    rows = P.reported_rows("table_1")
    assert (
        min(rows, key=lambda r: r["LPIPS"])["method"]
        == max(rows, key=lambda r: r["MUSIQ"])["method"]
        == "TOC-SR"
    )
    rows = [r for r in P.reported_rows("table_2") if r["DRealSR PSNR"] != "not reported"]
    assert (
        max(rows, key=lambda r: r["DRealSR PSNR"])["method"]
        == max(rows, key=lambda r: r["RealSR MUSIQ"])["method"]
        == "TOC-SR"
    )


def test_reported_and_measured_rows_stay_apart():
    rows = P.merge_with_reported(
        "table_1", [{"method": "bicubic", "PSNR": 25.0}], "measured (profile cpu, nano scale)"
    )
    assert [r["source"] for r in rows[:-1]] == [
        "reported (arXiv 2605.02767, table 1)"
    ] * 12 and rows[-1]["source"].startswith("measured")
    assert rows[-1]["LPIPS"] is None and all(list(r) == list(rows[0]) for r in rows)


@pytest.mark.parametrize(
    "call",
    (
        lambda: P.reported_value("table_9", "a", "b"),
        lambda: P.reported_value("table_1", "TOC", "PSNR"),
        lambda: P.reported_value("table_1", "TOC-SR", "psnr"),
        lambda: P.reported_value("table_1", "TOC-SR", "method"),
    ),
)
def test_unknown_reported_values_are_errors_that_list_the_known(call):
    with pytest.raises(P.ReportedError, match="table_1|TOC-SR|PSNR"):
        call()


@pytest.mark.parametrize(
    "change, word",
    (
        (dict(status="done"), "reproduced, partial"),
        (dict(id="psnr"), "group.name"),
        (dict(ours=math.inf), "finite"),
        (dict(spread=math.nan), "finite"),
        (dict(spread=(2, 1)), "low, high"),
        (dict(spread=(1, 2, 3)), "low, high"),
        (dict(reason=""), "without a reason"),
        (dict(ours=None), "without a value"),
        (dict(status="contradicts", reason=""), "without a reason"),
        (dict(status="not attempted"), "not attempted"),
    ),
)
def test_a_claim_that_does_not_hold_together_is_an_error(claim, change, word):
    with pytest.raises(R.ClaimError, match=word):
        replace(claim, **change)


def test_claims_survive_a_round_trip_and_are_sorted(claim, tmp_path):
    claims = [
        claim,
        replace(claim, id="a.b", spread=0.25),
        replace(claim, id="a.a", ours=None, spread=None, status="not attempted"),
    ]
    path = R.write_claims(claims, tmp_path / "claims.json")
    assert R.read_claims(path) == sorted(claims, key=lambda c: c.id)
    assert [set(e) for e in json.loads(path.read_text())] == [set(asdict(claim))] * 3
    with pytest.raises(R.ClaimError, match="a.b"):
        R.write_claims([*claims, claims[1]], path)
    assert len(R.read_claims(path)) == 3 and [p.name for p in tmp_path.iterdir()] == ["claims.json"]


@pytest.mark.parametrize(
    "text, word", (("[{", "damaged"), ("[1]", "exactly"), ('[{"id": "a.b"}]', "exactly"))
)
def test_a_damaged_claims_file_is_an_error(tmp_path, text, word):
    (tmp_path / "claims.json").write_text(text)
    with pytest.raises(R.ClaimError, match=word):
        R.read_claims(tmp_path / "claims.json")
    with pytest.raises(R.ClaimError, match="make reproduce"):
        R.read_claims(tmp_path / "none.json")


def test_drift_is_found_and_repaired(claim):
    readme = (
        "It reaches <!-- claim:vae.psnr_16ch -->29.14 dB<!-- /claim -->, the paper "
        "<!-- claim:vae.psnr_16ch paper .1f -->29.0 dB<!-- /claim -->."
    )
    assert R.find_readme_drift(readme, [claim]) == []
    moved = [replace(claim, ours=28.0)]
    assert R.find_readme_drift(readme, moved) == [
        "vae.psnr_16ch: the README says '29.14 dB', claims.json '28 dB'"
    ]
    assert R.find_readme_drift(R.render_readme(readme, moved), moved) == []
    assert R.render_readme("no marks", moved) == "no marks"


@pytest.mark.parametrize(
    "readme",
    (
        "<!-- claim:vae.psnr_16ch -->1",
        "<!-- claim:vae.psnr_16ch mine -->1<!-- /claim -->",
        "<!-- claim:x.y -->1<!-- /claim -->",
        "1<!-- /claim -->",
    ),
)
def test_broken_marks_are_errors(claim, readme):
    with pytest.raises(R.ClaimError):
        R.render_readme(readme, [claim])
    with pytest.raises(R.ClaimError):
        R.find_readme_drift(readme, [claim])


def test_ambiguities_render_as_a_table():
    lines = P.ambiguities_markdown().splitlines()
    assert len(lines) == len(P.AMBIGUITIES) + 2
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in lines} == {4}
    text = " ".join(lines)
    for fact in (
        "273 G",
        "393,216",
        "0.008%",
        "12/16 = 0.75",
        "z_h",
        "65 K",
        "0.9188",
        "fewest parameters",
        "Acquisition",
        "2.91x",
    ):
        assert fact in text, fact


def test_the_floor_of_variants_v1_and_v3_is_below_what_the_paper_prints():
    floor = 12 / 16  # 4 of 16 dimensions of white noise pass
    for variant in ("v1", "v3"):
        assert floor < P.reported_value("table_s4", variant, "loss") < floor + 0.02
    assert P.reported_value("table_s4", "v2", "loss") < floor / 8


def test_a_contradiction_is_a_status(claim):
    row = R.claims_table([replace(claim, status="contradicts")])[0]
    assert (
        row["status"] == "contradicts"
        and row["paper"] == "29.0284 dB"
        and row["ours"] == "29.14 [28.6, 29.7] dB"
    )


def test_the_ratios_are_not_called_reproduced_because_no_network_has_both():
    ratios = {c.id: c for c in paper_claims.counted_claims("cpu") if "ratio" in c.id}
    assert {c.status for c in ratios.values()} == {"partial"}
    for c in ratios.values():
        assert "(6.46x, 2.85x)" in c.reason and "(6.62x, 2.91x)" in c.reason


@pytest.mark.parametrize(
    "v1, v2, v3, status",
    ((0.82, 0.40, 0.84, "partial"), (0.74, 0.40, 0.84, "differs"), (0.82, 0.50, 0.84, "differs")),
)
def test_table_s4_in_epsilon_prediction_is_compared_with_its_floor(v1, v2, v3, status):
    from tocsr.core.config import get_profile

    losses = dict(v1=v1, v2=v2, v3=v3)
    rows = {k: dict(loss=v, sem=0.01) for k, v in losses.items()}
    claims = {c.id: c for c in paper_claims._epsilon_claims(rows, get_profile("cpu"))}
    assert set(claims) == {"table_s4.eps.v1", "table_s4.eps.v2", "table_s4.eps.v3"}
    assert {c.status for c in claims.values()} == {status}
    assert claims["table_s4.eps.v1"].paper == 0.7598 and "0.75" in claims["table_s4.eps.v1"].reason


def test_many_steps_are_compared_with_one_and_with_bicubic():
    from tocsr.core.config import get_profile

    p = get_profile("cpu")  # 1, 2, 4 and 10 steps

    def crops(*means):
        values = [m + d for m in means for d in (-0.01, 0.0, 0.01)]
        return dict(stlpips=values, niqe=[10 * v for v in values])

    values = {
        "bicubic": crops(0.4),
        "ours, 1 step, noise": crops(0.38),
        "ours, 10 steps, noise": crops(0.32),
        "paper, 1 step, noise": crops(0.36),
        "paper, 10 steps, noise": crops(0.39),
    }
    results = dict(values=values, training_size=dict(values=values))
    claims = {c.id: c for c in paper_claims.adapt_claims(results, p)}
    assert claims["adapt.stlpips_bicubic"].ours == pytest.approx(0.4)
    assert claims["adapt.ours.stlpips_10"].ours == pytest.approx(0.32)
    assert claims["adapt.ours.gain_stlpips"].ours == pytest.approx(-0.2)
    met = {id: c.status for id, c in claims.items() if "gain" in id}
    assert met["adapt.ours.gain_stlpips"] == met["adapt.ours.gain_steps"] == "met"
    assert met["adapt.ours.gain_stlpips_training_size"] == "missed"  # 20% of 25
    assert met["adapt.paper.gain_steps"] == met["adapt.paper.gain_stlpips"] == "missed"
    assert met["adapt.ours.gain_steps_niqe"] == "met"
    assert met["adapt.paper.gain_steps_niqe"] == "missed"
    without = {m: dict(psnry=[20.0]) for m in values}
    silent = paper_claims.adapt_claims(dict(values=without, training_size=dict(values=without)), p)
    assert {c.status for c in silent} == {"not attempted"}
    assert all(("niqe" if c.id.endswith("niqe") else "stlpips") in c.reason for c in silent)
