"""Search: optimality on tiny spaces, failures, resume, the tabular benchmark."""

import itertools
import json
import multiprocessing
from dataclasses import replace

import numpy as np
import pytest
import torch

import tocsr.search.methods
from tocsr.core.append_log import AppendOnlyLog, LogError
from tocsr.core.files import StoreError, save_weights
from tocsr.search.baselines import additive_search, fit_additive
from tocsr.search.comparison import (
    ExactFront,
    best_so_far,
    compare_seed,
    comparison_rows,
    evaluations_to,
    front_evaluations,
    hypervolume,
    quartiles,
    synthetic_comparison,
)
from tocsr.search.log import Evaluation, EvaluationLog, Trials, best_feasible
from tocsr.search.methods import SEARCH_METHODS, SearchMethod, register_search_method, run_method
from tocsr.search.space import (
    CostFunction,
    SearchError,
    SearchProblem,
    SearchSpace,
    check_grid,
    enumerate_space,
    evaluate_all,
    exact_front,
    propose_candidate,
    solve_milp,
    synthetic_problem,
    with_costs,
)
from tocsr.search.structured import lagrangian_relaxation, structured_search
from tocsr.search.tabular import (
    HEADER,
    QUANTITIES,
    Subspace,
    load_benchmark,
    substitution_vectors,
    tabular_problem,
)

EPS = [0.2, 0.5]
METHODS = list(SEARCH_METHODS)


def needs(method):
    if SEARCH_METHODS[method].unavailable:
        pytest.skip(SEARCH_METHODS[method].unavailable)


@pytest.fixture(scope="module")
def tiny():
    "27 architectures with interactions, and everything about them."
    problem = synthetic_problem(3, 3, "strong", seed=4)
    return problem, *evaluate_all(problem)


def sequence(done):
    return [
        (e.run, e.step, e.arch, e.cost, e.f_acc if np.isfinite(e.f_acc) else e.error) for e in done
    ]


# --- optimality


@pytest.mark.parametrize("method", ["random", "additive", "structured", "paper"])
def test_optimum_of_a_tiny_space_is_found_when_it_is_used_up(tiny, method):
    problem, X, costs, f_acc = tiny
    per_eps = SEARCH_METHODS[method].per_eps
    budget = 2 * len(X) if per_eps else len(X)
    done = run_method(method, problem, EPS, budget, seed=1, initial=25)
    optimum, _ = exact_front(costs, f_acc, EPS)
    assert [best_feasible(problem, done, e).cost for e in EPS] == pytest.approx(optimum)
    for run in {e.run for e in done}:
        archs = [e.arch for e in done if e.run == run]
        assert len(archs) == len(set(archs)), "an architecture was counted twice"


def test_structured_beats_random_where_the_optimum_is_known():
    regret = {m: [] for m in ("structured", "random")}
    for seed in range(3):
        problem = synthetic_problem(6, 3, "medium", seed)
        _, costs, f_acc = evaluate_all(problem)
        optimum = exact_front(costs, f_acc, [0.4])[0][0]
        for m in regret:
            done = run_method(m, problem, [0.4], 20, seed=seed)
            regret[m].append(best_so_far(problem, done, 0.4)[-1] / optimum - 1)
    assert np.mean(regret["structured"]) < 0.25 * np.mean(regret["random"])
    assert np.median(regret["structured"]) < 0.01


def test_front_in_one_run_shares_evaluations():
    problem = synthetic_problem(6, 3, "weak", 2)
    _, costs, f_acc = evaluate_all(problem)
    eps = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]
    done = structured_search(problem, eps, 40)
    assert len(done) == 40 and {e.run for e in done} == {"all"}
    found = np.array([best_feasible(problem, done, e).cost for e in eps])
    assert np.mean(found / exact_front(costs, f_acc, eps)[0] - 1) < 0.02


def test_exact_front_against_brute_force(tiny):
    _, _, costs, f_acc = tiny
    best, where = exact_front(costs, f_acc, EPS)
    for e, b, w in zip(EPS, best, where):
        assert b == min(c for c, g in zip(costs, f_acc) if g <= e) == costs[w]
    best, where = exact_front(np.array([1.0]), np.array([0.5]), [0.1])
    assert best[0] == np.inf and where[0] == -1


