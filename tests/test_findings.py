"Verdicts on the paper's findings: every rule reaches every verdict, and nothing is hard-coded."

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tocsr.cli import reproduce
from tocsr.core.config import get_profile
from tocsr.evaluation import findings as F
from tocsr.evaluation import paper_claims
from tocsr.evaluation.claims import Claim, read_claims, write_claims
from tocsr.evaluation.study_figures import describe_trend, fifths, plot_losses
from tocsr.evaluation.tables import TITLES, fold, readable_table, results_markdown

ROOT = Path(__file__).resolve().parents[1]
STAGES = ("E1", "E2", "E3", "E4", "Mid", "D4", "D3", "D2", "D1")
NETWORKS = ("larger, 4ch", "larger, 16ch", "compact, 4ch", "compact, 16ch")


def claim(id: str, ours, spread=None, unit="") -> Claim:
    return Claim(
        id=id,
        claim="invented",
        paper=None,
        ours=ours,
        spread=spread,
        unit=unit,
        scale="nano",
        profile="release",
        status="measured",
        source="tests",
        command="pytest",
        reason="invented",
    )


def curve(decrease: float) -> list[float]:
    "A loss per step whose last fifth is `decrease` below the fifth before."
    level = np.repeat([1.3, 1.2, 1.1, 1.0, 1.0 - decrease], 100)
    return (level * np.random.default_rng(0).normal(1, 0.01, 500)).tolist()


def crops(mean: float) -> list[float]:
    "Values of 16 crops that differ much, whatever the method."
    return (mean + np.random.default_rng(1).normal(0, 3, 16)).tolist()


def noisy(mean: float, seed: int) -> list[float]:
    "The same, with small differences between methods."
    return (np.array(crops(mean)) + np.random.default_rng(seed).normal(0, 0.01, 16)).tolist()


def method_values(psnry: dict, stlpips: dict) -> dict:
    names = dict.fromkeys((*psnry, *stlpips))
    return {
        m: dict(psnry=noisy(psnry[m], i), stlpips=noisy(stlpips[m], 100 + i))
        for i, m in enumerate(names)
    }


def solved(share: float, seeds: int = 20) -> dict:
    return {"seeds": seeds, "1pct": dict(per_eps=[dict(solved=share)] * 8)}


@pytest.fixture
def evidence():
    "What a long run that agrees with the paper in everything would leave."
    p = get_profile("release")
    psnry = {"bicubic": 22.0, **dict(zip(NETWORKS, (23.3, 24.4, 23.0, 24.0)))}
    stlpips = {"bicubic": 5.0, **dict(zip(NETWORKS, (3.1, 2.5, 2.9, 2.2)))}
    steps = f"paper, {p.onestep.teacher_steps} steps"
    claims = [
        *paper_claims.counted_claims("release"),
        *(claim(f"table_s4.eps.{v}", x, 0.01) for v, x in zip(("v1", "v2", "v3"), (0.8, 0.4, 0.8))),
        claim("compact.kept_advantage", 0.96, (0.94, 0.98)),
        claim("compact.kendall_tau", 0.7, (0.5, 0.9)),
        claim("onestep.paper_gap_psnr", -0.1, (-0.2, 0.0), "dB"),
        claim("onestep.paper_gap_stlpips", 0.01, (-0.01, 0.02)),
        claim("latent.gain_psnry", 1.0, (0.8, 1.2), "dB"),
        claim("latent.gain_stlpips", -0.05, (-0.07, -0.03)),
        claim("size.gain_psnry", 0.4, (0.3, 0.5), "dB"),
        claim("size.gain_stlpips", 0.01, (0.005, 0.015)),
    ]
    rows = [
        dict(method="paper", feasible=True, eps=e, params=n, architecture=f"a{n}")
        for e, n in ((0.001, 173), (0.003, 161), (0.005, 146), (0.007, 130))
    ]
    fronts = [dict(r, method="other", architecture=f"b{r['params']}") for r in rows]
    distances = {r["architecture"]: dict(fd_gabor=200.0 - r["params"]) for r in (*rows, *fronts)}
    summary = dict(low=22.0, high=24.0, mean=23.0, n=12)
    results = dict(
        autoencoder=dict(
            start="scratch",
            teacher_4ch=dict(psnr=summary),
            teacher_16ch=dict(psnr=dict(low=26.0, high=30.0, mean=28.0, n=12)),
        ),
        search=dict(
            front=rows + fronts,
            frechet=distances,
            chosen=dict(architecture="[R-R-R]-[R-RA-RAA]"),
        ),
        compare=dict(size=12_288, cap=40, methods=dict(paper=solved(0.9), random=solved(0.2))),
        compact_study=dict(released_steps=0, steps=8000),
        compact=dict(
            steps=8000,
            held_out=dict(teacher=dict(ratio=0.6), paper=dict(kept=0.97, excess_se=0.005)),
        ),
        fidelity_rank=dict(steps=100, rows=[dict(after=0.8)] * 20, f_acc_budget=dict(n=7)),
    )
    settled = curve(0.001)
    return F.Evidence(
        profile=p,
        claims={c.id: c for c in claims},
        results=results,
        curves=dict(
            ablations=dict.fromkeys(NETWORKS, settled),
            adapt=dict(paper=settled),
            compact=dict(paper=settled),
            compact_study={"ours 0": settled},
        ),
        influence=dict.fromkeys(STAGES, 0.1),
        relevant_share=0.9,
        values=dict(
            ablations=method_values(psnry, stlpips),
            onestep=method_values({"bicubic": 22.0, steps: 21.0}, {"bicubic": 5.0, steps: 3.0}),
        ),
    )


