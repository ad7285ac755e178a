"""Products with Hessian, Gauss-Newton and Fisher matrices, and K-FAC, this library and others in one interleaved run.

    python benchmarks/operators.py [--problems mlp,resnet,gpt,digits] [--matrices hessian,ggn,empirical_fisher,kfac]
        [--rounds 5] [--threads 1] [--quick] [--memory]

Writes benchmarks/results/operators_DEVICE.json, and prints its table. Every time is over that of a gradient of the same
data: in each round each contender does one product in random order, before each of which a gradient is computed, and
what is shown are medians over rounds (half as many for the largest k) of a contender's time over the median gradient of
its round. One thread is timed by its processor time. Columns, all for one vector of the k:

    gradients   time of a product over that of a gradient, and the range over rounds
    of auto     that time over the one of the engine "auto" in the same round: above 1 where we are faster
    FLOPs       of a product over those of a gradient, as torch counts them (too many where vmap over examples makes
                grouped convolutions)
    rate        FLOPs over time: the share of the gradient's own FLOP rate that a product runs at
    passes      over the data: building, the first product (which builds graphs, and checks), a later one
    setup       time of building and of the first product, in gradients
    MiB         at the peak, above what a process holds that has computed a gradient (with --memory, on Linux)
    error       relative to float64 products by plain autograd (problems.py)

The other libraries are optional. Their dependencies would replace torch, so that these are left out:

    pip install -c constraints.txt torch -e .
    pip install --no-deps curvlinops-for-pytorch backpack-for-pytorch PyHessian
    pip install --no-deps --pre hessian-eigenthings
    pip install -c constraints.txt einops einconv linear_operator opt-einsum unfoldNd tqdm
    pip install --no-deps kronfluence accelerate psutil pyyaml; pip install -c constraints.txt transformers datasets
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib import import_module
from itertools import groupby, product
from pathlib import Path
from statistics import median
from typing import Any

import kfac
import torch
from contenders import CONTENDERS, MATRICES, OURS, Lacks, Operator
from measure import Clock, flops, machine, peak_since, rounded
from problems import DATA, PROBLEMS, Loader, Problem, gradient, problem_of, reference
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

RESULTS = Path(__file__).parent / "results"
BLOCKS = (1, 4, 16)
FACTORS = "kfac"  # among the matrices: not multiplied with, but built
WRONG = 1e-3  # relative error beyond which a product is another matrix's, not this one's in float32
LISTS = "PyHessian keeps the same graph, and returns a list of tensors where this is one vector, copied together: a tie"
BLOCKED = "curvlinops sends all 16 vectors through at once, by forward derivatives, which suits these sizes"
NOTES: dict[tuple[str, str, str, int], str] = {  # (problem, data, matrix, k): why another is ahead
    **{(problem, "one batch", "hessian", k): LISTS for problem in ("mlp", "gpt", "digits") for k in BLOCKS},
    **{("digits", data, "hessian", 16): BLOCKED for data in DATA},
    ("mlp", "one batch", "empirical_fisher", 16): BLOCKED,
    ("gpt", "loader", "empirical_fisher", 16): BLOCKED,
}


@dataclass
class Row:
    """What was measured of a contender in a cell; a note alone where it cannot take part."""

    problem: str
    data: str
    matrix: str
    k: int
    contender: str
    gradients: list[float] = field(default_factory=list)  # of each round, as all lists
    wall_gradients: list[float] = field(default_factory=list)
    of_auto: list[float] = field(default_factory=list)
    seconds: float = math.nan  # of a gradient
    flops: float = math.nan
    passes: list[float] = field(default_factory=list)
    setup: float = math.nan
    mebibytes: float | None = None
    error: float = math.nan
    note: str = ""

    @property
    def rate(self) -> float:
        return self.flops / median(self.gradients)


@dataclass
class Built:
    """An operator at work, its data, and what building it took."""

    operator: Operator
    loader: Loader
    passes: list[float]
    seconds: float
    settled: Callable[[], None]


def build(name: str, problem: Problem, data: str, matrix: str, clock: Clock) -> Built:
    """The operator, after its first product."""
    loader, contender = problem.loader(data), CONTENDERS[name]
    holder: list[Operator] = []
    seconds = clock.once(lambda: holder.append(contender.build(problem, loader, matrix)))[0]
    (operator,) = holder
    building = loader.passes
    rows = problem.rows(1)
    seconds += clock.once(lambda: operator.product(operator.take(rows)))[0]
    first = loader.passes - building

    def settle() -> None:
        for _ in range(1, contender.settles):
            operator.product(operator.take(rows))

    return Built(operator, loader, [building, first], seconds, settle)


def all_built(problem: Problem, data: str, matrix: str, clock: Clock) -> dict[str, Built | str]:
    """Every contender's operator, or why there is none."""
    built: dict[str, Built | str] = {}
    for name, contender in CONTENDERS.items():
        try:
            if not contender.installed:
                raise Lacks("not installed")
            operator = build(name, problem, data, matrix, clock)
            operator.settled()
            built[name] = operator
        except Lacks as lack:
            built[name] = str(lack)
        except Exception as error:  # what a library fails with is a finding
            built[name] = failure(error)
    return built