def test_integer_program_against_brute_force():
    rng = np.random.default_rng(0)
    for _ in range(10):
        cost = rng.random((4, 3))
        weight = rng.random((4, 3))
        bound = weight.min(1).sum() + rng.random()

        def total(table, a):
            return sum(table[s, o] for s, o in enumerate(a))

        vectors = itertools.product(range(3), repeat=4)
        within = [a for a in vectors if total(weight, a) <= bound]
        ranked = sorted(within, key=lambda a: total(cost, a))
        assert solve_milp(cost, [(weight, bound)]) == ranked[0]
        if len(ranked) > 2:
            assert solve_milp(cost, [(weight, bound)], ranked[:2]) == ranked[2]


def test_lagrangian_relaxation_stays_within_its_bounds(tiny):
    problem = tiny[0]
    for bound in (0.1, 0.5, 2.0):
        (a,) = lagrangian_relaxation(problem, problem.weights, [bound])
        assert sum(problem.weights[s, o] for s, o in enumerate(a)) <= bound


def test_additive_fit_corrects_one_wrong_score(tiny):
    problem = tiny[0]
    X = enumerate_space(problem.space)[1:]
    exact = problem.weights.copy()
    exact[1, 2] *= 4
    u = exact[np.arange(3), X].sum(1)
    fit = fit_additive(problem, X, u, ridge=1e-6)
    assert fit[np.arange(3), X].sum(1) == pytest.approx(u, rel=1e-3)


def test_ascent_equals_enumeration_on_a_smooth_score(tiny):
    problem, X, costs, _ = tiny
    for enumerate_all in (True, False):
        a = propose_candidate(
            lambda Y: -problem.costs(Y),
            problem,
            seen={tuple(X[costs.argmin()].tolist())},
            starts=X[:1],
            rng=np.random.default_rng(0),
            enumerate_all=enumerate_all,
        )
        assert problem.costs(a)[0] == np.sort(costs)[1]


# --- the paper's search: the fast path is BoTorch's


def test_fast_fit_reaches_the_optimum_of_botorch():
    from gpytorch.mlls import ExactMarginalLogLikelihood

    from tocsr.search import bayesian

    problem = synthetic_problem(4, 3)
    X = enumerate_space(problem.space)
    for seed in range(3):
        known = np.random.default_rng(seed).permutation(len(X))[:20]
        Z = bayesian.one_hot(problem.space, X[known])
        y = problem.evaluate_batch(X[known])
        public = bayesian.fit_gaussian_processes(Z, y).models[0]
        fast = bayesian._fit_hyperparameters(bayesian._new_gp(Z, y))
        values = []
        for model in (public, fast):
            model.train()
            mll = ExactMarginalLogLikelihood(model.likelihood, model)
            values.append(mll(model(*model.train_inputs), model.train_targets).item())
            model.eval()
        assert values[1] > values[0] - 0.02


def test_fast_posterior_and_acquisition_equal_botorch():
    from botorch.models import ModelListGP

    from tocsr.search import bayesian

    problem = synthetic_problem(4, 3)
    X = enumerate_space(problem.space)
    known = np.random.default_rng(0).permutation(len(X))[:20]
    Z = bayesian.one_hot(problem.space, X[known])
    targets = (problem.costs(X[known]), problem.evaluate_batch(X[known]))
    models = [bayesian._fit_hyperparameters(bayesian._new_gp(Z, y)) for y in targets]
    points = bayesian.one_hot(problem.space, X)
    cached = bayesian.cached_posterior(models).posterior(points[:, None])
    exact = ModelListGP(*models).posterior(points[:, None])
    assert torch.allclose(cached.mean, exact.mean, atol=1e-6)
    assert torch.allclose(cached.variance, exact.variance, rtol=1e-3, atol=1e-6)
    scores = [
        bayesian.constrained_improvement(m, 5.0, 0.3)(points)
        for m in (bayesian.cached_posterior(models), ModelListGP(*models))
    ]
    assert np.allclose(*scores, rtol=1e-4, atol=1e-4)