def verdicts(evidence: F.Evidence) -> dict[str, str]:
    return {f.id: f.verdict for f in F.list_findings(evidence)}


def with_claims(evidence: F.Evidence, **changed: dict) -> F.Evidence:
    "Evidence with other values of claims; `__` in a name is a dot."
    new = {k.replace("__", "."): v for k, v in changed.items()}
    claims = {i: replace(evidence.claims[i], **v) for i, v in new.items()}
    return replace(evidence, claims=evidence.claims | claims)


def with_result(evidence: F.Evidence, stage: str, **changed) -> F.Evidence:
    results = evidence.results | {stage: evidence.results[stage] | changed}
    return replace(evidence, results=results)


def with_values(evidence: F.Evidence, stage: str, **psnry: float) -> F.Evidence:
    "Evidence with other means of PSNR; keys are made of method names."
    values = {m: dict(v) for m, v in evidence.values[stage].items()}
    for m, mean in psnry.items():
        values[m]["psnry"] = crops(mean)
    return replace(evidence, values=evidence.values | {stage: values})


UNTESTABLE = ("sr.prior", "sr.competitors")  # nothing here measures them


def test_evidence_as_in_the_paper_confirms_every_finding_that_is_measured(evidence):
    found = verdicts(evidence)
    assert 15 <= len(found) <= 20
    assert {i for i, v in found.items() if v != F.CONFIRMS} == set(UNTESTABLE)
    assert all(found[i] == F.NOT_TESTED for i in UNTESTABLE)


CONTRADICTIONS = {
    "expansion.cost": lambda e: with_claims(e, count__expansion_params=dict(ours=7.0)),
    "autoencoder": lambda e: with_result(
        e, "autoencoder", teacher_16ch=dict(psnr=dict(mean=20.0, low=19.0, high=21.0, n=12))
    ),
    "expansion": lambda e: with_claims(e, table_s4__eps__v1=dict(ours=0.3)),
    "compact.cost": lambda e: with_claims(e, count__ratio_gmacs=dict(ours=1.5)),
    "total.cost": lambda e: with_claims(e, count__table1_gmacs=dict(ours=900.0)),
    "levels": lambda e: with_result(e, "search", chosen=dict(architecture="[R-R-R-R]-[R-R-R-R]")),
    "compact.retained": lambda e: with_claims(
        e, compact__kept_advantage=dict(ours=0.5, spread=(0.4, 0.6))
    ),
    "finetuning": lambda e: with_result(
        e,
        "compact",
        held_out=dict(teacher=dict(ratio=0.6), paper=dict(kept=0.5, excess_se=0.005)),
    ),
    "search.budget": lambda e: with_result(
        e, "compare", methods=dict(paper=solved(0.2), random=solved(0.1))
    ),
    "search.front": lambda e: with_result(
        e,
        "search",
        front=[dict(r, params=300 - r["params"]) for r in e.results["search"]["front"]],
    ),
    "search.front_quality": lambda e: with_result(
        e,
        "search",
        frechet={
            a: dict(fd_gabor=-d["fd_gabor"]) for a, d in e.results["search"]["frechet"].items()
        },
    ),
    "search.fidelity": lambda e: with_claims(
        e, compact__kendall_tau=dict(ours=-0.5, spread=(-0.8, -0.2))
    ),
    "onestep": lambda e: with_claims(
        e, onestep__paper_gap_psnr=dict(ours=-2.0, spread=(-2.5, -1.5))
    ),
    "sr.latents": lambda e: with_claims(e, latent__gain_psnry=dict(ours=-1.0, spread=(-1.2, -0.8))),
    "sr.size": lambda e: with_claims(e, size__gain_stlpips=dict(ours=-0.1, spread=(-0.12, -0.08))),
    "sr.latents_or_size": lambda e: with_values(e, "ablations", **{"larger, 16ch": 29.0}),
}


