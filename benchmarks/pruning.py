"""What pruning leaves of the embedded digits networks: by magnitude, and by the Fisher matrix, of which methods take
the diagonal (OBD), blocks (WoodFisher), or all (M-FAC).

    python benchmarks/pruning.py [--demos digits,digits-cnn] [--seeds 3] [--rounds 3]

Writes benchmarks/results/pruning_cpu.json and prints its table. All weights of linear and convolution layers compete;
nothing is trained after pruning. One-shot goes to each sparsity from the trained network; gradual in `rounds` rounds to
the first, and from each to the next in as many, the matrix being made anew for every round. The diagonal is that of all
examples; windows hold the gradients of some. Damping and number of gradients are, for each method, way and sparsity,
those of the least training loss with the first seed; the other seeds, which draw other examples, take them over.
Accuracy is that on the 297 digits that are held out. "separate" adds up the steps of single removals, as the papers do;
all others are exact for the removed set.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import torch
from measure import machine, rounded
from rich.console import Console
from rich.table import Table

import curvature as cv
from curvature.assets.data import digits
from curvature.assets.make import TRAINING_DIGITS, evaluate

RESULTS = Path(__file__).parent / "results"
SPARSITIES = (0.8, 0.9, 0.95)
DAMPINGS = (1e-4, 1e-5, 1e-6)
WINDOWS = {"digits": (128, 256), "digits-cnn": (256,)}
BLOCK = 128


class Setting(NamedTuple):
    """What is chosen by the training loss."""

    damping: float = 0.0
    window: int = 0


class Method(NamedTuple):
    """The inverse at an objective, whether it is damped and made of a window, and how removals are put together."""

    inverse: Callable[[cv.Objective, Setting, int], cv.LinearOperator]
    damped: bool = True
    sampled: bool = True
    together: Any = "joint"

    def settings(self, demo: str) -> list[Setting]:
        """Those it is tried with."""
        dampings, windows = DAMPINGS if self.damped else (0.0,), WINDOWS[demo] if self.sampled else (0,)
        return [Setting(*pair) for pair in itertools.product(dampings, windows)]


class Outcome(NamedTuple):
    """At one sparsity: loss on the training data, accuracy on what is held out, and the rise that was predicted of the
    last round."""

    loss: float
    accuracy: float
    predicted: float


def magnitude(objective: cv.Objective, setting: Setting, seed: int) -> cv.LinearOperator:
    return cv.identity(objective.space)


def diagonal(objective: cv.Objective, setting: Setting, seed: int) -> cv.LinearOperator:
    return cv.inverse(cv.ggn_diagonal(objective, fisher="empirical"), damping=setting.damping)


def blocks(objective: cv.Objective, setting: Setting, seed: int) -> cv.LinearOperator:
    window = cv.gradient_window(objective, setting.window, seed=seed)
    return cv.inverse(window.blocks(BLOCK), damping=setting.damping)


def whole(objective: cv.Objective, setting: Setting, seed: int) -> cv.LinearOperator:
    window = cv.gradient_window(objective, setting.window, seed=seed)
    return cv.inverse(window.fisher, damping=setting.damping)


METHODS = {
    "magnitude": Method(magnitude, damped=False, sampled=False),
    "diagonal (OBD)": Method(diagonal, sampled=False),
    f"WoodFisher, {BLOCK}": Method(blocks),
    "M-FAC": Method(whole),
    "M-FAC, separate": Method(whole, together="separate"),
}


def one_shot(objective: cv.Objective, method: Method, setting: Setting, seed: int) -> Iterator[cv.Pruning]:
    """What is left at each sparsity, from the trained network."""
    H = method.inverse(objective, setting, seed)
    for sparsity in SPARSITIES:
        yield cv.prune(objective, H, sparsity=sparsity, method=method.together)


def gradual(
    objective: cv.Objective, method: Method, setting: Setting, seed: int, *, rounds: int
) -> Iterator[cv.Pruning]:
    """The same from one sparsity to the next, the share that is kept falling by one factor a round in between."""
    seeds = itertools.count(1000 * seed)
    for before, after in itertools.pairwise((0.0, *SPARSITIES)):
        for k in range(1, rounds + 1):
            kept = (1 - before) ** (1 - k / rounds) * (1 - after) ** (k / rounds)
            H = method.inverse(objective, setting, next(seeds))
            pruned = cv.prune(objective, H, sparsity=1 - kept, method=method.together)
            objective = objective.at(pruned.params)
        yield pruned


def outcome(objective: cv.Objective, pruned: cv.Pruning) -> Outcome:
    """How good the pruned network is."""
    there = objective.at(pruned.params)
    model = copy.deepcopy(there.function.module)
    model.load_state_dict(there.complete(there.params))
    pixels, labels = digits()
    _, accuracy = evaluate(model, pixels[TRAINING_DIGITS:], labels[TRAINING_DIGITS:])
    return Outcome(there.value(), accuracy, pruned.increase)


def measured(demo: str, seeds: int, rounds: int) -> list[dict[str, Any]]:
    """The rows of a network."""
    objective = cv.demo(demo).narrowed(lambda name, p: p.ndim > 1)
    rows = []
    ways = {
        "one-shot": one_shot,
        "gradual": lambda *arguments: gradual(*arguments, rounds=rounds),
    }
    methods = {name: method for name, method in METHODS.items() if method.together == "joint" or demo == "digits"}
    for (way, run), (name, method) in itertools.product(ways.items(), methods.items()):

        def outcomes(setting: Setting, seed: int, run: Any = run, method: Method = method) -> list[Outcome]:
            return [outcome(objective, pruned) for pruned in run(objective, method, setting, seed)]

        started = time.perf_counter()
        tried = {(setting, 0): outcomes(setting, 0) for setting in method.settings(demo)}
        chosen = [min(tried, key=lambda t: tried[t][i].loss)[0] for i in range(len(SPARSITIES))]
        more = range(1, seeds) if method.sampled else ()
        tried |= {(setting, seed): outcomes(setting, seed) for setting in set(chosen) for seed in more}
        for i, (sparsity, setting) in enumerate(zip(SPARSITIES, chosen, strict=True)):
            found = [tried[setting, seed][i] for seed in (0, *more)]
            losses, accuracies, predicted = map(list, zip(*found, strict=True))
            rows.append(
                {
                    "demo": demo,
                    "way": way,
                    "method": name,
                    "sparsity": sparsity,
                    **setting._asdict(),
                    "accuracy": mean(accuracies),
                    "loss": mean(losses),
                    "accuracies": accuracies,
                    "losses": losses,
                    "predicted": predicted,
                }
            )
        print(f"{demo}, {way}, {name}: {time.perf_counter() - started:.0f} s", flush=True)
    return rows


def unpruned(demo: str) -> dict[str, Any]:
    """The network as it was trained."""
    objective = cv.demo(demo).narrowed(lambda name, p: p.ndim > 1)
    kept = cv.prune(objective, cv.identity(objective.space), sparsity=0.0)
    found = outcome(objective, kept)
    return {"demo": demo, "weights": objective.space.size, "accuracy": found.accuracy, "loss": found.loss}


def table(report: dict[str, Any]) -> Table:
    """Accuracy and loss at each sparsity: means over the seeds, with the least and the largest accuracy."""
    columns = [f"{sparsity:.0%}" for sparsity in SPARSITIES]
    shown = Table("network", "way", "method", *columns, title="Held-out accuracy / training loss [damping, gradients]")
    for row in report["unpruned"]:
        figures = f"{row['accuracy']:.3f} / {row['loss']:.3f}"
        shown.add_row(row["demo"], "", f"none of {row['weights']:,}", figures)
    for key, rows in itertools.groupby(report["rows"], lambda r: (r["demo"], r["way"], r["method"])):
        shown.add_row(*key, *map(cell, rows))
    return shown


def cell(row: dict[str, Any]) -> str:
    """What the table says of a row."""
    least, largest = min(row["accuracies"]), max(row["accuracies"])
    spread = f" ({least:.3f}-{largest:.3f})" if largest > least else ""
    setting = [f"{row[name]:g}" for name in ("damping", "window") if row[name]]
    return f"{row['accuracy']:.3f}{spread} / {row['loss']:.3f}" + (f" \\[{', '.join(setting)}]" if setting else "")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--demos", default="digits,digits-cnn")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS / "pruning_cpu.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    demos, started = args.demos.split(","), time.perf_counter()
    rows = [row for demo in demos for row in measured(demo, args.seeds, args.rounds)]
    report = {
        "machine": machine(torch.device("cpu")),
        "seeds": args.seeds,
        "rounds": args.rounds,
        "seconds": time.perf_counter() - started,
        "unpruned": [unpruned(demo) for demo in demos],
        "rows": rows,
    }
    report = rounded(report)
    args.out.write_text(json.dumps(report, indent=1) + "\n")
    Console(width=170).print(table(report))


if __name__ == "__main__":
    main()
