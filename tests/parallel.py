"""What two processes make of each optimizer of the table, and one process with all their data."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from pathlib import Path

import torch
from optimizers import CASES, Batch, OptimizerCase, awkward, batches
from torch import Tensor, distributed, multiprocessing, nn
from torch.nn.parallel import DistributedDataParallel

import curvature as cv
from curvature.optim import EKFAC, KFAC, SOAP, Armijo, LevenbergMarquardt

EXACT = [
    OptimizerCase(KFAC, 2e-2, {"every": 4, "fisher": "type-2"}, objective=True, name="KFAC, exact"),
    OptimizerCase(EKFAC, 2e-2, {"every": 4, "fisher": "empirical"}, objective=True, name="EKFAC, empirical"),
    OptimizerCase(
        KFAC,
        1.0,
        {"match": "none", "momentum": 0.0, "fisher": "type-2", "damping": 1.0, "control": LevenbergMarquardt()},
        objective=True,
        name="KFAC, exact, of Levenberg-Marquardt",
    ),
]
SHARES = (batches(5, seed=1), batches(5, seed=2))
SEARCH = "line search by closures"


def trained(case: OptimizerCase, steps: Iterable[list[Batch]], *, wrapped: bool) -> Tensor:
    """The parameters after steps on mini-batches, of which each is the mean loss over some batches."""
    net = awkward()
    model = DistributedDataParallel(net) if wrapped else net
    optimizer = case.make(net.named_parameters())
    for some in steps:
        optimizer.zero_grad()
        for tokens, targets in some:
            (nn.functional.cross_entropy(model(tokens), targets) / len(some)).backward()
        optimizer.step(objective=cv.Objective.of(model, "cross-entropy", some) if case.objective else None)
    return nn.utils.parameters_to_vector(net.parameters()).detach()


def searched(steps: Iterable[Batch]) -> Tensor:
    """The parameters after line searches by what closures return, which differs between processes."""
    net = awkward()
    model = DistributedDataParallel(net)
    optimizer = SOAP(net.named_parameters(), lr=1.0, control=Armijo())
    for tokens, targets in steps:

        def closure(tokens: Tensor = tokens, targets: Tensor = targets) -> Tensor:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(tokens), targets)
            loss.backward()
            return loss

        optimizer.step(closure)
    return nn.utils.parameters_to_vector(net.parameters()).detach()


def work(rank: int, folder: str) -> None:
    """One of two processes: writes where its parameters have come, by case."""
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    ends = {str(case): trained(case, [[batch] for batch in SHARES[rank]], wrapped=True) for case in CASES + EXACT}
    ends[SEARCH] = searched(SHARES[rank])
    torch.save(ends, f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


def both(folder: Path) -> list[dict[str, Tensor]]:
    """Where two processes have come."""
    multiprocessing.spawn(work, (str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def alone(case: OptimizerCase) -> Tensor:
    """Where one process with all data comes."""
    return trained(case, [list(pair) for pair in zip(*SHARES, strict=True)], wrapped=False)
