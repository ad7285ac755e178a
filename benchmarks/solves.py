"""Products, time and memory of solving (G + damping I) x = b with Gauss-Newton matrices, by this library and others.

    python benchmarks/solves.py [--only solve,condition,curvlinops,egn,influence] [--rounds 2] [--threads 2] [--quick]

Writes benchmarks/results/solves_cpu.json, where the questions not asked stay, and prints its tables; below them what
was set out for, and whether it is reached. G is that of the embedded digits networks on their training data, in
float32; b its gradient, or the gradients of held-out digits, together. Damping is relative to the largest eigenvalue.
All contenders of a table answer once a round, in random order; where an answer takes long there are fewer rounds. The
questions:

    solve       until the recomputed residual is `rtol` of b. A preconditioner is the inverse of an approximation of G
                with `factor` times the damping of the system, the best of those in `WAYS`; it is stopped after 1.25
                times as many steps as plain conjugate gradients take. `setup` are products for the approximation, or
                of LiSSA for its scale; `of_cg` is all of them over those of plain CG. `residual` is the largest, in
                float64; `error` |x - x*| / |x*|, with x* by CG until float32 goes no further
    condition   eigenvalues of the preconditioned matrix at both ends: why it takes so many steps
    others      see `solve_contenders.py`

What is recycled are directions of CG for the system at the parameters before a training step, or of half of the data,
which had to be solved anyway: its products do not count here. curvlinops and pyDVL (`pip install -c constraints.txt
"pydvl[influence]"`, which wants NumPy 1) are optional.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import random
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import solve_contenders
import torch
from measure import machine, rounded
from problems import Batch
from rich.console import Console
from rich.table import Table
from solve_contenders import Rows, attempted, timed
from torch import Tensor

import curvature as cv
from curvature.assets import data
from curvature.assets.make import TRAINING_DIGITS

RESULTS = Path(__file__).parent / "results"
SHARES = (1e-2, 1e-3, 1e-4)  # dampings over the largest eigenvalue
PLAIN = "CG"
PATIENCE = 1.25  # times the steps of CG
WINDOW, MINI_BATCH = 256, 64
RANK = 256  # of an approximation, at most
RECYCLED = 128
ROUGH = 0.03  # of an eigenvalue
STEP = 0.1  # the length of a training step
SMALL = 250  # examples in a batch for LiSSA
EXACT = 40  # steps, preconditioned, to where float32 goes no further


@dataclass(frozen=True)
class System:
    """(G + damping I) X = B, one right-hand side (n,) or several (n, k), for the GGN of an objective and its data."""

    problem: str
    objective: cv.Objective
    pair: Batch
    G: cv.LinearOperator
    G64: cv.LinearOperator  # in float64
    b: Tensor
    largest: float
    share: float
    rtol: float

    @property
    def damping(self) -> float:
        return self.share * self.largest

    @property
    def sides(self) -> int:
        return 1 if self.b.ndim == 1 else self.b.shape[1]

    @cached_property
    def x(self) -> Tensor:
        """As exact as float32 gets."""
        preconditioner = cv.inverse(nystrom(self).matrix, damping=self.damping)
        options = {"damping": self.damping, "preconditioner": preconditioner, "rtol": 0.0, "max_steps": EXACT}
        return cv.solve(self.G, self.b, **options).x

    def residual(self, x: Tensor) -> float:
        """The largest, relative."""
        x, b = x.double(), self.b.double()
        return float(((b - self.G64 @ x - self.damping * x).norm(dim=0) / b.norm(dim=0)).max())

    def error(self, x: Tensor) -> float:
        return float((x - self.x).norm() / self.x.norm()) if self.sides == 1 else math.nan


class Approximation(NamedTuple):
    """A matrix that resembles G, and the products with G that it took."""

    matrix: cv.LinearOperator
    products: int = 0


class Found(NamedTuple):
    """An answer; the products it took, and those before it; how many right-hand sides it calls solved, and the steps of
    the slowest."""

    x: Tensor
    products: int
    setup: int
    solved: int
    steps: int

    @classmethod
    def of(cls, solution: cv.Solution) -> Found:
        return cls(solution.x, solution.cost.products, 0, int(solution.converged.sum()), int(solution.steps.max()))


class Attempt(NamedTuple):
    """What was found with a factor of the damping, and the seconds it took."""

    found: Found
    seconds: float
    setup_seconds: float


@dataclass(frozen=True)
class Way:
    """How a system is answered: `answer(system, preconditioner, steps of plain CG)`, after an approximation is made."""

    answer: Callable[[System, cv.LinearOperator | None, int], Found]
    approximate: Callable[[System], Approximation] | None = None
    factors: tuple[float, ...] = (1.0,)  # of the damping, to be put into the preconditioner


@dataclass
class Row:
    """What was found of a way to answer a system."""

    problem: str
    sides: int
    damping: float
    rtol: float
    method: str
    factor: float = math.nan
    products: int = 0
    setup: int = 0
    of_cg: float = math.nan
    solved: int = 0
    residual: float = math.nan
    error: float = math.nan
    seconds: list[float] = field(default_factory=list)  # of each round, as all lists
    setup_seconds: list[float] = field(default_factory=list)
    tried: dict[str, list[int]] = field(default_factory=dict)  # factor -> products, solved


# --- approximations of G


def nystrom(system: System) -> Approximation:
    try:
        found = cv.nystrom(system.G, damping=system.damping, max_rank=RANK)
    except cv.NotConverged as error:  # which is of use all the same
        found = error.solution
    return Approximation(found, len(found.values))


def diagonal(system: System) -> Approximation:
    return Approximation(cv.ggn_diagonal(system.objective))


def kronecker(make: Callable[..., cv.LinearOperator], system: System) -> Approximation:
    return Approximation(make(system.objective, fisher="type-2"))


def window(batch_size: int, system: System) -> Approximation:
    size = min(WINDOW, len(system.pair[0]))
    return Approximation(cv.gradient_window(system.objective, size, batch_size=batch_size).fisher)


def recycled(earlier: Callable[[System], cv.Objective], system: System) -> Approximation:
    """What the directions of an earlier system tell, which had to be solved anyway."""
    objective = earlier(system)
    options = {"damping": system.damping, "rtol": system.rtol, "recycle": RECYCLED}
    found = attempted(cv.ggn(objective), objective.gradient(), **options).recycled
    assert found is not None
    return Approximation(found)


def step_before(system: System) -> cv.Objective:
    objective = system.objective
    return objective.at(objective.position + STEP * objective.gradient())


def half_of_data(system: System) -> cv.Objective:
    return system.objective.first(len(system.pair[0]) // 2)


# --- answers


def iterated(method: Any, system: System, preconditioner: cv.LinearOperator | None, steps: int) -> Found:
    """Until solved; with a preconditioner not for ever."""
    options: dict[str, Any] = {"damping": system.damping, "rtol": system.rtol, "method": method}
    if preconditioner is not None:
        options |= {"preconditioner": preconditioner, "max_steps": math.ceil(PATIENCE * steps)}
    return Found.of(attempted(system.G, system.b, **options))


def truncated(system: System, preconditioner: cv.LinearOperator | None, steps: int) -> Found:
    """The Neumann series with as many terms as CG takes steps."""
    options = {"damping": system.damping, "method": "neumann", "rtol": 0.0, "max_steps": steps}
    return Found.of(cv.solve(system.G, system.b, **options))


def lissa(system: System, preconditioner: cv.LinearOperator | None, steps: int) -> Found:
    """Two repeats that together read the data as often as CG does."""
    objective = system.objective.on(system.pair, batch_size=SMALL)
    parts = math.ceil(len(system.pair[0]) / SMALL)
    options = {"damping": system.damping, "steps": steps * parts // 2, "repeats": 2}
    estimate = cv.lissa(cv.ggn, objective, system.b, **options)
    return Found(estimate.value, steps, estimate.cost.passes - steps, 0, steps)


CG = partial(iterated, "cg")
MORE = (10.0, 100.0)
WAYS = {
    PLAIN: Way(CG),
    "MINRES": Way(partial(iterated, "minres")),
    "CG, Nystrom": Way(CG, nystrom),
    "CG, diagonal": Way(CG, diagonal),
    "CG, diagonal, more damping": Way(CG, diagonal, MORE),
    "CG, K-FAC": Way(CG, partial(kronecker, cv.kfac)),
    "CG, K-FAC, more damping": Way(CG, partial(kronecker, cv.kfac), MORE),
    "CG, EKFAC": Way(CG, partial(kronecker, cv.ekfac)),
    "CG, EKFAC, more damping": Way(CG, partial(kronecker, cv.ekfac), MORE),
    "CG, M-FAC of examples": Way(CG, partial(window, 1)),
    f"CG, M-FAC of batches of {MINI_BATCH}": Way(CG, partial(window, MINI_BATCH), (1 / MINI_BATCH,)),
    "CG, recycled, a step before": Way(CG, partial(recycled, step_before), (1.0, 10.0)),
    "CG, recycled, half of the data": Way(CG, partial(recycled, half_of_data), (1.0, 10.0)),
    "Neumann series": Way(truncated),
    "LiSSA": Way(lissa),
}
OF_BATCHES = f"CG, M-FAC of batches of {MINI_BATCH}"
SEVERAL = (PLAIN, "CG, Nystrom", OF_BATCHES)  # for several right-hand sides
AIMED = ("CG, Nystrom", "CG, K-FAC, more damping", "CG, EKFAC, more damping", OF_BATCHES)
CONDITIONED = {name: WAYS[name] for name in ("CG, Nystrom", "CG, K-FAC", "CG, K-FAC, more damping")}


# --- measuring


def systems(quick: bool) -> Iterator[System]:
    """Those of both networks, for one and several right-hand sides, at all dampings."""
    pixels, labels = data.digits()
    few, many = (64, 2) if quick else (TRAINING_DIGITS, 16)
    cases = (("digits", few, 0, 1e-4), ("digits", few, many, 1e-4), ("digits-cnn", few, 0, 1e-4),
             ("digits-cnn", few // 5, many, 1e-3))  # fmt: skip
    for name, examples, sides, rtol in cases[::3] if quick else cases:
        pair = pixels[:examples], labels[:examples]
        objective = cv.demo(name).on(pair, batch_size=math.ceil(examples / 2))
        held_out = slice(TRAINING_DIGITS, TRAINING_DIGITS + sides)
        tests = objective.on((pixels[held_out], labels[held_out]))
        b = cv.example_gradients(tests).T.contiguous() if sides else objective.gradient()
        G, G64 = cv.ggn(objective), cv.ggn(objective.to(dtype=torch.float64))
        largest = float(cv.eigsh(G, 1).values[0])
        problem = name if examples == few else f"{name}, {examples} digits"
        for share in SHARES[:1] if quick else SHARES:
            yield System(problem, objective, pair, G, G64, b, largest, share, rtol)


def attempt(system: System, way: Way, factor: float, steps: int) -> Attempt:
    """Make the preconditioner, if there is one, and answer."""

    def prepared() -> tuple[cv.LinearOperator | None, int]:
        if way.approximate is None:
            return None, 0
        approximation = way.approximate(system)
        return cv.inverse(approximation.matrix, damping=factor * system.damping), approximation.products

    gc.collect()
    (preconditioner, products), setup_seconds = timed(prepared)
    found, seconds = timed(lambda: way.answer(system, preconditioner, steps))
    return Attempt(found._replace(setup=found.setup + products), seconds, setup_seconds)


def measured(system: System, rounds: int) -> list[Row]:
    """The rows of a system. All factors are tried in the first round, and the best stays."""
    ways = {name: WAYS[name] for name in SEVERAL} if system.sides > 1 else WAYS
    rows = {name: Row(system.problem, system.sides, system.share, system.rtol, name) for name in ways}
    steps = products = 0
    for seed in range(rounds):
        others = [name for name in ways if name != PLAIN]
        random.Random(seed).shuffle(others)
        for name in (PLAIN, *others):
            row, way = rows[name], ways[name]
            factors = way.factors if seed == 0 else (row.factor,)
            tries = {factor: attempt(system, way, factor, steps) for factor in factors}
            best = min(tries, key=lambda factor: (-tries[factor].found.solved, tries[factor].found.products))
            found = tries[best].found
            row.seconds.append(tries[best].seconds)
            row.setup_seconds.append(tries[best].setup_seconds)
            if seed > 0:
                continue
            if name == PLAIN:
                steps, products = found.steps, found.products
            row.factor, row.products, row.setup, row.solved = best, found.products, found.setup, found.solved
            row.of_cg = (found.products + found.setup) / products
            row.residual, row.error = system.residual(found.x), system.error(found.x)
            if len(tries) > 1:
                row.tried = {
                    f"{f:g}": {"products": a.found.products, "solved": a.found.solved} for f, a in tries.items()
                }
    return list(rows.values())


def conditions(system: System) -> list[dict[str, Any]]:
    """Eigenvalues at both ends of P^(1/2) (G + damping I) P^(1/2) for preconditioners P, and of G + damping I."""
    rows = []
    for name, factor, way in [(PLAIN, 1.0, None), *((n, f, w) for n, w in CONDITIONED.items() for f in w.factors)]:
        root: cv.LinearOperator = cv.identity(system.G.domain)
        if way is not None and way.approximate is not None:
            root = cv.power(way.approximate(system).matrix, -0.5, damping=factor * system.damping)

        def product(rows: Tensor, root: cv.LinearOperator = root) -> Tensor:
            halves = root.apply(rows)
            return root.apply(system.G.apply(halves) + system.damping * halves)

        A = cv.MatrixFree(product, system.G.domain, psd=True)
        ends = [float(cv.eigsh(A, 1, which=which, rtol=ROUGH).values[0]) for which in ("smallest", "largest")]
        row = {"problem": system.problem, "damping": system.share, "preconditioner": name, "put in": factor}
        rows.append(row | {"smallest": ends[0], "largest": ends[1], "condition": ends[1] / ends[0]})
    return rows


# --- tables


def table(title: str, rows: Sequence[dict[str, Any]]) -> Table:
    """What the rows say, but for lists and what is in them."""
    shown = Table(title=title, title_justify="left")
    columns = [name for name, value in rows[0].items() if not isinstance(value, list | dict)]
    for column in columns:
        shown.add_column(column, justify="left" if isinstance(rows[0][column], str) else "right")
    for row in rows:
        shown.add_row(*(figure(row[column]) for column in columns))
    return shown


def figure(value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    return "" if math.isnan(value) else f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


@dataclass(frozen=True)
class Target:
    """What was set out for: a figure of at least `least`."""

    what: str
    least: float
    figure: float

    @property
    def met(self) -> bool:
        return self.figure >= self.least


def solved(quick: bool, rounds: int) -> Iterator[tuple[str, Rows]]:
    """The rows of every system."""
    for system in systems(quick):
        rows = measured(system, rounds if system.problem == "digits" else (rounds + 1) // 2)
        title = f"{system.problem}, {system.sides} right-hand sides, damping {system.share:g}, residual {system.rtol:g}"
        yield title, [summary(row) for row in rows]


def conditioned(quick: bool, rounds: int) -> Iterator[tuple[str, Rows]]:
    """The eigenvalues on a quarter of the data, and of the middle damping."""
    of_several = [system for system in systems(quick) if system.sides > 1]
    for system in of_several[1::3] or of_several:
        yield f"preconditioned eigenvalues, {system.problem}, damping {system.share:g}", conditions(system)


QUESTIONS: dict[str, Callable[[bool, int], Iterator[tuple[str, Rows]]]] = {
    "solve": solved,
    "condition": conditioned,
    "curvlinops": solve_contenders.curvlinops,
    "egn": solve_contenders.egn,
    "influence": solve_contenders.influence,
}


def summary(row: Row) -> dict[str, Any]:
    """The row as it is written: medians, and the rounds that they are of."""
    lists = {"rounds": row.seconds, "setup_rounds": row.setup_seconds}
    medians = {"seconds": median(row.seconds), "setup_seconds": median(row.setup_seconds)}
    return {**asdict(row), **medians, **lists}


def targets(question: str, rows: Rows) -> list[Target]:
    """Those that the rows of a question tell about."""
    found: list[Target] = []
    if question == "solve":
        for row in rows:
            if row["problem"].startswith("digits-cnn") and row["method"] in AIMED:
                system = f"{row['problem']}, {row['sides']} sides, damping {row['damping']:g}"
                alone = row["products"] / (row["products"] + row["setup"])
                found.append(Target(f"{system}: products of CG over {row['method']}", 5, 1 / (row["of_cg"] * alone)))
                found.append(Target(f"{system}: with its set-up", 5, 1 / row["of_cg"]))
    if question == "curvlinops":
        for row in rows:
            if row["contender"] == "curvlinops" and row["dtype"] == "float32":
                what = f"{row['problem']}, {row['sides']} sides, {row['method']}: seconds of curvlinops over ours"
                found.append(Target(what, 1, row["of ours"]))
    if question == "egn":
        for row in rows[1:]:
            found.append(Target(f"memory of the whole Jacobian over {row['way']}", 5, 1 / row["of its memory"]))
    return found


def goals(reached: list[Target]) -> Table:
    """What was set out for, and what was found."""
    rows = [{"what": t.what, "at least": t.least, "found": t.figure, "met": "yes" if t.met else "no"} for t in reached]
    return table("set out for", rows)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", default=",".join(QUESTIONS))
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="small problems: whether everything runs")
    parser.add_argument("--out", type=Path, default=RESULTS / "solves_cpu.json")
    parser.add_argument("--one", nargs=2, default=None, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    warnings.filterwarnings("ignore")
    if args.one is not None:
        print(json.dumps(solve_contenders.alone(args.one[0], args.quick, args.one[1])))
        return
    console, rounds = Console(width=190), 1 if args.quick else args.rounds
    report = json.loads(args.out.read_text()) if args.out.exists() else {}
    for question in args.only.split(","):
        rows: Rows = []
        started = time.perf_counter()
        for title, more in QUESTIONS[question](args.quick, rounds):
            console.print(table(title, more))
            rows += more
            reached = targets(question, rows)
            report[question] = {
                "machine": machine(torch.device("cpu")),
                "quick": args.quick,
                "rounds": rounds,
                "seconds": time.perf_counter() - started,
                "rows": rounded(rows),
                "targets": rounded([{**asdict(target), "met": target.met} for target in reached]),
            }
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps(report, indent=1) + "\n")
        if rows and reached:
            console.print(goals(reached))


if __name__ == "__main__":
    main()