def test_every_measured_finding_has_a_contradiction(evidence):
    assert set(CONTRADICTIONS) == set(verdicts(evidence)) - set(UNTESTABLE)


@pytest.mark.parametrize("id", CONTRADICTIONS)
def test_the_opposite_of_the_paper_contradicts_it(evidence, id):
    assert verdicts(CONTRADICTIONS[id](evidence))[id] == F.CONTRADICTS


WIDE = dict(
    expansion=dict(table_s4__eps__v1=dict(ours=0.42, spread=0.02)),
    search_fidelity=dict(compact__kendall_tau=dict(ours=0.1, spread=(-0.4, 0.6))),
    compact_retained=dict(compact__kept_advantage=dict(ours=0.91, spread=(0.85, 0.97))),
    onestep=dict(onestep__paper_gap_psnr=dict(ours=-0.2, spread=(-0.5, 0.1))),
    sr_latents=dict(latent__gain_psnry=dict(ours=0.1, spread=(-0.3, 0.5))),
    sr_size=dict(size__gain_psnry=dict(ours=0.1, spread=(-0.3, 0.5))),
)


@pytest.mark.parametrize("name", WIDE)
def test_an_interval_that_contains_the_limit_tests_nothing(evidence, name):
    id = name.replace("_", ".", 1)
    found = {f.id: f for f in F.list_findings(with_claims(evidence, **WIDE[name]))}[id]
    assert found.verdict == F.NOT_TESTED and "contains the limit" in found.reason


FALLING = dict(
    ablations=("sr.latents", "sr.size", "sr.latents_or_size"),
    adapt=("onestep",),
)


@pytest.mark.parametrize("stage", FALLING)
def test_a_training_that_still_improves_decides_no_comparison(evidence, stage):
    falling = dict.fromkeys(evidence.curves[stage], curve(0.1))
    found = F.list_findings(replace(evidence, curves=evidence.curves | {stage: falling}))
    changed = {f.id: f for f in found if f.id in FALLING[stage]}
    assert {f.verdict for f in changed.values()} == {F.NOT_TESTED}
    assert all("fall" in f.reason for f in changed.values())
    assert {f.id for f in found if f.verdict != F.CONFIRMS} == {*FALLING[stage], *UNTESTABLE}


@pytest.mark.parametrize(
    "stage, id", (("compact", "finetuning"), ("compact_study", "compact.retained"))
)
def test_a_short_training_may_reach_a_goal_but_not_miss_it(evidence, stage, id):
    falling = dict.fromkeys(evidence.curves[stage], curve(0.1))
    short = replace(evidence, curves=evidence.curves | {stage: falling})
    assert verdicts(short)[id] == F.CONFIRMS
    assert verdicts(CONTRADICTIONS[id](short))[id] == F.NOT_TESTED


def test_networks_below_bicubic_decide_nothing(evidence):
    worse = with_values(evidence, "ablations", **{"compact, 4ch": 21.0})
    found = {f.id: f for f in F.list_findings(worse)}
    for id in FALLING["ablations"]:
        assert found[id].verdict == F.NOT_TESTED
        assert "bicubic" in found[id].reason and "compact, 4ch" in found[id].reason


