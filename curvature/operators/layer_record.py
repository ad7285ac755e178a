"""What the passes of a training loop show of the layers of a model: K-FAC without passes of its own."""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, distributed, nn

from curvature.distributed import summed
from curvature.linalg.structured import Kronecker
from curvature.objective.layers import Capture
from curvature.objective.listen import listen
from curvature.objective.passes import Sums
from curvature.operators.followed import ROUNDING, candidates, norm
from curvature.operators.kfac import Sharing, block_of, factor_sums
from curvature.operators.layers import Layer

TERMS = ".terms"  # no name of a layer
GRADIENT, SIZE = "gradient", "size"  # of a layer: what its calls say that its gradient is, and how large its parts are
AGREEMENT = 0.05  # of gradients in half precision with those made of what was seen in it
BALANCE = {torch.float64: 1e-8, torch.float32: 1e-4}  # of gradients that sum to zero over classes


class LayerRecord:
    """Sums over what went into the layers of a model, and over the gradients that came back, since gradients were
    zero; and `terms`, of how many terms the loss was a mean: see `number_of_terms`.

    A pass that finds no gradients in the parameters begins anew, so that parts of a mini-batch whose gradients are
    accumulated are taken together. Passes without gradients, or with other tensors in the place of the parameters, are
    not seen, nor those of a compiled model, nor any while nobody has `asked`; then `missed` is true.
    """

    def __init__(self, model: nn.Module, sharing: Sharing = "expand") -> None:
        self.model = model
        self.sharing: Sharing = sharing
        self.asked: dict[str, bool] = {}  # for the next step, by who asks; and for the first step
        self._clear()
        self._listen()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("params", "layers")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self._listen()  # copies of the model come without hooks

    def wants(self, name: str | None) -> bool:
        """Whether a call of a layer, or of the model, is to be seen."""
        wanted = not self.asked or any(self.asked.values())
        if name is not None:
            layer = self.layers[name]
            own = dict(layer.module.named_parameters(recurse=False))
            return wanted and all(own.get(full.rpartition(".")[2]) is self.params[full] for full in layer.params)
        if any(p is not self.params.get(full) for full, p in self.model.named_parameters()):
            return False
        if not wanted or not any(p.grad is not None and bool(p.grad.any()) for p in self.params.values()):
            self._clear()
            self.missed = not wanted
        return wanted

    def take(self, name: str | None, input: Tensor | None, gradient: Tensor) -> None:
        """Add what was captured of the input of a call, and the gradient of its output."""
        if name is None:
            self.terms += number_of_terms(gradient)
            return
        sums = self._sums.setdefault(name, Sums())
        try:
            sums += self._of_call(self.layers[name], input, gradient)
        except Exception:  # a layer that is like its kind by name or class alone
            sums.clear()  # its gradient will not agree

    def factors(
        self, grads: Mapping[str, Tensor], group: distributed.ProcessGroup | None = None
    ) -> dict[str, Kronecker]:
        """The empirical K-FAC block of every layer some of whose parameters are among those of `grads`, which are the
        gradients that these have now; without layers of which what was seen does not give them, up to a factor.

        That factor is one where gradients were clipped, or their loss scaled, since; it is taken into the blocks.
        With a `group` gradients are means over its processes, and sums are over what all have seen.
        """
        blocks = {}
        if group is not None and not self._joint:
            self._join(group)
        for name, sums in self._sums.items():
            layer = self.narrowed(name, grads)
            if not layer.params or not sums or not self.terms:  # none where another than the model was called
                continue
            own = _cut(sums, self.layers[name], layer)
            factor = proportion(layer.arranged(grads).to(own[GRADIENT]), own[GRADIENT], float(own[SIZE]))
            if factor is not None:
                scale = self.terms * factor**2
                means = {key: tensor * scale if key in ("outer", "whole") else tensor for key, tensor in own.items()}
                blocks[name] = block_of(layer, means, grads)
        return blocks

    def _join(self, group: distributed.ProcessGroup) -> None:
        """Make the sums, and the number of terms, those of all processes."""
        device = next(iter(self.params.values())).device
        own = {(name, key): tensor for name, sums in self._sums.items() for key, tensor in sums.items()}
        own[TERMS, TERMS] = torch.tensor(float(self.terms), dtype=torch.float64)
        self._sums, self._joint = {}, True
        for (name, key), tensor in summed(own, device, group).items():
            self._sums.setdefault(name, Sums())[key] = tensor
        self.terms = int(self._sums.pop(TERMS)[TERMS])

    def narrowed(self, name: str, names: Container[str]) -> Layer:
        """A layer with those of its parameters that have these names."""
        layer = self.layers[name]
        own = [param if param is not None and param in names else None for param in (layer.weight, layer.bias)]
        return replace(layer, weight=own[0], bias=own[1])

    def _listen(self) -> None:
        self.params = dict(self.model.named_parameters())
        self.layers = {layer.name: layer for layer in candidates(self.model, self.params)[0]}
        captures: dict[str, tuple[nn.Module, Capture]] = {
            name: (layer.module, layer.kind.capture) for name, layer in self.layers.items()
        }
        listen(self, self.model, captures)

    def _clear(self) -> None:
        self.terms, self.missed = 0, False
        self._sums: dict[str, Sums] = {}
        self._joint = False

    def _of_call(self, layer: Layer, input: Tensor | None, gradient: Tensor) -> Sums:
        """The sums over one call of a layer: an example is an entry of its first axis."""
        dtype = torch.promote_types(self.params[layer.params[0]].dtype, torch.float32)
        if input is not None and input.is_floating_point():
            input = input.to(dtype)
        inputs = layer.inputs([input])
        cotangents = layer.cotangents([gradient.to(dtype)])
        once, each = factor_sums(layer, inputs, sharing=self.sharing)
        size = torch.tensor(norm(cotangents) * inputs.norm(), dtype=torch.float64)
        return Sums({**once, **each(cotangents), GRADIENT: inputs.gradient(cotangents), SIZE: size})