def failure(error: Exception) -> str:
    """A line about it."""
    return f"fails: {type(error).__name__}: {str(error).partition(chr(10))[0][:120]}"


def cell(
    problem: Problem, named: tuple[str, str, str, int], built: dict[str, Built | str], truth: Tensor, rounds: int
) -> list[Row]:
    """The rows of all contenders for one problem, kind of data, matrix and k."""
    k, clock = named[3], Clock(truth.device)
    vectors = problem.rows(truth.shape[0])[:k]
    rows = {name: Row(*named, name) for name in CONTENDERS}
    work: dict[str, Callable[[], Any]] = {}
    loader = problem.loader(named[1])

    def unit() -> list[Tensor]:
        return gradient(problem, loader)

    with sdpa_kernel(SDPBackend.MATH):  # torch cannot count those of the CPU's fused attention
        unit_flops = flops(unit)[1]
    for name, operator in built.items():
        row = rows[name]
        if isinstance(operator, str):
            row.note = operator
            continue
        call = partial(operator.operator.product, operator.operator.take(vectors))
        before = operator.loader.passes
        try:
            products, count = flops(call)
            row.passes = [*operator.passes, operator.loader.passes - before]
            error = operator.operator.give(products) - truth[:k]
            row.error, row.flops = float(error.norm() / truth[:k].norm()), count / unit_flops / k
        except Exception as error:
            row.note = failure(error)
            continue
        row.note = f"wrong by {row.error:.1e}" if row.error > WRONG else ""
        work[name] = call
    clock(unit)
    units = []
    for number in range(rounds if k < max(BLOCKS) else (rounds + 1) // 2):
        units.append(one_round(work, unit, rows, k, clock, seed=number))
    for name in work:
        rows[name].seconds = median(units)
        rows[name].setup = built[name].seconds / median(units)  # pyright: ignore[reportAttributeAccessIssue]
    rows[OURS].note = NOTES.get(named, "")
    return list(rows.values())


def one_round(
    work: dict[str, Callable[[], Any]],
    unit: Callable[[], Any],
    rows: dict[str, Row],
    k: int,
    clock: Clock,
    *,
    seed: int,
) -> float:
    """Add the times of one product of each to its row; returns the seconds of a gradient."""
    order = sorted(work)
    random.Random(seed).shuffle(order)
    units, times = [], {}
    for name in order:
        units.append(clock(unit))
        times[name] = clock(work[name])
    headline, wall = (median(column) for column in zip(*units, strict=True))
    for name, (own, own_wall) in times.items():
        rows[name].gradients.append(own / headline / k)
        rows[name].wall_gradients.append(own_wall / wall / k)
        rows[name].of_auto.append(own / times[OURS][0])
    return headline


def memory(row: Row, options: list[str]) -> float | None:
    """MiB that its product takes in a process of its own; None where it does not run."""
    case = [row.contender, row.problem, row.data, row.matrix, str(row.k)]
    command = [sys.executable, __file__, "--one", *case, *options]
    returning = {
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TRIM_THRESHOLD_": "65536",
    }  # of what is freed, to the system
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **returning})
    return float(done.stdout.split()[-1]) if done.returncode == 0 else None


