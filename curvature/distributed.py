"""What processes that train the same parameters on shares of the data tell each other: all collectives are here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import Tensor, distributed

K = TypeVar("K")


def several(group: distributed.ProcessGroup | None) -> distributed.ProcessGroup | None:
    """The group, or that of all processes; None where there is one process only."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return None
    group = group or distributed.group.WORLD
    return group if distributed.get_world_size(group) > 1 else None


def place(group: distributed.ProcessGroup | None) -> tuple[int, int]:
    """The number of this process among those of the group, and how many these are."""
    return (0, 1) if group is None else (distributed.get_rank(group), distributed.get_world_size(group))


def summed(
    tensors: Mapping[K, Tensor], device: torch.device, group: distributed.ProcessGroup | None
) -> dict[K, Tensor]:
    """The sum of each tensor over the processes, the same bits in all. A process may lack some, which are zero there;
    all call this at once."""
    if group is None:
        return dict(tensors)
    kinds: list[dict[K, tuple[torch.Size, torch.dtype]]] = [{} for _ in range(place(group)[1])]
    distributed.all_gather_object(kinds, {name: (t.shape, t.dtype) for name, t in tensors.items()}, group=group)
    sums = {}
    for name, (shape, dtype) in {name: kind for some in kinds for name, kind in some.items()}.items():
        total = torch.zeros(shape, dtype=dtype, device=device)  # contiguous: collectives send storage as it lies
        if name in tensors:
            total.copy_(tensors[name])
        distributed.all_reduce(total, group=group)
        sums[name] = total
    return sums


def mean(number: float, device: torch.device, group: distributed.ProcessGroup | None) -> float:
    """The mean of a number over the processes."""
    if group is None:
        return number
    total = summed({"": torch.tensor(number, dtype=torch.float64, device=device)}, device, group)
    return float(total[""]) / place(group)[1]
