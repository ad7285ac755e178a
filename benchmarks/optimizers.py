"""Optimizers: what a step costs, and the steps and seconds to the loss that a tuned AdamW ends with.

    python benchmarks/optimizers.py [--only paces,training] [--tasks autoencoder,...] [--methods SOAP,...] [--quick]

Writes benchmarks/results/optimizers_cpu.json, where what was not asked stays, and prints its tables; below them what
was set out for, and whether it is reached. One thread; all times are those of the processor.

    paces      a step over that of AdamW and over one gradient, and the bytes of state for each parameter, on ResNet-20
               (32 pictures) and a transformer of 0.8 million parameters (8 x 128 characters). Gradients are those of
               the halves of the batch, in turn, and not in the time of a step; what an optimizer takes beyond them is.
               All take ten steps a round, in random order, after ten that are not timed; times, and ratios within a
               round, are medians over the rounds
    training   see `optimizer_tasks.py`. Everyone is tuned the same: five learning rates, two for each factor of ten,
               with one seed, by the loss at the end; as long as the best is at an end of them, up to two more. Then
               the best is run with other seeds, each beside AdamW with the same. All warm up over a twentieth of
               the steps, and then go down to zero in a straight line, but for those that decide on the length of their
               steps: they have no schedule. Of what solves a system in each step, `few` of them, the damping is tuned.
               AdamW is tuned twice, with beta2 = 0.999 and 0.95; the smaller median of the last losses is the target
               of everyone. `steps` and `seconds` are those to the first measurement of at most that, out of a hundred;
               `times fewer` and `of the time` compare them, seed by seed, with the whole run of that AdamW, and are 0
               and infinite for runs that do not get there. Measuring is not in the time. `judged` is what the title
               says
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from measure import machine, rounded
from optimizer_contenders import ALL, BASELINES, CONTENDERS, HEAVYBALL, OURS, TORCH
from optimizer_paces import paces
from optimizer_tasks import TASKS
from optimizer_training import training
from rich.console import Console
from rich.table import Table
from solves import Target, goals, table

RESULTS = Path(__file__).parent / "results"
CPU = torch.device("cpu")
PEERS = ("heavyball", "pytorch_optimizer")
NETWORKS = ("resnet", "gpt")  # of the paces
Rows = list[dict[str, Any]]


PACES = ("method", "library", "ms", "of AdamW", "of a gradient", "bytes a parameter", "error")
TRAINING = ("method", "library", "final", "least", "most", "judged", "steps", "seconds", "times fewer", "of the time")
TRAINING += ("ms a step", "whole seconds", "value", "at end", "error")


def reached_in_training(rows: Rows) -> Iterator[Target]:
    """Those that the rows of all tasks tell about."""
    at = {(row["task"], row["method"]): row for row in rows if row["library"] in (OURS, TORCH) and "final" in row}
    for task in ("autoencoder", "deeper"):
        if found := at.get((task, "SOAP")):
            yield Target(f"{task}, SOAP: times fewer steps than AdamW to where it ends", 4, found["times fewer"])
            yield Target(f"{task}, SOAP: time of AdamW over its own to there", 1 / 0.6, 1 / found["of the time"])
    for task in ("poisson-1d", "poisson-2d"):
        for method in ("EGN", "EGN, Levenberg-Marquardt"):
            adams = [at[task, c.method] for c in BASELINES[:2] if (task, c.method) in at]
            if (found := at.get((task, method))) and adams:
                adam = min(adams, key=lambda row: row["final"])
                yield Target(f"{task}, {method}: error of AdamW over its own", 5, adam["judged"] / found["judged"])
                yield Target(f"{task}, {method}: loss of AdamW over its own", 50, adam["final"] / found["final"])
                longer = adam["whole seconds"] / found["whole seconds"]
                yield Target(f"{task}, {method}: time of AdamW over its own", 1, longer)


def reached_in_paces(rows: Rows) -> Iterator[Target]:
    """Ours beside the best of the others, those that are made to be compiled left out."""
    for own in rows:
        if own["library"] != OURS or "ms" not in own:
            continue
        same = [r for r in rows if (r["problem"], r["method"]) == (own["problem"], own["method"]) and "ms" in r]
        others = [r for r in same if r["library"] not in (OURS, HEAVYBALL)]
        if others:
            best = min(r["of AdamW"] for r in others)
            what = f"{own['problem']}, {own['method']}:"
            yield Target(f"{what} step of the best other over ours", 1, best / own["of AdamW"])
            best = min(r["bytes a parameter"] for r in same if r is not own)
            yield Target(f"{what} bytes of the best other over ours", 0.99, best / own["bytes a parameter"])


def shown(title: str, rows: Rows, columns: tuple[str, ...]) -> Table:
    """The table of some columns; `error` is what a contender failed with."""
    return table(title, [{name: row.get(name, "") for name in columns} for row in rows])


def versions() -> dict[str, str]:
    found = {}
    for package in PEERS:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "missing"
    return found


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", default="paces,training")
    parser.add_argument("--tasks", default=",".join(ALL))
    parser.add_argument("--methods", default=None, help="some of them; AdamW always is")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="a few steps: whether everything runs")
    parser.add_argument("--out", type=Path, default=RESULTS / "optimizers_cpu.json")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    console = Console(width=190)
    methods = args.methods.split(",") if args.methods else [c.method for c in CONTENDERS]
    contenders = [c for c in CONTENDERS if c.method in methods or c in BASELINES]
    facts = {"machine": machine(CPU) | {"peers": versions()}, "quick": args.quick}

    def write(question: str, name: str, found: dict[str, Any]) -> None:
        report = json.loads(args.out.read_text()) if args.out.exists() else {}  # which others may have added to
        report.setdefault(question, {})[name] = rounded({**facts, **found})
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(report, indent=1) + "\n")

    def known(question: str, name: str) -> Rows:
        report = json.loads(args.out.read_text()) if args.out.exists() else {}
        return report.get(question, {}).get(name, {}).get("rows", [])

    reached: list[Target] = []
    for network in NETWORKS[args.quick :] if "paces" in args.only.split(",") else ():
        started = time.perf_counter()
        rows = paces(network, contenders, args.quick, 1 if args.quick else args.rounds)
        console.print(shown(f"Paces, {network}", rows, PACES))
        targets = list(reached_in_paces(rows))
        found = {"rounds": args.rounds, "seconds": time.perf_counter() - started, "rows": rows}
        write("paces", network, {**found, "targets": [asdict(t) | {"met": t.met} for t in targets]})
        reached += targets
    for name in args.tasks.split(",") if "training" in args.only.split(",") else ():
        started, rows, more, targets = time.perf_counter(), [], {}, []
        others = [row for row in known("training", name) if row["method"] not in {c.method for c in contenders}]
        for rows, more in training(TASKS[name](), contenders, args.quick):
            rows = [*rows, *others]
            targets = list(reached_in_training(rows))
            found = {**more, "seconds": time.perf_counter() - started, "rows": rows}
            write("training", name, {**found, "targets": [asdict(t) | {"met": t.met} for t in targets]})
        title = f"{name}: {more['parameters']:,} parameters, {more['steps']} steps, {more['seeds']} seeds"
        title += f"; target {more['target']:.4g} of {more['standard']}; judged by {more['judged']}"
        console.print(shown(title, rows, TRAINING))
        reached += targets
    if reached:
        console.print(goals(reached))


if __name__ == "__main__":
    main()