def test_a_teacher_of_which_most_does_nothing_tests_no_compression(evidence):
    idle = replace(evidence, relevant_share=0.16, influence=dict.fromkeys(STAGES, 0.0))
    found = {f.id: f for f in F.list_findings(idle)}
    for id in ("levels", "compact.retained", "finetuning"):
        assert found[id].verdict == F.NOT_TESTED, id
    assert "16%" in found["compact.retained"].reason and "D3" in found["levels"].reason


def test_a_benchmark_that_random_search_solves_ranks_no_search(evidence):
    easy = with_result(evidence, "compare", methods=dict(paper=solved(0.9), random=solved(0.9)))
    assert verdicts(easy)["search.budget"] == F.NOT_TESTED
    fewer = CONTRADICTIONS["search.budget"](with_result(evidence, "compare", cap=6))
    assert verdicts(fewer)["search.budget"] == F.NOT_TESTED


def test_expansions_above_the_floor_decide_nothing(evidence):
    high = {f"table_s4__eps__{v}": dict(ours=0.9) for v in ("v1", "v2", "v3")}
    assert verdicts(with_claims(evidence, **high))["expansion"] == F.NOT_TESTED


def test_what_was_not_measured_is_not_tested(evidence):
    keep = {i: c for i, c in evidence.claims.items() if i.startswith("count.")}
    bare = replace(evidence, claims=keep, values={}, curves=dict(evidence.curves, adapt={}))
    found = {f.id: f for f in F.list_findings(bare)}
    for id in ("expansion", "compact.retained", "onestep", "sr.latents", "sr.latents_or_size"):
        assert found[id].verdict == F.NOT_TESTED and found[id].missing, id


def test_a_demonstration_says_so(evidence):
    scales = {f.id: f.scale for f in F.list_findings(replace(evidence, profile=get_profile("cpu")))}
    for id in ("sr.latents", "onestep", "finetuning", "expansion"):
        assert "short demonstration (profile cpu)" in scales[id]
    for f in F.list_findings(evidence):
        assert "demonstration" not in f.scale
    assert scales["compact.cost"] == "paper scale, counted"


def test_the_table_says_all_that_a_reader_needs(evidence):
    rows = F.findings_table(F.list_findings(evidence))
    columns = ["finding", "paper", "here", "scale", "verdict", "why"]
    assert all(list(r) == columns for r in rows)
    assert all(r[c] for r in rows for c in columns)
    first = rows[0]
    assert "859.395 M to 859.46 M" in first["paper"] and first["verdict"] == "**confirms**"
    ours = next(r["here"] for r in rows if r["finding"].startswith("16 latent channels"))
    assert ours.startswith("PSNR-Y, 16 minus 4 channels: 1 dB [0.8, 1.2]; ST-LPIPS")


def test_stored_verdicts_are_those_of_the_rule(evidence, tmp_path):
    found = F.list_findings(evidence)
    path = F.write_findings(found, tmp_path / "findings.json")
    assert F.read_findings(path) == found
    entries = json.loads(path.read_text())
    entries[1]["measurements"][0] |= dict(low=-2.0, value=-1.5, high=-1.0)
    path.write_text(json.dumps(entries))
    with pytest.raises(F.FindingError, match="autoencoder"):
        F.read_findings(path)
    for text in ("[{", "[1]", '[{"id": "a"}]'):
        path.write_text(text)
        with pytest.raises(F.FindingError, match="not valid|exactly"):
            F.read_findings(path)
    with pytest.raises(F.FindingError, match="07_paper"):
        F.read_findings(tmp_path / "none.json")


def test_drift_from_the_claims_is_found(evidence):
    found = F.list_findings(evidence)
    claims = list(evidence.claims.values())
    assert F.find_drift(found, claims) == []
    moved = list(with_claims(evidence, latent__gain_psnry=dict(ours=0.9)).claims.values())
    (line,) = F.find_drift(found, moved)
    assert "latent.gain_psnry" in line and "0.9" in line