def test_both_paths_of_the_papers_search_propose_the_same():
    from tocsr.search.bayesian import bayesian_step

    problem = synthetic_problem(4, 3, seed=1)
    trials = Trials(problem, None, "paper", 0, "eps=0.3")
    for a in enumerate_space(problem.space)[np.random.default_rng(0).permutation(81)[:12]]:
        trials.evaluate(a)
    proposals = [
        bayesian_step(problem, trials, 0.3, np.random.default_rng(0), fast=fast)
        for fast in (True, False)
    ]
    assert proposals[0] == proposals[1]


# --- interruption and failures


@pytest.mark.parametrize(
    "method, kill",
    [*itertools.product([m for m in METHODS if m != "paper"], [0, 2, 7]), ("paper", 5)],
)
def test_interrupted_and_resumed_gives_the_same_sequence(tmp_path, method, kill):
    needs(method)
    problem = synthetic_problem(4, 3, "medium", 1)
    calls = itertools.count()

    def dying(a):
        if next(calls) == kill:
            raise KeyboardInterrupt
        return problem.f_acc(a)

    args = dict(eps=EPS, budget=12, seed=3, initial=4)
    path = tmp_path / "e.jsonl"
    with pytest.raises(KeyboardInterrupt):
        run_method(method, replace(problem, f_acc=dying), **args, log=EvaluationLog(path, "s"))
    assert len(path.read_text().splitlines()) == 1 + kill
    path.write_bytes(path.read_bytes() + b'{"method": "x", "se')  # interrupted while writing
    resumed = run_method(method, problem, **args, log=EvaluationLog(path, "s"))
    assert sequence(resumed) == sequence(run_method(method, problem, **args))
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(lines) == 1 + len(resumed) and lines[0] == {"signature": "s"}


def test_architectures_are_measured_once_and_counted_for_every_method():
    problem = synthetic_problem(3, 2, "weak", 0)
    measured = []

    def counting(a):
        measured.append(a)
        return problem.f_acc(a)

    log = EvaluationLog()
    shared = SearchProblem(problem.space, counting, problem.substitution_scores, 1.0)
    first = run_method("random", shared, [0.4], 8, log=log)
    second = run_method("structured", shared, [0.4], 8, log=log)
    assert len(first) == len(second) == 8 == len(measured) == len(set(measured))


@pytest.mark.parametrize("method", METHODS)
def test_failures_are_recorded_and_the_search_goes_on(method):
    needs(method)
    problem = synthetic_problem(4, 3, "medium", 1)
    budget = 14 if method == "paper" else 40  # its steps are slow

    def fragile(a):
        if a[0] == 1:
            raise RuntimeError("out of memory")
        return float("nan") if a[0] == 2 and a[1] == 2 else problem.f_acc(a)

    done = run_method(method, replace(problem, f_acc=fragile), EPS, budget, seed=0, initial=5)
    failed = [e for e in done if e.error]
    assert failed and all(np.isnan(e.f_acc) for e in failed)
    assert {e.error for e in failed} <= {"RuntimeError: out of memory", "f_acc is nan"}
    if method not in ("greedy", "tpe", "nsga2"):  # those may converge earlier
        assert len(done) == budget
    for e in EPS:
        assert best_feasible(problem, done, e).arch not in {f.arch for f in failed}


@pytest.mark.parametrize("method", METHODS)
def test_evaluations_that_always_fail_leave_the_teacher(method):
    needs(method)
    problem = synthetic_problem(3, 2, "weak", 0)
    done = run_method(method, replace(problem, f_acc=lambda a: float("inf")), [0.3], 6)
    assert all(e.error == "f_acc is inf" for e in done)
    assert best_feasible(problem, done, 0.3).message == "the teacher itself"


@pytest.mark.parametrize("method", ["paper", "additive", "structured"])
def test_a_space_without_teacher_reports_infeasible_eps(method):
    base = synthetic_problem(3, 3, "weak", 0)
    space = replace(base.space, has_teacher=False)
    problem = SearchProblem(
        space, lambda a: 0.5 + 0.5 * base.f_acc(a), base.substitution_scores, 1.0
    )
    done = run_method(method, problem, [0.1], 7, initial=4)
    best = best_feasible(problem, done, 0.1)
    assert len(done) == 7 and not best.feasible and best.arch is None
    assert best.f_acc == min(e.f_acc for e in done)
    assert "smallest feasible eps found" in best.message


