"""Search: optimality on tiny spaces, faults, resume."""
import itertools
import json
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

import tocsr.search
from tocsr.search import (EXTRAS, METHODS, Costs, Evaluation, Journal, Problem, SearchError, SearchSpace, Tape, absent, additive_search, answer,
                          best_so_far, check_grid, cross_score, enumerate_space, evaluations_to, fit_additive, hypervolume, integer_programme, knapsack,
                          measure_all, run_method, structured_search, synthetic_problem, table_problem, truth_front, with_costs)
from tocsr.store import StoreError, save_weights
from tocsr.truth import QUANTITIES, Subspace, load_truth, swap_vectors

EPS = [0.2, 0.5]


def needs(method):
    if absent(method): pytest.skip(absent(method))


def with_vectors(problem):
    "The same problem with error vectors that are orthogonal."
    return replace(problem, products=np.diag(problem.proxy.ravel()).reshape(*problem.proxy.shape, *problem.proxy.shape))


@pytest.fixture(scope="module")
def tiny():
    "27 architectures with interactions, and everything about them."
    problem = synthetic_problem(3, 3, "strong", seed=4)
    return problem, *measure_all(problem)


def sequence(done):
    return [(e.run, e.step, e.arch, e.cost, e.gap if np.isfinite(e.gap) else e.error) for e in done]


@pytest.mark.parametrize("method", ["random", "additive", "structured", "paper"])
def test_optimum_of_a_tiny_space_is_found_when_it_is_used_up(tiny, method):
    problem, X, costs, gaps = tiny
    budget = 2*len(X) if method == "paper" else len(X)  # the paper's procedure has one run per eps
    done = run_method(method, problem, EPS, budget, seed=1, initial=25)
    optimum, _ = truth_front(costs, gaps, EPS)
    assert [answer(problem, done, e).cost for e in EPS] == pytest.approx(optimum)
    for run in {e.run for e in done}:
        archs = [e.arch for e in done if e.run == run]
        assert len(archs) == len(set(archs)), "an architecture was charged twice"


def test_structured_beats_random_where_the_truth_is_known():
    regret = {m: [] for m in ("structured", "random")}
    for seed in range(3):
        problem = synthetic_problem(6, 3, "medium", seed)
        _, costs, gaps = measure_all(problem)
        optimum = truth_front(costs, gaps, [0.4])[0][0]
        for m in regret: regret[m].append(best_so_far(problem, run_method(m, problem, [0.4], 20, seed), 0.4)[-1]/optimum - 1)
    assert np.mean(regret["structured"]) < 0.25*np.mean(regret["random"])
    assert np.median(regret["structured"]) < 0.01


def test_front_in_one_run_shares_evaluations():
    problem = synthetic_problem(6, 3, "weak", 2)
    _, costs, gaps = measure_all(problem)
    eps = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]
    done = structured_search(problem, eps, 40)
    assert len(done) == 40 and {e.run for e in done} == {"all"}
    found = np.array([answer(problem, done, e).cost for e in eps])
    assert np.mean(found/truth_front(costs, gaps, eps)[0] - 1) < 0.02


def test_truth_front_against_brute_force(tiny):
    problem, X, costs, gaps = tiny
    best, where = truth_front(costs, gaps, EPS)
    for e, b, w in zip(EPS, best, where):
        assert b == min(c for c, g in zip(costs, gaps) if g <= e) == costs[w]


def test_integer_programme_against_brute_force():
    rng = np.random.default_rng(0)
    for _ in range(10):
        cost, weight = rng.random((4, 3)), rng.random((4, 3))
        limit = weight.min(1).sum() + rng.random()
        vectors = list(itertools.product(range(3), repeat=4))
        total = lambda t, a: sum(t[s, o] for s, o in enumerate(a))
        ranked = sorted((a for a in vectors if total(weight, a) <= limit), key=lambda a: total(cost, a))
        assert integer_programme(cost, [(weight, limit)]) == ranked[0]
        if len(ranked) > 2: assert integer_programme(cost, [(weight, limit)], ranked[:2]) == ranked[2]


def test_knapsack_stays_within_its_limits(tiny):
    problem = tiny[0]
    for limit in (0.1, 0.5, 2.0):
        a, = knapsack(problem, problem.weights, [limit])
        assert sum(problem.weights[s, o] for s, o in enumerate(a)) <= limit


def test_additive_fit_corrects_one_wrong_proxy(tiny):
    problem = tiny[0]
    X = enumerate_space(problem.space)[1:]
    truth = problem.weights.copy(); truth[1, 2] *= 4
    u = truth[np.arange(3), X].sum(1)
    fit = fit_additive(problem, X, u, ridge=1e-6)
    assert fit[np.arange(3), X].sum(1) == pytest.approx(u, rel=1e-3)


