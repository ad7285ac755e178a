"""Checkpoints: the time of a measurement that keeps one, over that of the same without, in turn.

OMP_NUM_THREADS=1 python benchmarks/checkpoints.py
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from measure import Clock, machine, rounded
from rich.console import Console
from rich.table import Table

import curvature as cv

RESULTS = Path(__file__).parent / "results"


def cases() -> dict[str, Callable[[cv.Run], cv.Result]]:
    """Measurements by name: products of milliseconds, where a checkpoint is dear, and of half a second."""
    digits, hamlet = cv.demo("digits"), cv.demo("hamlet")
    directions = cv.random_directions(digits, 2)
    return {
        "spectrum, digits": lambda run: cv.spectral_density(cv.hessian(digits), probes=8, steps=20, run=run),
        "eig, digits": lambda run: cv.eigsh(cv.hessian(digits), 3, which="both", rtol=1e-6, run=run),
        "landscape, digits": lambda run: cv.plane(digits, directions, points=15, run=run),
        "spectrum, hamlet": lambda run: cv.spectral_density(cv.hessian(hamlet), probes=2, steps=6, run=run),
    }


def timed(ask: Callable[[cv.Run], cv.Result], rounds: int) -> dict[str, float]:
    """Seconds without a checkpoint, the median ratio of those with one, its range, and the bytes of the file."""
    clock = Clock(torch.device("cpu"))
    ask(cv.Run())
    plain, ratios, size = [], [], 0
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "checkpoint"
            plain.append(clock.once(lambda: ask(cv.Run()))[0])
            ratios.append(clock.once(lambda path=path: ask(cv.Run(checkpoint=path)))[0] / plain[-1])
            size = path.stat().st_size
    return {"seconds": median(plain), "ratio": median(ratios), "least": min(ratios), "most": max(ratios), "bytes": size}


def main() -> None:
    """Print the table, and keep it in results/checkpoints.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    found = {name: timed(ask, rounds) for name, ask in cases().items()}
    table = Table("", "seconds without", "ratio with", "from", "to", "MB")
    for name, row in found.items():
        shown = [f"{row['seconds']:.3g}", *(f"{row[key]:.3f}" for key in ("ratio", "least", "most"))]
        table.add_row(name, *shown, f"{row['bytes'] / 1e6:.1f}")
    Console().print(table)
    written = {"machine": machine(torch.device("cpu")), "rounds": rounds, "cases": rounded(found)}
    (RESULTS / "checkpoints.json").write_text(json.dumps(written, indent=1) + "\n")


if __name__ == "__main__":
    main()