def test_eps_zero_is_the_teacher_and_costs_nothing():
    problem = synthetic_problem(3, 2, "weak", 0)
    for method in ("paper", "additive", "structured"):
        done = run_method(method, problem, [0.0], 5)
        assert done == [] and best_feasible(problem, done, 0.0).arch == (0, 0, 0)


def test_a_run_without_random_start():
    problem = synthetic_problem(3, 2, "weak", 0)
    assert len(run_method("paper", problem, [0.3], 3, initial=0)) == 3


@pytest.mark.parametrize(
    "grid, words",
    [
        ([], "empty"),
        ([-0.1, 0.3], "negative"),
        ([0.3, 0.1], r"ascend.*\(0.1, 0.3\)"),
        ([0.1, 0.1], "ascend"),
        ([float("nan")], "finite"),
    ],
)
def test_bad_grids_are_refused_by_every_method(grid, words):
    problem = synthetic_problem(3, 2, "weak", 0)
    with pytest.raises(SearchError, match=words):
        check_grid(grid)
    for method in METHODS:
        if not SEARCH_METHODS[method].unavailable:
            with pytest.raises(SearchError, match=words):
                SEARCH_METHODS[method].run(problem, grid, 4)


def test_spaces_and_costs():
    stages = {"a": ("full", "half"), "b": ("full", "half", "none")}
    space = SearchSpace(stages, [(4, 2), (3, 1, 0)])
    assert space.vector(dict(a="half", b="none")) == (1, 2)
    assert space.name((1, 2)) == "a=half b=none"
    with pytest.raises(SearchError, match="no such architecture"):
        space.vector(dict(a="half", b="third"))


def test_cost_of_a_rare_combination_is_exact():
    "A saving that only one combination has, as when a whole level is removed, must not be missed."
    table = np.array([[4.0, 3.0, 2.0]] * 6)

    def cost(X):
        return table[np.arange(6), X].sum(1) - 5.0 * (X == 2).all(1)

    costs = CostFunction(SearchSpace({f"s{i}": ("a", "b", "c") for i in range(6)}, cost))
    assert costs([(2,) * 6, (2,) * 5 + (1,)]).tolist() == [7.0, 13.0]


def test_large_spaces_are_searched_without_enumeration():
    problem = synthetic_problem(38, 5, "medium", 0)
    done = structured_search(problem, [0.5], 12)
    assert problem.all_vectors is None and len(done) == 12
    best = best_feasible(problem, done, 0.5)
    assert best.cost < 0.9 * best_feasible(problem, [], 0.5).cost


def test_trials_count_an_architecture_once():
    trials = Trials(synthetic_problem(3, 2, "weak", 0), None, "m", 0)
    assert trials.evaluate((1, 0, 0)) is trials.evaluate(np.array([1, 0, 0])) and len(trials) == 1


def test_additive_search_is_deterministic():
    problem = synthetic_problem(4, 3, "medium", 1)
    runs = [sequence(additive_search(problem, EPS, 12, seed=seed)) for seed in (0, 1)]
    assert runs[0] == runs[1]


# --- the registry


def test_unknown_method_and_foreign_log(tmp_path):
    problem = synthetic_problem(3, 2, "weak", 0)
    with pytest.raises(SearchError, match="structured"):
        run_method("annealing", problem, [0.3], 4)
    EvaluationLog(tmp_path / "e.jsonl", "teacher a")
    with pytest.raises(SearchError, match="another space or teacher"):
        EvaluationLog(tmp_path / "e.jsonl", "teacher b")


def test_methods_without_their_package_say_so(monkeypatch):
    monkeypatch.setattr(tocsr.search.methods, "find_spec", lambda name: None)
    problem = synthetic_problem(3, 2, "weak", 0)
    required = [m for m in SEARCH_METHODS.values() if m.requires]
    assert required
    for method in required:
        with pytest.raises(SearchError, match=rf"{method.requires}.*tocsr\[search\]"):
            run_method(method.name, problem, [0.3], 4)


