"""Other weights of the same function: a layer of positively homogeneous units scaled, and the next one unscaled."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

from torch import nn
from torch.nn.modules import conv, dropout, pooling

from curvature.errors import BadObjective
from curvature.objective.objective import Objective

LAYERS = (nn.Linear, conv._ConvNd)
HOMOGENEOUS = (  # f(a x) = a f(x) for a > 0
    nn.ReLU,
    nn.LeakyReLU,
    nn.PReLU,
    nn.Identity,
    nn.Flatten,
    nn.Unflatten,
    dropout._DropoutNd,
    pooling._AvgPoolNd,
    pooling._MaxPoolNd,
    pooling._AdaptiveAvgPoolNd,
    pooling._AdaptiveMaxPoolNd,
)
ROUNDING = 100  # units by which what is equal may differ
EXAMPLES = 256  # on which the function has to be the same


def rescaled(objective: Objective, alpha: float) -> Objective:
    """The objective at other weights of the same function: of every two consecutive layers between which there are
    only positively homogeneous functions, such as ReLU, the first is scaled by alpha, its bias as well, and the second
    by 1 / alpha.

    Only neighbours in an `nn.Sequential` are seen, and of them those taken whose scaling leaves the loss of the first
    examples as it is. In a chain of more than two layers alpha and 1 / alpha take turns, so that all layers change.
    BadObjective where there are none.

    Dinh, Pascanu, Bengio & Bengio 2017 (arXiv:1703.04933).

    >>> import torch
    >>> net = nn.Sequential(nn.Linear(1, 1), nn.ReLU(), nn.Linear(1, 1)).requires_grad_()
    >>> objective = Objective.of(net, "mse", (torch.ones(1, 1), torch.ones(1, 1)))
    >>> torch.equal(rescaled(objective, 2.0).params["2.weight"], objective.params["2.weight"] / 2)
    True
    """
    if not 0 < alpha < float("inf"):
        raise ValueError(f"alpha is a factor, positive and finite, but got {alpha}.")
    some = objective.first(EXAMPLES)
    loss = some.value()
    made = objective
    for turn, pair in enumerate(_pairs(objective)):
        further = _scaled(made, *pair, alpha if turn % 2 == 0 else 1 / alpha)
        if abs(some.at(further.params).value() - loss) <= ROUNDING * objective.space.eps * abs(loss):
            made = further
    if made is objective:
        raise BadObjective(
            "No two layers were found whose scaling leaves the loss as it is.",
            "It takes neighbours in an nn.Sequential, with ReLU or nothing between them, and no regulariser.",
        )
    return made


def _scaled(objective: Objective, first: str, second: str, alpha: float) -> Objective:
    """With the first layer scaled, and the second unscaled."""
    factors = {f"{first}weight": alpha, f"{first}bias": alpha, f"{second}weight": 1 / alpha}
    return objective.at({name: t * factors.get(name, 1.0) for name, t in objective.params.items()})


def _pairs(objective: Objective) -> Iterator[tuple[str, str]]:
    """Consecutive layers by the prefix of their parameters, all of which are selected but the second's bias."""
    names = {id(layer): f"{path}." for path, layer in objective.function.module.named_modules()}
    chains = [m for m in objective.function.module.modules() if isinstance(m, nn.Sequential)]
    found = [pair for chain in chains for pair in _neighbours(chain)]
    for first, second in dict.fromkeys((names[id(a)], names[id(b)]) for a, b in found if a is not b):
        needed = [f"{first}weight", f"{second}weight"]
        biased = objective.function.module.get_submodule(first[:-1]).bias is not None
        if all(name in objective.params for name in [*needed, *([f"{first}bias"] if biased else [])]):
            yield first, second


def _neighbours(chain: nn.Sequential) -> Iterator[tuple[nn.Module, nn.Module]]:
    """The layers with only homogeneous functions between them, of a chain and the chains in it."""
    kept = [m for m in _flat(chain) if not isinstance(m, HOMOGENEOUS)]
    return ((a, b) for a, b in pairwise(kept) if isinstance(a, LAYERS) and isinstance(b, LAYERS))


def _flat(chain: nn.Sequential) -> Iterator[nn.Module]:
    for child in chain:
        if isinstance(child, nn.Sequential):
            yield from _flat(child)
        else:
            yield child
