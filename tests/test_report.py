"The paper's numbers, the claims of the last run, and the README that quotes them."
import json, math, re
from dataclasses import asdict, replace
from pathlib import Path
import pytest
from tocsr import report as R

ROOT = Path(__file__).resolve().parents[1]
REQUIRED = {"count.params_16ch_M", "count.gmacs_16ch", "vae.psnr_16ch", "vae.psnr_4ch", "vae.psnr_pca16", "teacher.linear_ratio_max", "teacher.linear_ratio_mean",
            "expand.loss_v1", "expand.loss_v2", "expand.loss_v3", "expand.loss_bridge", "speed.train_gemm_ratio"}

@pytest.fixture
def claim():
    return R.Claim("vae.psnr_16ch", "round trip", 29.0284, 29.14, (28.6, 29.7), "dB", "nano", "cpu", "partial", "nbs/01_expansion.ipynb", "make reproduce", "other photographs")


def test_the_committed_claims_hold_together():
    claims = R.read_claims(ROOT/"paper_figures/claims.json")
    assert REQUIRED <= {c.id for c in claims}


def test_the_readme_says_what_the_claims_say():
    readme, claims = (ROOT/"README.md").read_text(), R.read_claims(ROOT/"paper_figures/claims.json")
    assert len(R._marks(readme)) >= 3
    assert R.readme_drift(readme, claims) == []


def test_the_headline_ratios_follow_from_the_tables():
    full, compact = R.reported("table_s4", "v2", "params M"), R.reported("table_1", "TOC-SR", "params M")
    assert round(full/compact, 1) == R.reported("abstract", "parameters", "factor") == 6.6
    assert R.reported("table_s7", "130 M, 4ch", "MACs G") == R.reported("table_3", "130 M, 4ch", "MACs G") == 1871


def test_values_marked_best_in_the_paper_are_best_in_our_copy():
    rows = R.reported_rows("table_1")
    assert min(rows, key=lambda r: r["LPIPS"])["method"] == max(rows, key=lambda r: r["MUSIQ"])["method"] == "TOC-SR"
    rows = [r for r in R.reported_rows("table_2") if r["DRealSR PSNR"] != "not reported"]
    assert max(rows, key=lambda r: r["DRealSR PSNR"])["method"] == max(rows, key=lambda r: r["RealSR MUSIQ"])["method"] == "TOC-SR"


def test_reported_and_measured_rows_stay_apart():
    rows = R.beside_paper("table_1", [{"method": "bicubic", "PSNR": 25.0}], "measured (profile cpu, nano scale)")
    assert [r["source"] for r in rows[:-1]] == ["reported (arXiv 2605.02767, table 1)"]*12 and rows[-1]["source"].startswith("measured")
    assert rows[-1]["LPIPS"] is None and all(list(r) == list(rows[0]) for r in rows)


@pytest.mark.parametrize("call", (lambda: R.reported("table_9", "a", "b"), lambda: R.reported("table_1", "TOC", "PSNR"), lambda: R.reported("table_1", "TOC-SR", "psnr"),
                                  lambda: R.reported("table_1", "TOC-SR", "method")))
def test_unknown_reported_values_are_errors_that_list_the_known(call):
    with pytest.raises(R.ClaimError, match="table_1|TOC-SR|PSNR"): call()


@pytest.mark.parametrize("change, word", (
    (dict(status="done"), "reproduced, partial"), (dict(id="psnr"), "group.name"), (dict(ours=math.inf), "finite"), (dict(spread=math.nan), "finite"),
    (dict(spread=(2, 1)), "low, high"), (dict(spread=(1, 2, 3)), "low, high"), (dict(reason=""), "without a reason"), (dict(ours=None), "without a value"),
    (dict(status="not attempted"), "not attempted")))
def test_a_claim_that_does_not_hold_together_is_an_error(claim, change, word):
    with pytest.raises(R.ClaimError, match=word): replace(claim, **change)


def test_claims_survive_a_round_trip_and_are_sorted(claim, tmp_path):
    claims = [claim, replace(claim, id="a.b", spread=0.25), replace(claim, id="a.a", ours=None, spread=None, status="not attempted")]
    path = R.write_claims(claims, tmp_path/"claims.json")
    assert R.read_claims(path) == sorted(claims, key=lambda c: c.id)
    assert [set(e) for e in json.loads(path.read_text())] == [set(asdict(claim))]*3
    with pytest.raises(R.ClaimError, match="a.b"): R.write_claims([*claims, claims[1]], path)
    assert len(R.read_claims(path)) == 3 and [p.name for p in tmp_path.iterdir()] == ["claims.json"]


@pytest.mark.parametrize("text, word", (("[{", "damaged"), ("[1]", "exactly"), ('[{"id": "a.b"}]', "exactly")))
def test_a_damaged_claims_file_is_an_error(tmp_path, text, word):
    (tmp_path/"claims.json").write_text(text)
    with pytest.raises(R.ClaimError, match=word): R.read_claims(tmp_path/"claims.json")
    with pytest.raises(R.ClaimError, match="make reproduce"): R.read_claims(tmp_path/"none.json")


def test_drift_is_seen_and_mended(claim):
    readme = "It reaches <!-- claim:vae.psnr_16ch -->29.14 dB<!-- /claim -->, the paper <!-- claim:vae.psnr_16ch paper .1f -->29.0 dB<!-- /claim -->."
    assert R.readme_drift(readme, [claim]) == []
    moved = [replace(claim, ours=28.0)]
    assert R.readme_drift(readme, moved) == ["vae.psnr_16ch: the README says '29.14 dB', claims.json '28 dB'"]
    assert R.readme_drift(R.render_readme(readme, moved), moved) == []
    assert R.render_readme("no marks", moved) == "no marks"


@pytest.mark.parametrize("readme", ("<!-- claim:vae.psnr_16ch -->1", "<!-- claim:vae.psnr_16ch mine -->1<!-- /claim -->", "<!-- claim:x.y -->1<!-- /claim -->", "1<!-- /claim -->"))
def test_broken_marks_are_errors(claim, readme):
    with pytest.raises(R.ClaimError): R.render_readme(readme, [claim])
    with pytest.raises(R.ClaimError): R.readme_drift(readme, [claim])


def test_questions_render_as_a_table():
    lines = R.questions_markdown().splitlines()
    assert len(lines) == len(R.QUESTIONS) + 2 and {len(re.findall(r"(?<!\\)\|", l)) for l in lines} == {4}
