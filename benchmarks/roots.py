"""Inverse fourth roots and eigenbases: which way of making them is the fastest, by size.

    python benchmarks/roots.py [--sizes 16,64,...] [--out results/roots_cpu.json]

Matrices are G G^T of Gaussian G with twice as many columns, with scales from 1 to 1/1000, in float32, alone and eight
at once; the basis that "qr" starts from is that of a tenth less of them. One thread; times are those of the processor
for one matrix, medians over rounds in which all ways take their turn in random order. `error` is that of X^4 A - I at
the ridge of 1e-6, as the largest entry; that of "qr", for which a basis a step old stands, is left out.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from measure import Clock, machine, rounded
from rich.console import Console
from solves import table
from torch import Tensor

from curvature.linalg.roots import basis_roots, eigen_roots, eigenbasis, newton_roots

RESULTS = Path(__file__).parent / "results"
CPU = torch.device("cpu")
STACKS = (1, 8)
LARGE = 256  # beyond, the products of one fill the processor
RIDGE, ROOT, ROUNDS = 1e-6, 4, 5


def moments(stack: int, size: int) -> tuple[Tensor, Tensor]:
    """Second moments, and those some steps before."""
    generator = torch.Generator().manual_seed(size)
    scales = torch.logspace(0, -3, size).unsqueeze(-1)
    G, H = (scales * torch.randn(stack, size, 2 * size, generator=generator) for _ in range(2))
    return G @ G.mT, G @ G.mT + 0.1 * H @ H.mT


def ways(S: Tensor, before: Tensor) -> dict[str, Callable[[], Tensor]]:
    held = torch.linalg.eigh(before).eigenvectors.flip(-1)
    none = torch.zeros(len(S), dtype=torch.bool)
    return {
        "eigh": lambda: eigen_roots(S, 1 / ROOT, RIDGE).roots,
        "newton": lambda: newton_roots(S, ROOT, RIDGE).roots,
        "qr": lambda: basis_roots(S, eigenbasis(S, held, none).vectors, 1 / ROOT, RIDGE).roots,
    }


def error(S: Tensor, root: Tensor) -> float:
    S = S.double()
    A = S + RIDGE * torch.linalg.matrix_norm(S, 2, keepdim=True) * torch.eye(S.shape[-1])
    return float((torch.linalg.matrix_power(root.double(), ROOT) @ A - torch.eye(S.shape[-1])).abs().max())


def rows(sizes: list[int]) -> list[dict[str, Any]]:
    clock, found = Clock(CPU), []
    for size in sizes:
        for stack in STACKS if size <= LARGE else STACKS[:1]:
            S, before = moments(stack, size)
            calls = ways(S, before)
            times: dict[str, list[float]] = {name: [] for name in calls}
            for seed in range(ROUNDS):
                for name in random.Random(seed).sample(list(calls), len(calls)):
                    times[name].append(1e3 * clock(calls[name])[0] / stack)
            row: dict[str, Any] = {"size": size, "at once": stack}
            row |= {f"{name}, ms": median(each) for name, each in times.items()}
            row |= {f"{name}, error": error(S, calls[name]()) for name in ("eigh", "newton")}
            found.append(row | {"fastest": min(times, key=lambda name: median(times[name]))})
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--sizes", default="16,32,64,128,256,512,1024")
    parser.add_argument("--out", type=Path, default=RESULTS / "roots_cpu.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    found = rows([int(size) for size in args.sizes.split(",")])
    Console(width=140).print(table("Inverse fourth roots, for one matrix", found))
    args.out.write_text(json.dumps(rounded({"machine": machine(CPU), "rows": found}), indent=1) + "\n")


if __name__ == "__main__":
    main()
