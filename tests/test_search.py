"""Search: optimality on tiny spaces, faults, resume."""
import itertools
import json
import time

import numpy as np
import pytest

from tocsr.search import (METHODS, Costs, Evaluation, Journal, Problem, SearchError, SearchSpace, Tape, additive_search, answer, best_so_far,
                          check_grid, enumerate_space, evaluations_to, fit_additive, integer_programme, knapsack, measure_all, run_method,
                          structured_search, synthetic_problem, truth_front)

EPS = [0.2, 0.5]


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
    problem = synthetic_problem(4, 3, "medium", 1)
    calls = itertools.count()

    def dying(a):
        if next(calls) == kill: raise KeyboardInterrupt
        return problem.gap(a)
    args = dict(eps=EPS, budget=12, seed=3, initial=4)
    path = tmp_path/"e.jsonl"
    with pytest.raises(KeyboardInterrupt):
        run_method(method, Problem(problem.space, dying, problem.proxy, 1.0), **args, journal=Journal(path, "s"))
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
    problem = synthetic_problem(4, 3, "medium", 1)

    budget = 14 if method == "paper" else 40  # its steps are slow

    def fragile(a):
        if a[0] == 1: raise RuntimeError("out of memory")
        return float("nan") if a[0] == 2 and a[1] == 2 else problem.gap(a)
    done = run_method(method, Problem(problem.space, fragile, problem.proxy, 1.0), EPS, budget, seed=0, initial=5)
    failed = [e for e in done if e.error]
    assert failed and all(np.isnan(e.gap) for e in failed)
    assert {e.error for e in failed} <= {"RuntimeError: out of memory", "gap is nan"}
    if method != "greedy": assert len(done) == budget
    assert all(answer(problem, done, e).arch not in {f.arch for f in failed} for e in EPS)


@pytest.mark.parametrize("method", list(METHODS))
def test_a_gap_that_always_fails_ends_with_the_teacher(method):
    problem = synthetic_problem(3, 2, "weak", 0)
    done = run_method(method, Problem(problem.space, lambda a: float("inf"), problem.proxy, 1.0), [0.3], 6)
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