@pytest.mark.parametrize("method, kill", [*itertools.product([m for m in METHODS if m != "paper"], [0, 2, 7]), ("paper", 5)])
def test_killed_and_resumed_gives_the_same_sequence(tmp_path, method, kill):
    needs(method)
    problem = with_vectors(synthetic_problem(4, 3, "medium", 1))
    calls = itertools.count()

    def dying(a):
        if next(calls) == kill: raise KeyboardInterrupt
        return problem.gap(a)
    args = dict(eps=EPS, budget=12, seed=3, initial=4)
    path = tmp_path/"e.jsonl"
    with pytest.raises(KeyboardInterrupt):
        run_method(method, replace(problem, gap=dying), **args, journal=Journal(path, "s"))
    assert len(path.read_text().splitlines()) == 1 + kill
    path.write_bytes(path.read_bytes() + b'{"method": "x", "se')  # killed while writing
    resumed = run_method(method, problem, **args, journal=Journal(path, "s"))
    assert sequence(resumed) == sequence(run_method(method, problem, **args))
    lines = [json.loads(l) for l in path.read_text().splitlines()]
    assert len(lines) == 1 + len(resumed) and lines[0] == {"signature": "s"}


def test_architectures_are_measured_once_and_charged_to_everybody():
    problem = synthetic_problem(3, 2, "weak", 0)
    measured = []

    def counting(a):
        measured.append(a)
        return problem.gap(a)
    journal, shared = Journal(), Problem(problem.space, counting, problem.proxy, 1.0)
    first = run_method("random", shared, [0.4], 8, journal=journal)
    second = run_method("structured", shared, [0.4], 8, journal=journal)
    assert len(first) == len(second) == 8 == len(measured) == len(set(measured))


@pytest.mark.parametrize("method", list(METHODS))
def test_failures_are_recorded_and_the_search_goes_on(method):
    needs(method)
    problem = with_vectors(synthetic_problem(4, 3, "medium", 1))
    budget = 14 if method == "paper" else 40  # its steps are slow

    def fragile(a):
        if a[0] == 1: raise RuntimeError("out of memory")
        return float("nan") if a[0] == 2 and a[1] == 2 else problem.gap(a)
    done = run_method(method, replace(problem, gap=fragile), EPS, budget, seed=0, initial=5)
    failed = [e for e in done if e.error]
    assert failed and all(np.isnan(e.gap) for e in failed)
    assert {e.error for e in failed} <= {"RuntimeError: out of memory", "gap is nan"}
    if method not in ("greedy", "tpe", "nsga2"): assert len(done) == budget  # those may converge earlier
    assert all(answer(problem, done, e).arch not in {f.arch for f in failed} for e in EPS)


@pytest.mark.parametrize("method", list(METHODS))
def test_a_gap_that_always_fails_ends_with_the_teacher(method):
    needs(method)
    problem = with_vectors(synthetic_problem(3, 2, "weak", 0))
    done = run_method(method, replace(problem, gap=lambda a: float("inf")), [0.3], 6)
    assert all(e.error == "gap is inf" for e in done) and answer(problem, done, 0.3).message == "the teacher itself"


@pytest.mark.parametrize("method", ["paper", "additive", "structured"])
def test_a_space_without_teacher_reports_infeasible_eps(method):
    base = synthetic_problem(3, 3, "weak", 0)
    space = SearchSpace(base.space.stages, base.space.cost, base.space.edges, has_teacher=False)
    problem = Problem(space, lambda a: 0.5 + 0.5*base.gap(a), base.proxy, 1.0)
    done = run_method(method, problem, [0.1], 7, initial=4)
    a = answer(problem, done, 0.1)
    assert len(done) == 7 and not a.feasible and a.arch is None and a.gap == min(e.gap for e in done)
    assert "smallest feasible eps found" in a.message


def test_eps_zero_is_the_teacher_and_costs_nothing():
    problem = synthetic_problem(3, 2, "weak", 0)
    for method in ("paper", "additive", "structured"):
        done = run_method(method, problem, [0.0], 5)
        assert done == [] and answer(problem, done, 0.0).arch == (0, 0, 0)


@pytest.mark.parametrize("grid, words", [([], "empty"), ([-0.1, 0.3], "negative"), ([0.3, 0.1], "ascend"), ([0.1, 0.1], "ascend"), ([float("nan")], "finite")])
def test_bad_grids_are_refused_by_every_method(grid, words):
    problem = synthetic_problem(3, 2, "weak", 0)
    with pytest.raises(SearchError, match=words): check_grid(grid)
    for method in METHODS:
        if not absent(method):
            with pytest.raises(SearchError, match=words): run_method(method, problem, grid, 4)