def test_adding_a_search_method_is_one_place():
    "A registered method runs in the comparison, its table and its figures."
    from tocsr.evaluation.search_figures import plot_front_regret, plot_regret

    def cheapest_first(problem, eps, budget, *, seed=0, log=None, initial=6):
        trials = Trials(problem, log, "cheapest", seed)
        X = problem.all_vectors
        for a in X[np.argsort(problem.costs(X))][:budget]:
            trials.evaluate(a)
        return trials.done

    register_search_method(SearchMethod("cheapest", "cheapest first", cheapest_first, "#123456"))
    try:
        curves = synthetic_comparison(1, ["random", "cheapest"], budget=8, stages=3)
        assert [r["method"] for r in comparison_rows(curves)] == ["random", "cheapest first"]
        problem = synthetic_problem(3, 2)
        _, costs, f_acc = evaluate_all(problem)
        front = ExactFront.from_values(costs, f_acc, [0.3, 0.6])
        one = compare_seed(
            "cheapest", problem, front, iterations=8, front_budget=8, seed=0, initial=2
        )
        assert len(one["to_1pct"]) == 2 and one["regret"][-1] == 0
        for fig in (plot_regret(curves), plot_front_regret({"cheapest": [one]})):
            assert "cheapest first" in [ax.get_title() for ax in fig.axes]
    finally:
        del SEARCH_METHODS["cheapest"]


# --- objectives and constraints


@pytest.fixture(scope="module")
def priced():
    "A small space with three quantities."
    problem = synthetic_problem(4, 3, "medium", 1)
    rng = np.random.default_rng(0)
    params = CostFunction(problem.space).table
    quantities = dict(params=params, latency=rng.random((4, 3)), macs=rng.random((4, 3)))
    return problem, quantities, *evaluate_all(problem)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("minimize", ["latency", {"params": 0.7, "macs": 0.3}])
def test_several_constraints_at_once(priced, method, minimize):
    needs(method)
    problem, quantities, X, _, f_acc = priced
    bounds = dict(params=0.9 * np.nanmax(quantities["params"], 1).sum(), latency=2.4)
    both = with_costs(problem, quantities, minimize=minimize, upper_bounds=bounds)
    done = run_method(method, both, [0.6], 81, seed=0, initial=5)
    ok = both.satisfies_constraints(X) & (f_acc <= 0.6)
    assert ok.any() and not both.satisfies_constraints([(0, 0, 0, 0)])[0]
    assert both.satisfies_constraints([e.arch for e in done]).all()
    best = best_feasible(both, done, 0.6)
    if method in ("additive", "structured", "random"):
        assert best.cost == pytest.approx(both.costs(X)[ok].min())
    elif method != "greedy":
        assert best.feasible


def test_bad_objectives_and_constraints(priced):
    problem, quantities, *_ = priced
    with pytest.raises(SearchError, match="watts.*params, latency, macs"):
        with_costs(problem, quantities, minimize="watts")
    with pytest.raises(SearchError, match="watts"):
        with_costs(problem, quantities, upper_bounds=dict(watts=3))
    for weight in (0.0, -1.0):
        with pytest.raises(SearchError, match="positive"):
            with_costs(problem, quantities, minimize={"params": weight})
    smallest = np.nanmin(quantities["params"], 1).sum()
    with pytest.raises(SearchError, match="smallest architecture has"):
        with_costs(problem, quantities, upper_bounds=dict(params=0.99 * smallest))
    space = SearchSpace({"x": ("0", "1"), "y": ("0", "1")}, [(1, 2), (1, 2)])
    two = SearchProblem(space, lambda a: 0.1, np.zeros((2, 2)))
    tables = dict(params=[(1, 2), (1, 2)], a=[(0, 1), (0, 1)], b=[(1, 0), (1, 0)])
    with pytest.raises(SearchError, match="together"):
        with_costs(two, tables, upper_bounds=dict(a=0.5, b=1.5))


# --- statistics of a comparison


def test_evaluations_to():
    problem = synthetic_problem(3, 2, "weak", 0)

    def make(i, cost, f_acc):
        return Evaluation("m", 0, "all", i, (i,), cost, f_acc)

    done = [make(0, 1.0, 0.9), make(1, 1.5, 0.2), make(2, 1.2, float("nan")), make(3, 1.3, 0.1)]
    teacher = float(problem.costs([(0, 0, 0)])[0])
    expected = [teacher, min(teacher, 1.5), min(teacher, 1.5), min(teacher, 1.3)]
    assert best_so_far(problem, done, 0.3).tolist() == expected
    assert evaluations_to(np.array([3.0, 2.1, 2.0]), 2.0, 0.05) == 2
    assert evaluations_to(np.array([3.0]), 2.0) == float("inf")


