"""Time, products and passes to a given true accuracy: traces, top eigenvalues and spectral densities of Hessians.

    python benchmarks/estimators.py [--only trace,eigsh,density,large] [--rounds 3] [--threads 1] [--quick]

Writes benchmarks/results/estimators_cpu.json, where the questions not asked stay, and prints its tables. First every
contender looks for its cheapest setting that is accurate enough, on matrices whose eigenvalues are known: five made of
random eigenvectors, and the float64 Hessian of a small trained network, by plain torch. Then all contenders make their
operator and answer, once a round, in random order: of the small network in float32, by their own products; of a made
matrix by dense ones. Larger networks have no dense matrix: there the work is equal, in half as many rounds, and the
error is that of the trace, or of the largest node of the density. Columns:

    setting    the cheapest accurate one
    products   with the matrix, as counted in the search
    error      there: rms over seeds of a trace, the worst of the ten eigenvalues and of the seeds, the mean distance of
               Kolmogorov between the densities
    coverage   of the 95 % interval of a trace, where there is one
    seconds    of making the operator and of the answer; passes over the data meanwhile; error of what was timed
    of ours    that time over ours in the same round: above 1 where we are faster

One thread is timed by its processor time. Below the tables: what this library set out to reach, and whether it has.
The other libraries are optional, as in `operators.py`; beside those, `pip install -c constraints.txt skerch matfree
jax`.
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
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np
import torch
from contenders import Lacks
from demo_accuracy import kolmogorov
from estimator_contenders import DENSITIES, MATFREE, OURS, SKERCH, TOP, TOPS, TRACES, Columns, Known, Way, extreme
from measure import Clock, machine, rounded
from operators import failure
from problems import Loader, MeanCrossEntropy, Problem, problem_of, reference
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap

import curvature as cv
from curvature.assets import data
from curvature.assets.make import TRAINING_DIGITS, draw, fit_, initial

RESULTS = Path(__file__).parent / "results"
CLOSE = {"trace": 0.01, "eigsh": 1e-3, "density": 0.02}  # what is accurate enough
SEEDS = {"trace": 40, "eigsh": 5, "density": 2}
FIRST = {"trace": 24, "density": 12}  # where a search starts
LONGEST = {"trace": 2, "density": 8}  # and the share of all rows where it ends
PROBES = 10
MERGED = (1e-5, 1e-12)  # of the largest eigenvalue: what float32, for networks, and float64 do not tell from zero
DEAR = 1000  # products beyond which an average is not timed
LARGE = "large"  # the question of equal work on large networks
WAYS = {"trace": TRACES, "eigsh": TOPS, "density": DENSITIES}
EQUAL = ("curvature", "curvature, control", "curvlinops, xtrace", "PyHessian, hutchinson",
         "hessian-eigenthings, hutch++", "skerch, xtrace")  # fmt: skip


@dataclass(frozen=True)
class Subject:
    """A symmetric matrix: the Hessian of a network on data in so many batches, or one that is made; its eigenvalues,
    ascending, where they are known, with what multiplies with it in float64."""

    name: str
    problem: Problem | None = None
    batches: int = 1
    dense: Tensor | None = None
    exact: Tensor | None = None
    control: cv.LinearOperator | None = None
    trace: float = math.nan
    largest: float = math.nan

    @property
    def known(self) -> Known:
        assert self.dense is not None
        return Known.of(self.dense, self.control)

    @property
    def merged(self) -> float:
        return MERGED[0] if self.problem else MERGED[1]

    def loader(self) -> Loader:
        if self.problem is None:
            return Loader([])
        parts = [t.chunk(self.batches) for t in (self.problem.inputs, self.problem.targets)]
        return Loader(list(zip(*parts, strict=True)))

    def operator(self, way: Way, loader: Loader) -> Any:
        return way.library.hessian(self.problem, loader) if self.problem else way.library.known(self.known)


@dataclass
class Row:
    """What was found of a contender; a note alone where it cannot take part."""

    question: str
    subject: str
    contender: str
    setting: Any = None
    products: float = math.nan
    error: float = math.nan
    coverage: float = math.nan
    seconds: list[float] = field(default_factory=list)  # of each round, as all lists
    of_ours: list[float] = field(default_factory=list)
    passes: float = math.nan
    errors: list[float] = field(default_factory=list)
    note: str = ""


def made(name: str, values: Tensor) -> Subject:
    """A matrix with these eigenvalues and random eigenvectors."""
    generator = torch.Generator().manual_seed(0)
    vectors = torch.linalg.qr(torch.randn(len(values), len(values), generator=generator, dtype=torch.float64)).Q
    dense = (vectors * values) @ vectors.T
    return Subject(name, dense=(dense + dense.T) / 2, exact=values.sort().values, trace=float(values.sum()))


def spectra(n: int) -> list[Subject]:
    """Flat, of a power law, exponential, Marchenko and Pastur's with ten spikes, and indefinite."""
    i = torch.arange(1, n + 1, dtype=torch.float64)
    noise = torch.randn(n, 2 * n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    bulk = torch.linalg.eigvalsh(noise @ noise.T / (2 * n))
    spiked = torch.cat([bulk[:-10], torch.linspace(10, 100, 10, dtype=torch.float64)])
    return [
        made("flat", torch.linspace(1, 3, n, dtype=torch.float64)),
        made("power law", i**-2),
        made("exponential", 0.9**i),
        made("spiked", spiked),
        made("indefinite", torch.where(torch.arange(n) % 3 == 2, -0.5, 1.0) / i),
    ]


def small_cnn() -> nn.Sequential:
    """1,898 parameters, from pixels (N, 64) to logits (N, 10)."""
    first, second = nn.Conv2d(1, 8, 3, stride=2, padding=1), nn.Conv2d(8, 16, 3, stride=2, padding=1)
    flat = nn.Unflatten(1, (1, 8, 8))
    return nn.Sequential(flat, first, nn.GELU(), second, nn.GELU(), nn.Flatten(), nn.Linear(64, 10))


def trained(examples: int) -> Subject:
    """That network after 1,000 steps on the digits, and its dense Hessian."""
    pixels, labels = data.digits()
    module, order = initial(small_cnn, seed=0), draw(TRAINING_DIGITS, steps=1000, batch=64, seed=0)
    fit_(module, pixels[:TRAINING_DIGITS], labels[:TRAINING_DIGITS], order, rate=1e-2)
    problem = Problem(module.eval(), pixels[:examples], labels[:examples])
    dense = dense_hessian(problem)
    pair = (problem.inputs, problem.targets)
    objective = cv.Objective.of(problem.copied(), cv.CrossEntropy(), pair, dtype=torch.float64)
    return Subject(
        "trained CNN",
        problem,
        dense=dense,
        exact=torch.linalg.eigvalsh(dense),
        control=cv.kfac(objective),
        trace=float(dense.trace()),
    )


def dense_hessian(problem: Problem) -> Tensor:
    """In float64, by derivatives of torch's in the directions of all parameters."""
    module, inputs = problem.copied().double(), problem.inputs.double()
    named = {name: p.detach() for name, p in module.named_parameters()}

    def loss(params: dict[str, Tensor]) -> Tensor:
        return MeanCrossEntropy()(functional_call(module, params, (inputs,)), problem.targets)

    def product(row: Tensor) -> Tensor:
        parts = row.split([p.numel() for p in named.values()])
        tangents = {name: part.view_as(p) for (name, p), part in zip(named.items(), parts, strict=True)}
        return torch.cat([t.flatten() for t in jvp(grad(loss), (named,), (tangents,))[1].values()])

    rows = vmap(product, chunk_size=16)(torch.eye(problem.size, dtype=torch.float64))
    return (rows + rows.T) / 2


def trace_of_perceptron(problem: Problem) -> float:
    """The exact trace for a network of linear layers, in float64.

    A weight acts on an example through one output z_j of its layer, times its input: it has the second derivative
    with respect to z_j times the square of the input.
    """
    module, inputs = problem.copied().double(), [problem.inputs.double()]
    outputs: list[Tensor] = []
    for layer in module:  # pyright: ignore[reportGeneralTypeIssues]
        inputs.append(layer(inputs[-1]))
        outputs.append(inputs[-1])
    loss, total = MeanCrossEntropy()(outputs[-1], problem.targets), 0.0
    for layer, x, z in zip(module, inputs[:-1], outputs, strict=True):  # pyright: ignore[reportArgumentType]
        if isinstance(layer, nn.Linear):
            weights = x.detach().square().sum(1) + 1
            (first,) = torch.autograd.grad(loss, z, create_graph=True)
            for j in range(z.shape[1]):
                (second,) = torch.autograd.grad(first[:, j].sum(), z, retain_graph=True)
                total += float(second[:, j] @ weights)
    return total


def largest_eigenvalue(problem: Problem) -> float:
    """By ARPACK and plain autograd in float64."""
    A = Columns(lambda rows: reference(problem, "hessian", rows), problem.size, torch.float64)
    start = np.random.default_rng(0).standard_normal(problem.size)
    return float(extreme(A.to_scipy(), 1, start, tolerance=1e-2)[0])


def error_of(question: str, subject: Subject, answer: Any) -> float:
    """How far an answer is from the truth; NaN where that is not known."""
    match question:
        case "trace":
            return answer.value / subject.trace - 1
        case "eigsh":
            assert subject.exact is not None
            truth = subject.exact.flip(0)[:TOP]
            return float(((answer.sort(descending=True).values - truth) / truth).abs().max())
        case _ if subject.exact is None:
            return float(answer.nodes.max()) / subject.largest - 1
        case _:
            return kolmogorov(answer, subject.exact, subject.merged)


def summed_up(question: str, errors: Sequence[float]) -> float:
    """Rms, worst or mean, as is said above."""
    return {"trace": lambda e: fmean(x * x for x in e) ** 0.5, "eigsh": max, "density": fmean}[question](errors)


def asked(question: str, setting: Any) -> Any:
    """The setting as a contender takes it."""
    return (PROBES, setting) if question == "density" else setting


def search(way: Way, question: str, subject: Subject, row: Row) -> None:
    """Write into the row the cheapest setting that is accurate enough, with what it takes and how good it is."""
    known = subject.known
    operator, covered = way.library.known(known), []

    def error(setting: Any) -> float:
        before, errors = known.columns.products, []
        covered.clear()
        for seed in range(SEEDS[question]):
            answer = way.answer(operator, asked(question, setting), seed)
            errors.append(error_of(question, subject, answer))
            if question == "trace" and answer.interval:
                covered.append(answer.interval[0] <= subject.trace <= answer.interval[1])
            if question == "eigsh" and errors[-1] > CLOSE[question]:
                break
        row.setting, row.error = setting, summed_up(question, errors)
        row.products = (known.columns.products - before) / len(errors)
        row.coverage = fmean(covered) if covered else math.nan
        return row.error

    bound = CLOSE[question]
    if way.average:
        needed = math.ceil(FIRST[question] * (error(FIRST[question]) / bound) ** 2)
        row.setting = row.products = needed
        row.error, row.note = bound, f"as follows from the error with {FIRST[question]}"
    elif way.settings:
        if all(error(setting) > bound for setting in way.settings):
            row.note = f"error {row.error:.1e} at {row.setting}, the most that was tried"
    else:
        least(error, bound, way.step, FIRST[question], known.columns.shape[0] // LONGEST[question])
        if row.error > bound:
            row.note = f"error {row.error:.1e} at {row.setting}, the most that was tried"


def least(error: Callable[[int], float], bound: float, step: int, first: int, most: int) -> int:
    """The smallest multiple of `step`, to 4 %, with an error up to `bound`, which is the last one looked at; or the
    largest up to `most`."""
    low, high, most = 0, first, most // step * step
    while error(high) > bound:
        if high == most:
            return high
        low, high = high, min(2 * high, most)
    while high - low > max(step, high // 25):
        middle = max(step, (low + high) // 2 // step * step)
        if middle in (low, high):
            break
        low, high = (low, middle) if error(middle) <= bound else (middle, high)
    error(high)
    return high


def timed(rows: dict[str, Row], ways: dict[str, Way], subject: Subject, rounds: int) -> None:
    """Make operators and answer, once a round, in random order."""
    clock = Clock(torch.device("cpu"))
    for seed in range(rounds):
        order = [name for name, row in rows.items() if row.setting is not None]
        random.Random(seed).shuffle(order)
        times: dict[str, float] = {}
        for name in order:
            row, way, loader, answers = rows[name], ways[name], subject.loader(), []

            def call(
                way: Way = way, loader: Loader = loader, row: Row = row, answers: list[Any] = answers, seed: int = seed
            ) -> None:
                answers.append(way.answer(subject.operator(way, loader), asked(row.question, row.setting), seed))

            gc.collect()
            try:
                seconds = clock.once(call)[0]
            except Exception as error:  # what a library fails with is a finding
                row.note, row.setting = str(error) if isinstance(error, Lacks) else failure(error), None
                continue
            times[name] = seconds
            row.errors.append(error_of(row.question, subject, answers[0]))
            row.passes = loader.passes if subject.problem else math.nan
        for name, seconds in times.items():
            rows[name].seconds.append(seconds)
            rows[name].of_ours += [seconds / times[OURS]] if OURS in times else []


def to_accuracy(question: str, subject: Subject, rounds: int) -> list[Row]:
    """The rows of all contenders: the search, and the times at what it found."""
    ways, rows = WAYS[question], {}
    for name, way in ways.items():
        row = rows[name] = Row(question, subject.name, name)
        started = time.perf_counter()
        try:
            if find_spec(way.library.package) is None:
                raise Lacks("not installed")
            search(way, question, subject, row)
        except Exception as error:
            row.setting, row.note = None, str(error) if isinstance(error, Lacks) else failure(error)
        print(f"{question}, {subject.name}, {name}: {time.perf_counter() - started:.0f} s", flush=True)
    bound = CLOSE[question]
    found = {n: r for n, r in rows.items() if r.setting is not None and r.error <= bound and r.products <= DEAR}
    timed(found, ways, subject, rounds)
    return list(rows.values())


def of_equal_work(
    question: str, subject: Subject, names: Sequence[str], setting: Any, products: int, rounds: int
) -> list[Row]:
    """The rows of those contenders at the same setting."""
    rows = {name: Row(question, subject.name, name, setting, products) for name in names}
    for name, row in rows.items():
        if find_spec(WAYS[question][name].library.package) is None:
            row.setting, row.note = None, "not installed"
    timed(rows, WAYS[question], subject, rounds)
    return list(rows.values())


def table(rows: list[Row]) -> Table:
    """The rows of one question and subject."""
    shown = Table(title=f"{rows[0].question}, {rows[0].subject}", title_justify="left")
    columns = ("contender", "setting", "products", "error", "coverage", "seconds", "of ours", "passes", "error there")
    for column in columns:
        shown.add_column(column, justify="left" if column == "contender" else "right")
    shown.add_column("note")
    for row in rows:
        there = summed_up(row.question, [abs(e) for e in row.errors]) if row.errors else math.nan
        numbers = (
            "" if row.setting is None else str(row.setting),
            figure(row.products),
            figure(row.error),
            figure(row.coverage),
            figure(median(row.seconds) if row.seconds else math.nan),
            f"{median(row.of_ours):.2f} ({min(row.of_ours):.2f}-{max(row.of_ours):.2f})" if row.of_ours else "",
            figure(row.passes),
            figure(there),
        )
        shown.add_row(row.contender, *numbers, row.note)
    return shown


def figure(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def summary(row: Row) -> dict[str, Any]:
    """The row as it is written: medians beside what they are of."""
    medians = {"median_seconds": row.seconds, "median_of_ours": row.of_ours}
    return rounded({**asdict(row), **{name: median(values) for name, values in medians.items() if values}})


@dataclass(frozen=True)
class Target:
    """What was set out for: a figure of at least `least`."""

    what: str
    least: float
    figure: float

    @property
    def met(self) -> bool:
        return self.figure >= self.least


def targets(rows: list[Row]) -> list[Target]:
    """Those that the rows tell about."""
    found = {(row.question, row.subject, row.contender): row for row in rows}
    goals: list[Target] = []
    speed = {"mlp": (1.2, 1.4, 2.5), "resnet": (1.0, 1.5, 2.5), "mlp, 10 batches": (1.3, 1.3, 1.3)}
    for subject, factors in speed.items():
        ours = found.get(("density", subject, OURS))
        for name, factor in zip(("PyHessian", "hessian-eigenthings", "curvlinops"), factors, strict=True):
            row = found.get(("density", subject, name))
            if ours and row and row.of_ours:
                goals.append(Target(f"density, {subject}: times faster than {name}", factor, median(row.of_ours)))
                if subject == "mlp, 10 batches":
                    goals.append(Target(f"its passes over ours, {name}", 10, row.passes / ours.passes))
    trace = partial(fewer, found, "trace")
    goals += trace("products of XTrace of curvlinops over ours", 1, "curvlinops, xtrace", (OURS, "curvature, xtrace"))
    with_control = ("curvature, control", "curvature, hutchinson, control")
    goals += trace("and over ours with a control variate", 1.5, "curvlinops, xtrace", with_control)
    for name in (OURS, "curvature, xtrace"):
        if (row := found.get(("trace", "trained CNN", name))) is not None:
            goals.append(Target(f"trace: coverage of the 95 % interval, {name}", 0.95, row.coverage))
    top = partial(fewer, found, "eigsh")
    goals += top("products of power iteration over ours", 5, "PyHessian, power iteration", (OURS,))
    goals += top("products of power iteration over ours, block=1", 5, "PyHessian, power iteration",
                 ("curvature, block=1",))  # fmt: skip
    return goals


def fewer(
    found: dict[tuple[str, str, str], Row], question: str, what: str, factor: float, peer: str, ours: Sequence[str]
) -> list[Target]:
    """How many times fewer products ours takes than a peer to be accurate, on the trained network."""
    other = found.get((question, "trained CNN", peer))
    own = [row for name in ours if (row := found.get((question, "trained CNN", name))) is not None]
    if other is None or not own:
        return []
    return [Target(f"{question}: {what}", factor, other.products / min(row.products for row in own))]


def goals(reached: list[Target]) -> Table:
    """What was set out for, and what was found."""
    shown = Table(title="set out for", title_justify="left")
    for column in ("what", "at least", "found", "met"):
        shown.add_column(column, justify="left" if column == "what" else "right")
    for target in reached:
        shown.add_row(target.what, f"{target.least:g}", figure(target.figure), "yes" if target.met else "no")
    return shown


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", default=",".join([*WAYS, LARGE]))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="small problems: whether everything runs")
    parser.add_argument("--out", type=Path, default=RESULTS / "estimators_cpu.json")
    return parser.parse_args()


def accurate(question: str, quick: bool, rounds: int) -> Iterator[list[Row]]:
    """The rows of all matrices with known eigenvalues."""
    for subject in (trained(100 if quick else 500), *spectra(200 if quick else 1000)):
        yield to_accuracy(question, subject, rounds)


def large(quick: bool, rounds: int) -> Iterator[list[Row]]:
    """The rows of networks without a dense matrix."""
    size = "quick" if quick else "cpu"
    mlp, resnet = (problem_of(name, size, torch.device("cpu")) for name in ("mlp", "resnet"))
    yield of_equal_work("trace", Subject("mlp", mlp, trace=trace_of_perceptron(mlp)), EQUAL, 48, 48, rounds)
    yield of_equal_work("trace", Subject("resnet", resnet), EQUAL, 12, 12, rounds)
    even = len(mlp.inputs) // 10 * 10  # hessian-eigenthings takes all batches for equally large
    cut = Problem(mlp.module, mlp.inputs[:even], mlp.targets[:even])
    names = [name for name, way in DENSITIES.items() if way.library not in (SKERCH, MATFREE)]
    cases = (("mlp", mlp, 1, 80), ("resnet", resnet, 1, 6), ("mlp, 10 batches", cut, 10, 10))
    for name, problem, batches, full in cases:
        subject = Subject(name, problem, batches, largest=largest_eigenvalue(problem))
        steps = 3 if quick else full
        yield of_equal_work("density", subject, names, steps, PROBES * steps, rounds)


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    warnings.filterwarnings("ignore")
    console = Console(width=170)
    report = json.loads(args.out.read_text()) if args.out.exists() else {}
    for question in args.only.split(","):
        rows: list[Row] = []
        found = large(args.quick, (args.rounds + 1) // 2) if question == LARGE else None
        for more in found or accurate(question, args.quick, args.rounds):
            console.print(table(more))
            rows += more
            report[question] = {
                "machine": machine(torch.device("cpu")),
                "quick": args.quick,
                "rounds": args.rounds,
                "rows": [summary(row) for row in rows],
                "targets": rounded([{**asdict(target), "met": target.met} for target in targets(rows)]),
            }
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps(report, indent=1) + "\n")
        console.print(goals(targets(rows)))


if __name__ == "__main__":
    main()