def peak(problem: Problem, name: str, data: str, matrix: str, k: int) -> float:
    """MiB at the peak of building an operator and of multiplying, above what was in use before; of a gradient for the
    name "gradient"."""
    loader, vectors = problem.loader(data), problem.rows(k)
    contender = CONTENDERS.get(name)
    if contender is not None:
        import_module(contender.package)
    gradient(problem, loader)
    used = peak_since(problem.inputs.device)
    if contender is None:
        gradient(problem, loader)
    else:
        operator = contender.build(problem, loader, matrix)
        for _ in range(1 + math.ceil(contender.settles / k)):
            operator.product(operator.take(vectors))
    return used()


def table(rows: list[Row]) -> Table:
    """The rows of one problem, kind of data and matrix."""
    title = f"{rows[0].problem}, {rows[0].data}, {rows[0].matrix}: a gradient takes {1e3 * rows[0].seconds:.1f} ms"
    shown = Table(title=title, title_justify="left")
    for column in ("k", "contender", "gradients", "of auto", "FLOPs", "rate", "passes", "setup", "MiB", "error"):
        shown.add_column(column, justify="left" if column == "contender" else "right")
    shown.add_column("note")
    for row in rows:
        if not row.gradients:
            shown.add_row(str(row.k), row.contender, *[""] * 8, row.note)
            continue
        low, high = min(row.gradients), max(row.gradients)
        shown.add_row(
            str(row.k),
            row.contender,
            f"{median(row.gradients):.2f} ({low:.2f}-{high:.2f})",
            f"{median(row.of_auto):.2f}",
            f"{row.flops:.2f}",
            f"{row.rate:.2f}",
            ", ".join(f"{passes:.3g}" for passes in row.passes),
            f"{row.setup:.0f}",
            "" if row.mebibytes is None else f"{row.mebibytes:.0f}",
            f"{row.error:.0e}",
            row.note,
        )
    return shown


def summary(row: Row) -> dict[str, Any]:
    """The row as it is written: medians beside what they are of."""
    timed = bool(row.gradients)
    medians = {"gradients": median(row.gradients), "of_auto": median(row.of_auto), "rate": row.rate} if timed else {}
    lists = {"gradients": "rounds", "wall_gradients": "wall_rounds", "of_auto": "of_auto_rounds"}
    written = {lists.get(name, name): value for name, value in asdict(row).items()}
    return rounded({**written, **medians})


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--problems", default=",".join(PROBLEMS))
    parser.add_argument("--matrices", default=",".join([*MATRICES, FACTORS]))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="small problems: whether everything runs")
    parser.add_argument("--memory", action="store_true", help="measure memory too, in a process for each figure")
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--one", nargs=5, default=None, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    torch.backends.cudnn.allow_tf32 = False
    warnings.filterwarnings("ignore")
    device = torch.device(args.device)
    size = "quick" if args.quick else device.type
    options = ["--threads", str(args.threads), "--device", args.device, *(["--quick"] if args.quick else [])]
    if args.one is not None:
        name, problem, data, matrix, k = args.one
        print(peak(problem_of(problem, size, device), name, data, matrix, int(k)))
        return
    out = args.out or RESULTS / f"operators_{device.type}.json"
    console, rows, factors = Console(width=150), [], []
    matrices, problems = args.matrices.split(","), args.problems.split(",")

    def write() -> None:
        out.parent.mkdir(parents=True, exist_ok=True)
        report = {"machine": machine(device), "size": size, "rounds": args.rounds}
        written = {"rows": [summary(row) for row in rows], "factors": rounded(factors)}
        out.write_text(json.dumps({**report, **written}, indent=1) + "\n")

    for name in problems if FACTORS in matrices else ():
        factors += kfac.measured(name, problem_of(name, size, device), args.rounds)
        write()
    if factors:
        console.print(kfac.table(factors))
    for matrix, name in product([m for m in matrices if m != FACTORS], problems):
        problem = problem_of(name, size, device)
        truth = reference(problem, matrix, problem.rows(max(BLOCKS)))
        for data in DATA:
            built = all_built(problem, data, matrix, Clock(device))
            found = [r for k in BLOCKS for r in cell(problem, (name, data, matrix, k), built, truth, args.rounds)]
            del built
            console.print(table(found))
            rows += found
            write()
    if args.memory:
        for row in rows:
            if row.gradients and row.k in (min(BLOCKS), max(BLOCKS)):
                row.mebibytes = memory(row, options)
                write()
        for _, group in groupby(rows, key=lambda row: (row.matrix, row.problem, row.data)):
            console.print(table(list(group)))


if __name__ == "__main__":
    main()