def test_a_run_ends_in_one_screen(evidence, tmp_path, monkeypatch):
    monkeypatch.setenv("TOCSR_RUNS", str(tmp_path))
    folder = tmp_path / "figures/smoke"
    path = F.write_findings(F.list_findings(evidence), folder / "findings.json")
    own = [claim("a.met", 1.0), claim("a.missed", 1.0)]
    own = [replace(c, status=c.id[2:]) for c in own]
    write_claims([*evidence.claims.values(), *own], folder / "claims.json")
    record = dict(
        wall_s=65.0,
        peak_gib=1.5,
        made={f"figure_{i}.{s}": "" for i in range(9) for s in ("png", "pdf", "json")},
        finished="2026-01-01T00:00:00Z",
    )
    done = [
        reproduce.NotebookResult(f"0{i}_name", True, record, tmp_path / f"notebooks/0{i}.ipynb")
        for i in range(1, 10)
    ]
    text = reproduce.run_summary(done, get_profile("smoke"))
    lines = text.splitlines()
    assert len(lines) <= 45 and max(len(line.replace(str(tmp_path), "")) for line in lines) <= 120
    assert "9 figures, 0 tables" in text and "1 min 05 s" in text
    assert f"16 {F.CONFIRMS}, 0 {F.CONTRADICTS}, 2 {F.NOT_TESTED}" in text
    assert "1 met, 1 missed" in text and "latent.gain" not in text
    path.write_text("[{")
    assert "no verdicts: " in reproduce.run_summary(done, get_profile("smoke"))
    path.unlink()
    assert "findings" not in reproduce.run_summary(done, get_profile("smoke"))


def test_the_committed_findings_agree_with_the_rule_and_the_claims():
    folder = ROOT / "paper_figures"
    found = F.read_findings(folder / "findings.json")
    assert F.find_drift(found, read_claims(folder / "claims.json")) == []


@pytest.mark.parametrize(
    "change, word",
    (
        (dict(low=float("nan")), "interval"),
        (dict(low=1.0, high=0.0), "interval"),
        (dict(minimum=None), "no range"),
    ),
)
def test_a_measurement_that_does_not_hold_together_is_an_error(change, word):
    known = dict(text="gain", value=0.5, low=0.4, high=0.6, minimum=0.0)
    with pytest.raises(F.FindingError, match=word):
        F.Measurement(**known | change)


def test_a_finding_has_measurements_or_a_reason_for_none():
    known = dict(id="a", statement="b", where="c", paper="d", scale="e")
    with pytest.raises(F.FindingError, match="measurements"):
        F.Finding(**known)
    m = F.Measurement(text="gain", value=0.5, low=0.4, high=0.6, minimum=0.0)
    with pytest.raises(F.FindingError, match="measurements"):
        F.Finding(**known, measurements=(m,), missing="no data")


# tables for readers

REPORTED = "reported (arXiv 2605.02767, table S7)"
MEASURED = "measured (profile cpu, nano scale)"


def table_cells(rows: list[dict]) -> list[list[str]]:
    lines = [line for line in readable_table(rows).splitlines() if line.startswith("|")]
    cells = [[c.strip() for c in line.strip("|").split("|")] for line in lines]
    return [cells[0], *cells[2:]]


def test_the_papers_rows_and_ours_share_columns_and_empty_ones_are_hidden():
    rows = [
        {"UNet, latents": "130 M", "PSNR": 24.26, "FID": 22.4, "SSIM": None, "source": REPORTED},
        {
            "UNet, latents": "compact (here)",
            "PSNR": dict(mean=22.18, low=21.0, high=23.0, n=16),
            "FID": "not available: needs 100 images",
            "SSIM": None,
            "source": MEASURED,
        },
    ]
    heading, paper, ours = table_cells(rows)
    assert heading == ["UNet, latents", "measured by", "PSNR", "FID"]
    assert paper == ["130 M", "paper", "24.3", "22.4"]
    assert ours == ["compact", "here", "22.2", "–"]