def test_hypervolume_against_sampling():
    rng = np.random.default_rng(0)
    c, g = rng.random((2, 20))
    points = rng.random((200_000, 2)) * 0.8
    dominated = ((points[:, None, 0] >= c) & (points[:, None, 1] >= g)).any(1).mean()
    assert hypervolume(c, g, (0.8, 0.8)) == pytest.approx(0.64 * dominated, abs=4e-3)
    with_nan = hypervolume([*c, 0.0], [*g, np.nan], (0.8, 0.8))
    assert with_nan == hypervolume(c, g, (0.8, 0.8))


def test_quartiles_of_runs_that_never_finish():
    q = quartiles([1, 2, 3, float("inf"), float("inf")])
    assert q["median"] == 3 and q["q75"] is None and q["low"] == 1 and q["high"] is None
    assert quartiles([4.0]) == dict(median=4, q25=4, q75=4, low=4, high=4)
    seeds = [dict(regret=[0.5, 0.1, 0.0]), dict(regret=[0.5, 0.4])]
    reach = front_evaluations(seeds, 0.1)
    assert reach["q25"] == 2 and reach["q75"] is None


# --- the append-only log


def test_log_continues_after_a_truncated_record(tmp_path):
    path = tmp_path / "log.jsonl"
    log = AppendOnlyLog(path, header=dict(of="a"))
    for i in range(3):
        log.append(dict(i=i))
    whole = path.read_bytes()
    for cut in range(len(whole)):
        path.write_bytes(whole[:cut])
        again = AppendOnlyLog(path, header=dict(of="a"))
        again.append(dict(i="new"))
        complete = max(0, whole[:cut].count(b"\n") - 1)
        expected = [dict(i=i) for i in range(complete)] + [dict(i="new")]
        assert list(AppendOnlyLog(path, header=dict(of="a"))) == expected, cut


def test_damaged_and_foreign_logs(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"i": 0}\nnot json\n{"i": 1}\n')
    with pytest.raises(LogError, match="log.jsonl, line 2"):
        AppendOnlyLog(path)
    assert [r["i"] for r in AppendOnlyLog(path, skip_unreadable=True)] == [0, 1]
    with pytest.raises(LogError, match="belongs to something else"):
        AppendOnlyLog(path, header=dict(of="a"), skip_unreadable=True)
    memory = AppendOnlyLog()
    memory.append([1])
    assert list(memory) == [[1]]


def _append_many(path, name, n):
    log = AppendOnlyLog(path, sync=False)
    for i in range(n):
        log.append([name, i, "x" * 5000])


def test_processes_append_whole_records(tmp_path):
    path = tmp_path / "log.jsonl"
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_append_many, args=(path, name, 40)) for name in "ab"]
    for w in workers:
        w.start()
    for w in workers:
        w.join()
    records = list(AppendOnlyLog(path))
    for name in "ab":
        assert [i for who, i, _ in records if who == name] == list(range(40))


# --- the tabular benchmark


@pytest.fixture
def table_file(tmp_path):
    "A table of 12 architectures whose f_acc is the sum of their substitutions'."
    space = Subspace({"E1": ("RA", "R"), "deepest": ("R-R-R", "none"), "D1": ("RA", "RR", "R")})
    vectors = substitution_vectors(space)
    scores = np.random.default_rng(0).random(len(vectors)).astype(np.float32)
    f_acc = [
        sum(r for r, v in zip(scores, vectors) if (v[v > 0] == a[v > 0]).all())
        for a in space.vectors()
    ]
    f_acc = torch.tensor(np.array(f_acc, dtype=np.float32))
    nan = float("nan")
    costs = torch.tensor([[4, 2, nan], [6, 0, nan], [3, 2, 1]], dtype=torch.float64)
    tensors = dict(
        f_acc=f_acc,
        f_acc_se=f_acc / 10,
        substitutions=torch.tensor(scores).repeat(4, 1),
        **{q: costs.clone() for q in QUANTITIES},
    )
    meta = dict(options=space.options, teacher="abc", latents=4)
    path = tmp_path / "tabular_benchmark.safetensors"
    save_weights(path, tensors, **{HEADER: json.dumps(meta)})
    return path, tensors, meta