def test_unknown_method_and_foreign_log(tmp_path):
    problem = synthetic_problem(3, 2, "weak", 0)
    with pytest.raises(SearchError, match="structured"): run_method("annealing", problem, [0.3], 4)
    Journal(tmp_path/"e.jsonl", "teacher a")
    with pytest.raises(SearchError, match="another space or teacher"): Journal(tmp_path/"e.jsonl", "teacher b")


def test_evaluations_to():
    problem = synthetic_problem(3, 2, "weak", 0)
    make = lambda i, cost, gap: Evaluation("m", 0, "all", i, (i,), cost, gap)
    curve = best_so_far(problem, [make(0, 1.0, 0.9), make(1, 1.5, 0.2), make(2, 1.2, float("nan")), make(3, 1.3, 0.1)], 0.3)
    whole = float(Costs(problem.space)([(0, 0, 0)])[0])
    assert curve.tolist() == [whole, min(whole, 1.5), min(whole, 1.5), min(whole, 1.3)]
    assert evaluations_to(np.array([3.0, 2.1, 2.0]), 2.0, 0.05) == 2 and evaluations_to(np.array([3.0]), 2.0) == float("inf")


def test_large_space_steps_stay_cheap():
    problem = synthetic_problem(38, 5, "medium", 0)
    start = time.process_time()
    done = structured_search(problem, [0.5], 12)
    assert (time.process_time() - start)/len(done) < 5
    assert answer(problem, done, 0.5).cost < 0.9*answer(problem, [], 0.5).cost


def test_tape_charges_its_own_history_once():
    problem = synthetic_problem(3, 2, "weak", 0)
    tape = Tape(problem, None, "m", 0)
    assert tape.measure((1, 0, 0)) is tape.measure(np.array([1, 0, 0])) and len(tape) == 1


def test_additive_search_is_deterministic():
    problem = synthetic_problem(4, 3, "medium", 1)
    assert sequence(additive_search(problem, EPS, 12)) == sequence(additive_search(problem, EPS, 12))


def test_cost_of_a_rare_combination_is_exact():
    "A saving that only one combination has, as when a whole level is removed, must not be missed."
    table = np.array([[4.0, 3.0, 2.0]]*6)
    cost = lambda X: table[np.arange(6), X].sum(1) - 5.0*(X == 2).all(1)
    costs = Costs(SearchSpace({f"s{i}": ("a", "b", "c") for i in range(6)}, cost))
    assert costs([(2,)*6, (2,)*5 + (1,)]).tolist() == [7.0, 13.0]


# --- objectives and limits

@pytest.fixture(scope="module")
def priced():
    "A small space with three quantities."
    problem = with_vectors(synthetic_problem(4, 3, "medium", 1))
    rng = np.random.default_rng(0)
    quantities = dict(params=Costs(problem.space).table, latency=rng.random((4, 3)), macs=rng.random((4, 3)))
    return problem, quantities, *measure_all(problem)


@pytest.mark.parametrize("method", list(METHODS))
@pytest.mark.parametrize("minimise", ["latency", {"params": 0.7, "macs": 0.3}])
def test_several_constraints_at_once(priced, method, minimise):
    needs(method)
    problem, quantities, X, _, gaps = priced
    both = with_costs(problem, quantities, minimise, dict(params=0.9*np.nanmax(quantities["params"], 1).sum(), latency=2.4))
    done = run_method(method, both, [0.6], 81, seed=0, initial=5)
    ok = both.allowed(X) & (gaps <= 0.6)
    assert ok.any() and not both.allowed([(0, 0, 0, 0)])[0]
    assert both.allowed([e.arch for e in done]).all(), "an architecture beyond a limit was paid for"
    if method in ("additive", "cross", "structured", "random"): assert answer(both, done, 0.6).cost == pytest.approx(both.costs(X)[ok].min())
    elif method != "greedy": assert answer(both, done, 0.6).feasible