def test_the_best_value_is_bold_in_each_group_and_bounds_are_not_ranked():
    rows = [
        {"m": "a", "PSNR": 24.0, "LPIPS": 0.3, "params M": 130, "source": REPORTED},
        {"m": "b", "PSNR": 23.0, "LPIPS": 0.2, "params M": 300, "source": REPORTED},
        {"m": "c", "PSNR": 21.0, "LPIPS": 0.5, "params M": 1.3, "source": MEASURED},
        {"m": "d", "PSNR": 22.0, "LPIPS": 0.6, "params M": 8.6, "source": MEASURED},
        {"m": "reconstruction of HR, 4ch", "PSNR": 30.0, "LPIPS": 0.1, "source": MEASURED},
    ]
    cells = table_cells(rows)
    assert cells[1][2:] == ["**24**", "0.300", "130"] and cells[2][2:] == ["23", "**0.200**", "300"]
    assert cells[3][2:] == ["21", "**0.500**", "1.30"] and cells[4][2:] == [
        "**22**",
        "0.600",
        "8.60",
    ]
    assert cells[5][2:] == ["30", "0.100", "–"]


def test_ways_are_shown_where_both_ran_and_named_where_one_did_not():
    rows = [
        {"m": "a", "way": "not reported", "PSNR": 24.0, "source": REPORTED},
        {"m": "c", "way": "ours", "PSNR": 21.5, "source": MEASURED},
        {"m": "c", "way": "paper", "PSNR": 20.5, "source": MEASURED},
    ]
    cells = table_cells(rows)
    assert cells[0] == ["m", "measured by", "way", "PSNR"] and cells[1][2] == "–"
    assert [c[2] for c in cells[2:]] == ["ours", "paper"]
    one = [*rows[:2], {"m": "not run", "way": "paper", "source": "not run: tocsr reproduce"}]
    assert table_cells(one)[0] == ["m", "measured by", "PSNR"]
    assert readable_table(one).endswith("\n\nnot run: tocsr reproduce\n")
    with pytest.raises(ValueError, match="rows"):
        readable_table([])


def test_a_folded_table_is_still_markdown():
    assert fold("139 claims", "| a |\n") == (
        "<details><summary>139 claims</summary>\n\n| a |\n\n\n</details>\n"
    )


# tables of a stage's rows

NO_FILE = "not available: no file $TORCH_HOME/lpips.pth"


def summary(mean: float) -> dict:
    return dict(mean=mean, low=mean - 1, high=mean + 1, n=16)


def result_lines(rows: list[dict], *args, **options) -> list[list[str]]:
    lines = results_markdown(rows, *args, **options).splitlines()
    return [[c.strip() for c in x.split("|")[1:-1]] for x in lines if x.startswith("|")]


def test_columns_of_results_have_titles_and_units_and_the_method_comes_first():
    row = dict(
        macs_G=4.65, psnry=22.24, extra="a", stlpips=0.5, steps=1, method="m", evaluated_px=9
    )
    heading, _, cells = result_lines([row], hide=("evaluated_px",))
    titles = ["method", "steps", "PSNR-Y (dB) ↑", "ST-LPIPS ↓", "MACs (G)", "extra"]
    assert heading == titles and cells == ["m", "1", "22.2", "0.500", "4.65", "a"]
    assert not {"psnry", "stlpips", "macs_G"} & set(TITLES.values())
    with pytest.raises(ValueError, match="rows"):
        results_markdown([])


def test_the_best_result_is_bold_in_both_directions_and_ties_share_it():
    rows = [
        dict(method="a", psnry=summary(22.21), stlpips=0.4, seconds=3.0, own=1.5),
        dict(method="b", psnry=summary(22.24), stlpips=0.3, seconds=1.0, own=2.5),
        dict(method="c", psnry=summary(20.0), stlpips=0.5, seconds=2.0, own=None),
        dict(method="reconstruction of HR", psnry=summary(30.0), stlpips=0.1),
    ]
    cells = result_lines(rows, intervals=True, lower=("own",))[2:]
    assert [c[1].split(" ")[0] for c in cells] == ["**22.2**", "**22.2**", "20", "30"]
    assert cells[0][1] == "**22.2** [21.2, 23.2]"
    assert [c[2] for c in cells] == ["0.400", "**0.300**", "0.500", "0.100"]
    assert [c[3] for c in cells] == ["3", "1", "2", ""]  # no direction of a time is marked
    assert [c[4] for c in cells] == ["**1.50**", "2.50", "", ""]
    assert result_lines(rows)[2][1] == "**22.2**"
    equal = [dict(method=m, psnry=22.01 + i / 1000) for i, m in enumerate("ab")]
    assert "**" not in results_markdown(equal)