def number_of_terms(gradient: Tensor) -> int:
    """Of how many terms a mean loss has this gradient in the outputs of a model.

    Those of softmax sum to zero along the axis of classes, the second or the last: each row along it is a term. Else
    each entry is. Rows or entries that are zero, as of what is ignored, are none.
    """
    given = gradient != 0
    tolerance = BALANCE.get(gradient.dtype, 3e-2)
    for axis in {1, gradient.ndim - 1} if gradient.ndim > 1 else ():
        rows = gradient.double()
        if gradient.shape[axis] > 1 and bool((rows.sum(axis).abs() <= tolerance * rows.abs().sum(axis)).all()):
            return int(given.any(axis).sum())
    return int(given.sum())


def proportion(found: Tensor, expected: Tensor, size: float) -> float | None:
    """The factor by which one gradient is the other, made of numbers of that `size`; None where there is none."""
    length = norm(expected) ** 2
    factor = float((found * expected).sum(dtype=torch.float64)) / length if length else 1.0
    rounding = ROUNDING * torch.finfo(expected.dtype).eps * size * abs(factor)
    return factor if norm(found - factor * expected) <= AGREEMENT * norm(found) + rounding else None


def _cut(sums: Mapping[str, Tensor], layer: Layer, narrowed: Layer) -> dict[str, Tensor]:
    """The sums of a layer for some of its parameters: inputs without the 1 of the bias, or this alone."""
    if narrowed.params == layer.params:
        return dict(sums)
    columns = slice(-1) if narrowed.bias is None else slice(-1, None)
    both = {key: sums[key][..., columns, columns] for key in ("inner", "whole") if key in sums}
    return {**sums, **both, GRADIENT: sums[GRADIENT][..., columns]}
