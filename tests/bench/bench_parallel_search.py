"""What parallel evaluation costs: evaluations to 1% of the optimum for 1, 2, 4 and 8 workers.

python tests/bench/bench_parallel_search.py --out tests/bench/parallel_search.json

Every run searches the bundled tabular benchmark for one eps, with 40 evaluations, by simulated
workers (`tocsr.search.parallel.simulate_workers`): a worker takes the next proposal as soon as its
evaluation is finished, and an evaluation takes between half and one and a half units of time.
"""

import argparse
import time
from pathlib import Path

import numpy as np

from tocsr.core.files import file_hash, write_json
from tocsr.core.store import machine
from tocsr.search.comparison import best_so_far, evaluations_to, quartiles
from tocsr.search.parallel import search_runs, simulate_workers
from tocsr.search.space import enumerate_space, exact_front
from tocsr.search.tabular import bundled_benchmark, load_benchmark, tabular_problem

BUDGET = 40
WORKERS = (1, 2, 4, 8)
METHODS = ("paper", "structured", "additive")
EPS = (0.02, 0.05, 0.1, 0.2)  # the middle half of the comparison's grid, times the paper's vector
COLUMNS = ("method", "workers", "evaluations (quartiles)", "time", "solved", "speed-up")


def run_one(problem, method: str, eps: float, optimum: float, *, workers: int, seed: int):
    "(evaluations, simulated time) to within 1%; both infinite if 40 evaluations do not reach it."
    runs = search_runs(method, problem, [eps], BUDGET, seed=seed)
    trials = runs[0].trials

    def solved() -> bool:
        return np.isfinite(evaluations_to(best_so_far(problem, trials.done, eps), optimum))

    rng = np.random.default_rng([seed, workers])
    duration = simulate_workers(runs, problem, workers, rng, stop=solved)
    return (len(trials), duration) if solved() else (np.inf, np.inf)


def bench(seeds: int, methods=METHODS, workers=WORKERS, eps=EPS) -> list[dict]:
    "One row per method and number of workers, over eps and seeds."
    table = load_benchmark()
    rows = []
    for method in methods:
        for q in workers:
            start = time.process_time()
            found = []
            for seed in range(seeds):
                rng = np.random.default_rng([0, 17, seed])  # substitution scores of this seed
                problem = tabular_problem(table, rng)
                costs = problem.costs(enumerate_space(problem.space))
                f_acc = np.append(0.0, table.f_acc[1:])
                for e in eps:
                    absolute = e * table.meta["paper_f_acc"]
                    optimum = exact_front(costs, f_acc, [absolute])[0][0]
                    found.append(run_one(problem, method, absolute, optimum, workers=q, seed=seed))
            evaluations, durations = np.array(found).T
            rows.append(
                dict(
                    method=method,
                    workers=q,
                    runs=len(found),
                    evaluations=quartiles(evaluations),
                    time=quartiles(durations),
                    solved=float(np.isfinite(evaluations).mean()),
                    cpu_seconds=round(time.process_time() - start, 1),
                )
            )
            print(rows[-1], flush=True)
    return rows


def markdown(rows: list[dict]) -> str:
    "The table with one line per method and number of workers."
    lines = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    first = {r["method"]: r["time"]["median"] for r in rows if r["workers"] == 1}
    for r in rows:
        e = {k: f">{BUDGET}" if v is None else f"{v:g}" for k, v in r["evaluations"].items()}
        one, now = first.get(r["method"]), r["time"]["median"]
        speed_up = f"{one / now:.1f}" if one and now else "-"
        duration = "-" if now is None else f"{now:.1f}"
        counts = f"{e['median']} ({e['q25']} to {e['q75']})"
        cells = (r["method"], r["workers"], counts, duration, f"{r['solved']:.0%}", speed_up)
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="JSON; a Markdown table is written next to it")
    args = parser.parse_args()
    rows = bench(args.seeds)
    print(markdown(rows))
    if args.out:
        result = dict(
            table=file_hash(bundled_benchmark()),
            machine=machine(),
            seeds=args.seeds,
            eps=EPS,
            budget=BUDGET,
            rows=rows,
        )
        write_json(args.out, result)
        args.out.with_suffix(".md").write_text(markdown(rows))


if __name__ == "__main__":
    main()