def test_metrics_that_no_row_has_are_hidden_and_named_with_their_reason():
    rows = [
        dict(method="a", psnry=22.0, lpips=NO_FILE, dists=NO_FILE, niqe=5.5, trained_px="none"),
        dict(method="b", psnry=23.0, lpips=NO_FILE, dists=NO_FILE, niqe="not available: small"),
    ]
    text = results_markdown(rows, expected=("stlpips", "psnry"))
    assert result_lines(rows)[0] == ["method", "PSNR-Y (dB) ↑", "NIQE ↓"]
    assert text.splitlines()[-1] == (
        "Not measured: LPIPS, DISTS (no file \\$TORCH_HOME/lpips.pth); "
        "NIQE in 1 of 2 rows (small); ST-LPIPS (not among the metrics of this run)."
    )
    assert "Not measured" not in results_markdown([dict(method="a", psnry=22.0, seconds=None)])


# losses in training


def test_the_trend_of_a_loss_follows_the_rule_of_the_findings():
    assert describe_trend(dict(a=curve(0.1), b=curve(-0.001))) == (
        "a: the loss still falls at the end; b: falls less than 2% in the last fifth"
    )
    assert "too few" in describe_trend(dict(a=[3.0, 2.0, 1.0], b=curve(0.1)))
    assert fifths([5.0, 4, 3, 2, 1]) == (5, 1)


def test_lines_of_losses_that_coincide_differ_in_width_and_panels_may_share_an_axis():
    two = dict(larger=[2.0, 1.0], compact=[2.0, 1.0])
    fig = plot_losses({"a": two, "b": dict(larger=[9.0, 8.0])}, "a claim", shared=("a", "b"))
    first, second = fig.axes
    wide, narrow = first.lines
    assert wide.get_linewidth() > 2 * narrow.get_linewidth()
    assert first.get_ylim() == second.get_ylim() and first.get_ylim()[1] >= 9
    assert fig.get_suptitle() == "a claim" and second.get_title() == "b\n9.00 to 8.00"
    assert [t.get_text() for t in fig.legends[0].get_texts()] == ["larger", "compact"]


# claims of our own tests


def test_own_tests_are_met_or_missed_and_never_reproduced():
    p = get_profile("smoke")
    ratio = dict(mean=0.7, mean_interval=[0.6, 0.8], max=1.02, max_interval=[0.98, 1.05])
    results = dict(ratio=ratio, start="bundled", expansions={}, epsilon_expansions={})
    claims = {c.id: c for c in paper_claims.teacher_claims(results, p)}
    worst = claims["teacher.linear_ratio_max"]
    assert claims["teacher.linear_ratio_mean"].status == "met" and worst.status == "missed"
    assert "the model card: 1.025 (512 held-out crops" in worst.reason
    assert "threshold: at most 1" in worst.reason


@pytest.mark.parametrize(
    "four, status", ((21.0, "partial"), (23.0, "contradicts"), (22.0, "differs"))
)
def test_the_sign_of_a_paired_gain_decides_its_status(four, status):
    values = {
        "compact, 4ch": dict(psnry=noisy(four, 1), stlpips="not available: no weights"),
        "compact, 16ch": dict(psnry=noisy(22.0, 2), stlpips=crops(0.3)),
        "larger, 16ch": dict(psnry=noisy(22.5, 3), stlpips=crops(0.3)),
    }
    found = {c.id: c for c in paper_claims.capacity_claims(values, get_profile("smoke"))}
    gain = found["latent.gain_psnry"]
    assert gain.status == status and gain.paper == pytest.approx(1.02)
    assert gain.ours == pytest.approx(22.0 - four, abs=0.02)
    assert found["latent.gain_stlpips"].status == "not attempted"


def test_the_size_of_the_benchmark_counts_what_differs():
    from tocsr.search.tabular import effective_size, load_benchmark

    table = load_benchmark()
    size, error = effective_size(table)
    assert 1 < size < len(table) and 0 < error < 1
    exact = replace(table, f_acc_se=0 * table.f_acc_se)
    assert effective_size(exact)[0] >= size
    assert effective_size(replace(table, f_acc_se=table.f_acc_se * 1e6))[0] == 1