def test_table_as_a_problem(table_file):
    table = load_benchmark(table_file[0], teacher="abc")
    problem = tabular_problem(table)
    X = table.space.vectors()
    sums = problem.weights[np.arange(3), X].sum(1)
    assert sums == pytest.approx(table.f_acc, rel=1e-5), "here f_acc is exactly the sum"
    assert problem.costs([(0, 0, 0)])[0] == 13
    assert problem.f_acc((1, 1, 2)) == pytest.approx(float(table.f_acc[-1]))
    for eps in (0.5, 1.5):
        best = exact_front(problem.costs(X), problem.evaluate_batch(X), [eps])[0][0]
        for method in ("structured", "additive"):
            done = run_method(method, problem, [eps], 12)
            assert best_feasible(problem, done, eps).cost == best


@pytest.mark.parametrize(
    "damage, words",
    [
        ("cut", "truncated"),
        ("teacher", "measured on teacher abc"),
        ("rows", "11 architectures, its options make 12"),
        ("substitutions", "2 substitutions, its options make 4"),
        ("part", "lacks f_acc_se"),
        ("header", "not a tabular benchmark"),
        ("missing", "no tabular benchmark at"),
    ],
)
def test_bad_tables_are_refused(table_file, damage, words):
    path, tensors, meta = table_file
    header = {HEADER: json.dumps(meta)}
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-40])
    elif damage == "rows":
        save_weights(path, tensors | dict(f_acc=tensors["f_acc"][:-1]), **header)
    elif damage == "substitutions":
        save_weights(path, tensors | dict(substitutions=torch.zeros(4, 2)), **header)
    elif damage == "part":
        save_weights(path, {k: v for k, v in tensors.items() if k != "f_acc_se"}, **header)
    elif damage == "header":
        save_weights(path, tensors)
    elif damage == "missing":
        path.unlink()
    with pytest.raises(StoreError, match=words):
        load_benchmark(path, teacher="xyz" if damage == "teacher" else None)


def test_installed_tables_are_checked(table_file, tmp_path):
    from tocsr.search.tabular import install_benchmark

    path, tensors, _ = table_file
    target = install_benchmark(path, tmp_path / "copy" / "table.safetensors")
    assert load_benchmark(target).f_acc.tolist() == tensors["f_acc"].tolist()
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(StoreError, match="truncated"):
        install_benchmark(path, tmp_path / "other.safetensors")
    assert not (tmp_path / "other.safetensors").exists()


@pytest.fixture(scope="module")
def measured():
    "A thin teacher of random weights, a small library and what they are measured on."
    from tocsr.core.config import UNetConfig
    from tocsr.models.diffusion import nano_unet, noise_schedule
    from tocsr.models.staged_unet import split_into_stages
    from tocsr.models.surrogates import build_library
    from tocsr.search.tabular import EvaluationBatch, parse_subspace
    from tocsr.stages.search_inputs import SearchInputs

    torch.manual_seed(0)
    thin = UNetConfig(channels=(32, 32, 32, 32), heads=(1, 1, 1, 1))
    teacher = split_into_stages(nano_unet(thin, 16).eval().requires_grad_(False))
    designs = dict(E1="R", E3="R", E4="R/2", D4="R", D3="RA", D1="R")
    library = build_library(teacher, {s: (d,) for s, d in designs.items()})
    for _, _, m in library:
        m.eval().requires_grad_(False)
    schedule = noise_schedule("v_prediction")
    z = torch.randn(12, 16, 8, 8)
    lines = ("E1: R", "E3: R", "deepest: R/2-none-R none", "D3: RA", "D1: R")
    space = parse_subspace(teacher, library, lines)
    inputs = SearchInputs(teacher, library, schedule, z)
    return inputs, space, EvaluationBatch.draw(teacher, schedule, z, 0)


def test_every_row_of_the_table_is_the_assembled_network(measured):
    from tocsr.models.surrogates import assemble
    from tocsr.search.fidelity import Fidelity
    from tocsr.search.tabular import evaluate_subspace

    inputs, space, batch = measured
    noise = torch.randn(inputs.latents.shape, generator=torch.Generator().manual_seed(0))
    fidelity = Fidelity(inputs.teacher, inputs.schedule, inputs.latents, t=batch.t, noise=noise)
    f_acc = evaluate_subspace(inputs.teacher, inputs.library, space, batch).mean(1)
    assert len(f_acc) == space.size == 48
    for i in range(1, 48, 5):
        net = assemble(inputs.teacher, inputs.library, space.architecture(space.vectors()[i]))
        assert f_acc[i].item() == pytest.approx(fidelity(net).mean, rel=1e-3), i


