"""Building Kronecker factors, in this library and others, in one interleaved run.

    python benchmarks/kfac.py [--problems mlp,digits,resnet,gpt] [--rounds 5] [--threads 1] [--quick]

Writes benchmarks/results/kfac_DEVICE.json, and prints its table: the time of building all factors over that of a
gradient of the same data, medians over rounds in each of which every contender builds once, and the same over our time
in that round. What the others leave out (data or layers they refuse, a whole batch at once) is said in the rows. The
libraries and how to install them: operators.py.
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from measure import Clock, machine, rounded
from problems import PROBLEMS, Problem, gradient, problem_of
from rich.console import Console
from rich.table import Table
from torch import nn

import curvature as cv

RESULTS = Path(__file__).parent / "results"
Build = Callable[[], Any]


def _ours(make: Callable[..., Any], fisher: str, problem: Problem) -> Build:
    objective = cv.Objective.of(problem.copied(), cv.CrossEntropy(axis=-1), problem.loader("one batch"))
    objective.check()
    return lambda: make(objective, fisher=fisher)


def _curvlinops(name: str, fisher: str, problem: Problem) -> Build:
    import curvlinops

    module = problem.copied()
    params, data = list(module.parameters()), problem.loader("one batch")
    zero = torch.zeros(problem.size, device=problem.inputs.device)

    def build() -> Any:  # the factors are computed when they are first needed
        A = getattr(curvlinops, name)(
            module,
            nn.CrossEntropyLoss(),
            params,
            data,
            fisher_type=fisher,
            separate_weight_and_bias=False,
            check_deterministic=False,
        )
        return A @ zero

    return build


def _backpack(name: str, problem: Problem) -> Build:
    from backpack import backpack, extend, extensions

    module, loss = extend(problem.copied()), extend(nn.CrossEntropyLoss())

    def build() -> None:
        value = loss(module(problem.inputs), problem.targets)
        with backpack(getattr(extensions, name)()):
            value.backward()
        module.zero_grad()

    return build


CONTENDERS: dict[str, dict[str, Callable[[Problem], Build]]] = {
    "sampled": {
        "curvature": partial(_ours, cv.kfac, "sampled"),
        "curvlinops": partial(_curvlinops, "KFACLinearOperator", "mc"),
        "BackPACK": partial(_backpack, "KFAC"),
    },
    "type-2": {
        "curvature": partial(_ours, cv.kfac, "type-2"),
        "curvlinops": partial(_curvlinops, "KFACLinearOperator", "type-2"),
        "BackPACK": partial(_backpack, "KFLR"),
    },
    "EKFAC, sampled": {
        "curvature": partial(_ours, cv.ekfac, "sampled"),
        "curvlinops": partial(_curvlinops, "EKFACLinearOperator", "mc"),
    },
}


def rows_of(name: str, kind: str, problem: Problem, rounds: int) -> list[dict[str, Any]]:
    """What every contender took, in each of the rounds."""
    clock = Clock(problem.inputs.device)
    builds: dict[str, Build] = {}
    notes: dict[str, str] = {}
    for contender, prepare in CONTENDERS[kind].items():
        try:
            build = prepare(problem)
            build()
        except Exception as error:  # other libraries can raise anything
            notes[contender] = (
                f"{type(error).__name__}: {str(error).splitlines()[0][:100]}" if str(error) else repr(error)
            )
        else:
            builds[contender] = build
    unit = partial(gradient, problem, problem.loader("one batch"))
    times: dict[str, list[float]] = {contender: [] for contender in builds}
    for _ in range(rounds):
        seconds, _ = clock(unit)
        for contender, build in builds.items():
            times[contender].append(clock.once(build)[0] / seconds)
    ours = times["curvature"]
    return [
        {
            "problem": name,
            "factors": kind,
            "contender": contender,
            "rounds": taken,
            "gradients": median(taken) if taken else None,
            "of_ours": median(t / o for t, o in zip(taken, ours, strict=True)) if taken else None,
            "note": notes.get(contender, ""),
        }
        for contender in CONTENDERS[kind]
        for taken in [times.get(contender, [])]
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", default=",".join(PROBLEMS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="small problems: whether everything runs")
    parser.add_argument("--out", type=Path, default=None)
    asked = parser.parse_args()
    warnings.filterwarnings("ignore")  # the other libraries'
    torch.set_num_threads(asked.threads)
    device = torch.device(asked.device)
    size = "quick" if asked.quick else device.type
    rows: list[dict[str, Any]] = []
    table = Table("problem", "factors", "contender", "gradients", "of ours", "note")
    for name in asked.problems.split(","):
        problem = problem_of(name, size, device)
        for kind in CONTENDERS:
            if kind == "type-2" and name == "gpt":
                continue  # a backward pass for each of its characters: nobody does that
            for row in rows_of(name, kind, problem, asked.rounds):
                rows.append(row)
                figures = [f"{row[column]:.2f}" if row[column] else "" for column in ("gradients", "of_ours")]
                table.add_row(name, kind, row["contender"], *figures, row["note"])
    out = asked.out or RESULTS / f"kfac_{device.type}.json"
    out.write_text(json.dumps({"machine": machine(device), "size": size, "rows": rounded(rows)}, indent=1) + "\n")
    Console(width=150).print(table)


if __name__ == "__main__":
    main()
