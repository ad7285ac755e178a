"""Kronecker-factored approximations of the Gauss-Newton and Fisher matrices: a block for each layer.

In a layer with inputs a and gradients g of its outputs the block is approximately E[g g^T] ⊗ E[a a^T], with row-major
weights and the bias as their last column. Every block is known by two small matrices, whose eigenvalues tell all.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from curvature.errors import TooLarge
from curvature.linalg.memory import short_of
from curvature.linalg.structured import BlockDiagonal, Kronecker, Spectral
from curvature.objective.objective import Objective
from curvature.operators.engine import need_objective
from curvature.operators.layers import Inputs, Layer, Rows, gram
from curvature.operators.layerwise import Layerwise, Seen
from curvature.operators.residuals import FisherKind, signed

Sharing = Literal["expand", "reduce"]
Bases = tuple[Tensor | None, Tensor | None]  # of the two factors of a layer


def kfac(
    objective: Objective,
    *,
    fisher: FisherKind | Literal["input-only"] = "sampled",
    samples: int = 1,
    sharing: Sharing = "expand",
    seed: int = 0,
) -> BlockDiagonal:
    """K-FAC: a block-diagonal approximation of the Gauss-Newton or Fisher matrix, psd, from one pass over the data.

    `fisher` says which residuals are pulled back through the model: "type-2", all, for the GGN (one backward pass for
    each output of a term); "sampled", at `samples` targets drawn from the model, an unbiased estimate of the same;
    "empirical", at the real targets; "input-only", none: E[g g^T] is replaced by the identity. The terms of one example
    (its tokens) get random signs, by `seed`, where they meet. `sharing` says how the positions of an example that share
    weights (tokens, locations of a convolution) are taken: as if independent ("expand"), or by the mean of inputs and
    the sum of gradients ("reduce", for models that average over positions).

    `.blocks` are operators by name: Kronecker for Linear, Conv, Embedding (with a diagonal factor) and Hugging Face's
    Conv1D, the block itself for each channel of a normalisation, and for all other parameters its Diagonal;
    `.source["diagonal"]` lists these and says why. trace, logdet, eigenvalues, inverse and power of the result are
    exact. The regulariser is not in it: give `objective.l2` as `damping`. An example is a row of the outputs, or of the
    inputs where the outputs have several for each; that batch statistics couple examples in training mode is left out
    of account. Every batch is looked at twice, the second time with each example weighted at random: a layer that does
    not hand the weights through, or is not all that uses its parameters, gets the diagonal. "reduce" leaves embeddings
    as they are, and "input-only" gives the identity to parameters without a layer.

    Martens & Grosse 2015 (arXiv:1503.05671); Grosse & Martens 2016 (arXiv:1602.01407), convolutions; Eschenhagen et
    al. 2023 (arXiv:2311.00636), expand and reduce; Benzing 2022 (arXiv:2201.12250), input-only.
    """
    need_objective("kfac", objective)
    pulled = None if fisher == "input-only" else signed(objective, "kfac", fisher, samples=samples, seed=seed)
    seen = Layerwise("kfac", objective, pulled, samples=samples, seed=seed)
    return seen.assembled(*_factors(seen, sharing), sharing=sharing, fisher=fisher)


def ekfac(
    objective: Objective,
    *,
    fisher: FisherKind = "sampled",
    samples: int = 1,
    sharing: Sharing = "expand",
    seed: int = 0,
) -> BlockDiagonal:
    """EKFAC: the eigenvectors of K-FAC, and for eigenvalues the true second moments along them, from two passes.

    Of all matrices with these eigenvectors it is the nearest to the blocks of the Fisher matrix (in Frobenius norm).
    Arguments, blocks and what is exact are as in `kfac`. Terms of one example (tokens) meet in its gradients, with
    random signs: then "type-2" is an unbiased estimate too. Where factors have equal eigenvalues (zeros, from fewer
    examples than inputs) their eigenvectors, and with them this matrix, are a choice among many.

    George et al. 2018 (arXiv:1806.03884).
    """
    need_objective("ekfac", objective)
    pulled = signed(objective, "ekfac", fisher, samples=samples, seed=seed)
    seen = Layerwise("ekfac", objective, pulled, fisher=fisher, samples=samples, seed=seed)
    blocks, squares = _factors(seen, sharing)
    bases = {layer.name: blocks[layer.name].spectral for layer in seen.layers if not layer.kind.small}
    moments = _moments(seen, {name: (basis.U, basis.V) for name, basis in bases.items()})
    corrected = {name: Spectral(moments[name], basis.U, basis.V) for name, basis in bases.items()}
    return seen.assembled({**blocks, **corrected}, squares, sharing=sharing)


def second_moments(
    objective: Objective, bases: Mapping[str, Bases], *, fisher: FisherKind = "sampled", samples: int = 1, seed: int = 0
) -> dict[str, Tensor]:
    """The mean squares of gradients along given bases (U, V), by layer: the eigenvalues of `ekfac` where the bases are
    those of `kfac`, None for the identity. The layers are some of those that `kfac` has followed through these data."""
    pulled = signed(objective, "ekfac", fisher, samples=samples, seed=seed)
    return _moments(Layerwise("ekfac", objective, pulled, fisher=fisher, samples=samples, seed=seed), bases)


def _moments(seen: Layerwise, bases: Mapping[str, Bases]) -> dict[str, Tensor]:
    """The mean squares of the entries of U^T G V, over the gradients G of examples."""

    def see(layer: Layer, inputs: Inputs) -> Seen:
        if layer.name not in bases:
            return {}, lambda cotangents: {}
        outer, inner = bases[layer.name][:: -1 if layer.kind.transposed else 1]
        inputs = inputs.projected(inner)
        return {}, lambda cotangents: {"squares": inputs.squares(torch.einsum("nrgo,gop->nrgp", cotangents, outer))}

    moments, _ = seen.means(see, again=True)
    return {name: moments[name]["squares"] for name in bases}


def _factors(seen: Layerwise, sharing: Sharing) -> tuple[dict[str, Kronecker], dict[str, Tensor]]:
    """The K-FAC block of every layer, and the diagonal of the other parameters."""
    if sharing not in ("expand", "reduce"):
        raise ValueError(f"sharing is 'expand' or 'reduce', but got {sharing!r}.")
    _need_factors(seen)
    means, squares = seen.means(partial(factor_sums, sharing=sharing, pulled=seen.residuals is not None))
    return {layer.name: block_of(layer, means[layer.name], seen.objective.params) for layer in seen.layers}, squares


def factor_sums(layer: Layer, inputs: Inputs, *, sharing: Sharing = "expand", pulled: bool = True) -> Seen:
    """What factors are made of: sums over the inputs of a layer, and over the cotangents of a residual."""
    if layer.kind.small and isinstance(inputs, Rows) and pulled:
        whole = inputs.whole
        return {}, lambda cotangents: {"whole": whole(cotangents)}
    reduce = sharing == "reduce"
    taken = inputs.summed if reduce else inputs.counted  # of large inputs nothing is kept for the residuals
    inputs = inputs.reduced() if reduce else inputs
    once = {"inner": inputs.second_moment(), "positions": torch.tensor(float(inputs.count), dtype=torch.float64)}
    return once, lambda cotangents: {"outer": gram(taken(cotangents).flatten(0, 1))}


def block_of(layer: Layer, means: Mapping[str, Tensor], params: Mapping[str, Tensor]) -> Kronecker:
    """E[g g^T] ⊗ E[a a^T] from the means over terms; the identity for what there is nothing of."""
    groups, left, right = layer.arranged(params).shape
    one = params[layer.params[0]].new_ones(())
    if "whole" in means:
        return Kronecker(one.expand(groups, 1, 1), means["whole"], psd=True)
    size = right if layer.kind.transposed else left
    outer = means.get("outer", one.expand(size) if groups == 1 else torch.eye(size).to(one).expand(groups, size, size))
    inner = (means["inner"] / (means["positions"] or 1)).to(one.dtype)  # an embedding may see padding alone
    return Kronecker(*((inner, outer) if layer.kind.transposed else (outer, inner)), psd=True)


def _need_factors(seen: Layerwise) -> None:
    """TooLarge when the factors would not fit into the memory that is free now."""
    sizes = {}
    for layer in seen.layers:
        groups, left, right = layer.arranged(seen.objective.params).shape
        dense = [right] if layer.kind.transposed else [1] if layer.kind.small else [left, right]
        sizes[layer.name] = groups * sum(size**2 for size in dense)
    space = seen.objective.space
    needed = sum(sizes.values()) * torch.empty(0, dtype=space.dtype).element_size()
    if (free := short_of(needed, space.device)) is not None:
        largest = max(sizes, key=sizes.__getitem__)
        raise TooLarge(
            f"The Kronecker factors take {needed / 2**30:.1f} GiB, but {free / 2**30:.1f} GiB are free.",
            f"Leave the largest layer out, {largest}: Objective.of(..., select=...).",
        )