def test_bad_subspaces_are_refused(measured):
    from tocsr.models.architecture import StageError
    from tocsr.search.tabular import EvaluationBatch, parse_subspace

    inputs = measured[0]
    for line, words in (
        ("E9: R", "E9"),
        ("E1: RRR", "no E1 RRR"),
        ("deepest: R-R", "wrong number"),
    ):
        with pytest.raises(StageError, match=words):
            parse_subspace(inputs.teacher, inputs.library, (line,))
    with pytest.raises(StageError, match="needs 11"):
        EvaluationBatch.draw(inputs.teacher, inputs.schedule, inputs.latents[:4], 0)


def test_an_interrupted_table_goes_on_where_it_was(measured, tmp_path, monkeypatch):
    import tocsr.stages.tabular_benchmark as tabular
    from tocsr.core.config import get_profile
    from tocsr.core.store import Run

    inputs, space, batch = measured
    run = Run(get_profile("smoke"), tmp_path / "result", tmp_path / "scratch", {})
    run.scratch.mkdir()
    original = tabular.evaluate_subspace
    whole = original(inputs.teacher, inputs.library, space, batch)
    calls = []

    def dying(*args, **kwargs):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(args)
        return original(*args, **kwargs)

    def counting(*args, **kwargs):
        calls.append(args)
        return original(*args, **kwargs)

    monkeypatch.setattr(tabular, "evaluate_subspace", dying)
    with pytest.raises(KeyboardInterrupt):
        tabular.measure_chunks(run, inputs, space, batch)
    monkeypatch.setattr(tabular, "evaluate_subspace", counting)
    errors, _ = tabular.measure_chunks(run, inputs, space, batch)
    assert len(calls) == 4, "a finished chunk was measured again"
    assert torch.allclose(errors, whole, rtol=1e-4, atol=1e-9)
    tabular.check_against_assembled(inputs, space, batch, errors, n=4)


# --- the choice


def test_choice_of_the_architecture():
    from tocsr.stages.architecture_search import choose_architecture

    def row(method, params, feasible=True):
        return dict(method=method, feasible=feasible, params=params, f_acc=0.1, eps=params)

    rows = [row("paper", 90.0), row("ours", 80.0), row("ours", 110.0), row("ours", 1, False)]
    assert choose_architecture(rows, 100, "ours")["params"] == 80
    assert choose_architecture(rows, 100, "paper")["params"] == 90
    nearest = choose_architecture(rows, 50, "ours")
    assert nearest["params"] == 80 and "Larger eps" in nearest["note"]
    rows += [row("ours", 101.0)]
    assert choose_architecture(rows, 100, "ours", "nearest")["params"] == 101
    assert not choose_architecture(rows, 100, "ours", "nearest")["within_budget"]
    assert choose_architecture(rows, 100, "ours")["params"] == 80
    with pytest.raises(SearchError, match="search.select"):
        choose_architecture(rows, 100, "ours", "largest")
    with pytest.raises(SearchError, match="random found no feasible"):
        choose_architecture(rows, 100, "random")


def test_keys_follow_the_code_of_every_method():
    "A stage's key changes with the code and the constants of any registered method."
    import tocsr.search.structured as structured
    from tocsr.core.fingerprint import source_hash
    from tocsr.stages.search_comparison import run_compare

    def other(problem, eps, budget, *, seed=0, log=None, initial=6):
        return []

    before = source_hash(run_compare)
    greedy = SEARCH_METHODS["greedy"]
    scales = structured.LOG_SD
    try:
        register_search_method(replace(greedy, run=other))
        another_method = source_hash(run_compare)
        register_search_method(greedy)
        structured.LOG_SD = 2 * scales
        another_constant = source_hash(run_compare)
    finally:
        register_search_method(greedy)
        structured.LOG_SD = scales
    assert len({before, another_method, another_constant}) == 3
    assert source_hash(run_compare) == before
