"""Windows of gradients: the time of adding one and of a product with the inverse, over that of reading the window.

A product reads the window twice and an addition once; what it takes to read is the sum of its entries, timed in the
same rounds. Windows that fit into a cache are read at its bandwidth, the rest at that of the memory. Then the memory
and the times of windows that are compressed.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from measure import Clock, machine, rounded
from rich.console import Console
from rich.table import Table

import curvature as cv

RESULTS = Path(__file__).parent / "results"
CASES = [(32, 100_000), (512, 100_000), (32, 1_000_000), (128, 1_000_000), (512, 1_000_000), (32, 4_000_000)]
CASES += [(128, 4_000_000)]
OTHERS = (128, 1_000_000)  # the case for rows of other dtypes
SIDE = 1000  # of the matrix that the compressed gradients are
COMPRESSED = 256  # gradients
DAMPING = 1e-3


def timed(window: Any, rounds: int, read: Callable[[], Any]) -> dict[str, Any]:
    """Seconds of the parts of a step of M-FAC; each is the median over the rounds, and so are their ratios."""
    clock, space = Clock(torch.device("cpu")), window.space
    gradient = space.draw(1, seed=1, kind="normal")
    inverse = cv.inverse(window.fisher, damping=DAMPING)
    calls = {
        "read": read,
        "add": lambda: window.add(gradient),
        "factorise": lambda: cv.inverse(window.fisher, damping=DAMPING),
        "apply": lambda: inverse.apply(gradient),
    }
    for call in calls.values():
        call()
    taken = [{name: clock(call)[0] for name, call in calls.items()} for _ in range(rounds)]
    seconds = {name: median(one[name] for one in taken) for name in calls}
    ratios = {name: median(one[name] / (2 * one["read"]) for one in taken) for name in ("add", "apply")}
    return {"seconds": seconds, "of_two_readings": ratios}


def filled(window: Any) -> Any:
    """The window, full."""
    for gradient, _ in zip(window.space.draws(seed=0, kind="normal"), range(window.size), strict=False):
        window.add(gradient)
    return window


def bandwidth_of(m: int, n: int, dtype: torch.dtype, threads: int, rounds: int) -> dict[str, Any]:
    """A row of the table of dense windows; vectors are float32, or float64 with rows of that."""
    torch.set_num_threads(threads)
    space = cv.Space(n, torch.promote_types(dtype, torch.float32))
    window = filled(cv.GradientWindow(m, space, dtype=dtype))
    found = timed(window, rounds, lambda: window.gradients.sum())
    size = window.gradients.numel() * window.gradients.element_size()
    facts = {"m": m, "n": n, "dtype": str(dtype).removeprefix("torch."), "threads": threads}
    return {**facts, "gigabytes_per_second": size / found["seconds"]["read"] / 1e9, **found}


def compressed(rounds: int) -> list[dict[str, Any]]:
    """What windows of each kind take for a parameter, and the time of a step."""
    torch.set_num_threads(1)
    space = cv.Space(SIDE * SIDE)
    windows = {
        "dense": cv.GradientWindow(COMPRESSED, space),
        "dense, bfloat16": cv.GradientWindow(COMPRESSED, space, dtype=torch.bfloat16),
        "sparse, 1 %": cv.SparseWindow(COMPRESSED, space, share=0.01),
        "low rank, 4": cv.LowRankWindow(COMPRESSED, space, shapes=[torch.Size([SIDE, SIDE])], rank=4),
    }
    dense = windows["dense"].state["rows"]
    rows = []
    for name, window in windows.items():
        found = timed(filled(window), rounds, lambda: dense.sum())
        facts = {"window": name, "m": COMPRESSED, "n": space.size, "bytes_per_parameter": window.bytes / space.size}
        rows.append({**facts, **found})
    return rows


def table(rows: list[dict[str, Any]], columns: dict[str, str], title: str) -> Table:
    """All rows, with the times in milliseconds."""
    parts = ("add", "factorise", "apply")
    shown = Table(*columns.values(), *(f"{part} ms" for part in parts), "add / 2 read", "apply / 2 read", title=title)
    for row in rows:
        facts = [f"{row[name]:.4g}" if isinstance(row[name], float) else str(row[name]) for name in columns]
        times = [f"{1e3 * row['seconds'][part]:.1f}" for part in parts]
        shown.add_row(*facts, *times, *(f"{row['of_two_readings'][part]:.2f}" for part in ("add", "apply")))
    return shown


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--quick", action="store_true", help="the smallest case: whether everything runs")
    parser.add_argument("--out", type=Path, default=RESULTS / "windows_cpu.json")
    args = parser.parse_args()
    cases = [(m, n, torch.float32) for m, n in (CASES[:1] if args.quick else CASES)]
    cases += [] if args.quick else [(*OTHERS, torch.bfloat16), (*OTHERS, torch.float64)]
    dense = [bandwidth_of(*case, int(t), args.rounds) for t in args.threads.split(",") for case in cases]
    others = [] if args.quick else compressed(args.rounds)
    console = Console(width=150)
    facts = {"m": "m", "n": "n", "dtype": "dtype", "threads": "threads", "gigabytes_per_second": "GB/s"}
    console.print(table(dense, facts, "Dense windows"))
    console.print(table(others, {"window": "window", "m": "m", "bytes_per_parameter": "bytes each"}, "Compressed"))
    report = {"machine": machine(torch.device("cpu")), "rounds": args.rounds, "dense": dense, "compressed": others}
    args.out.write_text(json.dumps(rounded(report), indent=1) + "\n")


if __name__ == "__main__":
    main()