def test_bad_objectives_and_limits(priced):
    problem, quantities, *_ = priced
    with pytest.raises(SearchError, match="watts.*params, latency, macs"): with_costs(problem, quantities, "watts")
    with pytest.raises(SearchError, match="watts"): with_costs(problem, quantities, at_most=dict(watts=3))
    with pytest.raises(SearchError, match="positive"): with_costs(problem, quantities, {"params": 0.0})
    smallest = np.nanmin(quantities["params"], 1).sum()
    with pytest.raises(SearchError, match="smallest architecture has"): with_costs(problem, quantities, at_most=dict(params=0.99*smallest))
    with pytest.raises(SearchError, match="together"):
        two = Problem(SearchSpace({"x": ("0", "1"), "y": ("0", "1")}, [(1, 2), (1, 2)]), lambda a: 0.1, np.zeros((2, 2)))
        with_costs(two, dict(params=[(1, 2), (1, 2)], a=[(0, 1), (0, 1)], b=[(1, 0), (1, 0)]), at_most=dict(a=0.5, b=1.5))


def test_methods_without_their_package_say_so(monkeypatch):
    monkeypatch.setattr(tocsr.search, "find_spec", lambda name: None)
    problem = synthetic_problem(3, 2, "weak", 0)
    for method, package in EXTRAS.items():
        with pytest.raises(SearchError, match=rf"{package}.*tocsr\[search\]"): run_method(method, problem, [0.3], 4)


# --- the truth table

@pytest.fixture
def table_file(tmp_path):
    "A table of 12 architectures whose error vectors are known."
    space = Subspace({"E1": ("RA", "R"), "deepest": ("R-R-R", "none"), "D1": ("RA", "RR", "R")})
    rng, swaps = np.random.default_rng(0), swap_vectors(space)
    r = rng.normal(size=(len(swaps), 50))
    total = lambda a: sum((r[k] for k, v in enumerate(swaps) if (v[v > 0] == a[v > 0]).all()), np.zeros(50))
    gap = torch.tensor([np.square(total(a)).mean() for a in space.vectors()], dtype=torch.float32)
    costs = torch.tensor([[4.0, 2.0, np.nan], [6.0, 0.0, np.nan], [3.0, 2.0, 1.0]], dtype=torch.float64)
    tensors = dict(gap=gap, gap_se=gap/10, excess=gap, products=torch.tensor(r @ r.T/50)[None].repeat(4, 1, 1), **{q: costs.clone() for q in QUANTITIES})
    meta = dict(options=space.options, teacher="abc", latents=4, power=2.0, teacher_ratio=0.9)
    save_weights(tmp_path/"truth.safetensors", tensors, truth=json.dumps(meta))
    return tmp_path/"truth.safetensors", tensors, meta


def test_table_as_a_problem(table_file):
    table = load_truth(table_file[0], teacher="abc")
    problem, X = table_problem(table), table.space.vectors()
    assert np.allclose(cross_score(problem, X), table.gap, rtol=1e-5, atol=1e-7), "here the gap is exactly the norm of the summed vectors"
    assert problem.costs([(0, 0, 0)])[0] == 13 and problem.gap((1, 1, 2)) == pytest.approx(float(table.gap[-1]))
    assert table.kept[0] == 1 and table.normalised[-1] == pytest.approx(table.gap[-1]/2)
    for eps in (0.5, 1.5):
        best = truth_front(problem.costs(X), problem.many(X), [eps])[0][0]
        for method in ("structured", "cross"): assert answer(problem, run_method(method, problem, [eps], 12), eps).cost == best


@pytest.mark.parametrize("damage, words", [("cut", "truncated"), ("teacher", "measured on teacher abc"), ("rows", "options are missing"), ("swaps", "single swaps"), ("part", "lacks gap_se"), ("header", "no truth table")])
def test_bad_tables_are_refused(table_file, damage, words):
    path, tensors, meta = table_file
    if damage == "cut": path.write_bytes(path.read_bytes()[:-40])
    elif damage == "rows": save_weights(path, tensors | dict(gap=tensors["gap"][:-1]), truth=json.dumps(meta))
    elif damage == "swaps": save_weights(path, tensors | dict(products=torch.zeros(4, 2, 2)), truth=json.dumps(meta))
    elif damage == "part": save_weights(path, {k: v for k, v in tensors.items() if k != "gap_se"}, truth=json.dumps(meta))
    elif damage == "header": save_weights(path, tensors)
    with pytest.raises(StoreError, match=words): load_truth(path, teacher="xyz" if damage == "teacher" else None)


def test_hypervolume_against_sampling():
    rng = np.random.default_rng(0)
    c, g = rng.random(20), rng.random(20)
    points = rng.random((200_000, 2))*0.8
    share = (points[:, None, 0] >= c).__and__(points[:, None, 1] >= g).any(1).mean()
    assert hypervolume(c, g, (0.8, 0.8)) == pytest.approx(0.64*share, abs=4e-3)
    assert hypervolume([*c, 0.0], [*g, np.nan], (0.8, 0.8)) == hypervolume(c, g, (0.8, 0.8))
