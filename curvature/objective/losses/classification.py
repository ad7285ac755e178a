"""Cross-entropy on logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from curvature.errors import BadObjective


@dataclass(frozen=True)
class CrossEntropy:
    """-sum_c q_c log softmax(outputs)_c, averaged over terms (examples, tokens).

    Targets are class indices, shaped like the outputs without their class axis, or probabilities shaped like the
    outputs. The class axis is the last, or 1 as `nn.CrossEntropyLoss` has it; where both would fit, `axis` must say.
    Terms whose target is `ignore_index` count for nothing. `class_weights` (C,) scale the terms of a class and, for
    indices, the count they are averaged over. As in torch, `label_smoothing` mixes the target with the uniform one.
    """

    ignore_index: int = -100
    label_smoothing: float = 0.0
    class_weights: tuple[float, ...] | None = None
    axis: int | None = None

    @property
    def offers(self) -> frozenset[str]:
        return frozenset({"ggn"})

    @classmethod
    def of(cls, module: nn.CrossEntropyLoss) -> CrossEntropy:
        """The loss that the torch module computes."""
        if module.reduction != "mean":
            raise BadObjective(
                f"CrossEntropyLoss(reduction={module.reduction!r}) is not a mean.",
                "Use reduction='mean'; a sum is the mean times the number of terms.",
            )
        weights = None if module.weight is None else tuple(module.weight.tolist())
        return cls(module.ignore_index, module.label_smoothing, weights)

    def check(self, outputs: Tensor, targets: Any) -> None:
        """Raise BadObjective unless targets are class indices in range, or probabilities, for these logits."""
        if not isinstance(targets, Tensor):
            raise BadObjective(
                f"Cross-entropy takes a tensor of targets, but a {type(targets).__name__} came.",
                "Yield batches (inputs, targets) of tensors.",
            )
        classes = outputs.shape[self._axis(outputs, targets)]
        if self.class_weights is not None and len(self.class_weights) != classes:
            raise BadObjective(
                f"{len(self.class_weights)} class weights were given for {classes} classes.",
                "Give one for each class.",
            )
        kept = targets[targets != self.ignore_index].long()
        if not targets.is_floating_point() and kept.numel() and not 0 <= int(kept.min()) <= int(kept.max()) < classes:
            raise BadObjective(
                f"Class indices run from {int(kept.min())} to {int(kept.max())}, but there are {classes} outputs.",
                "Check the labels, and the width of the last layer.",
            )

    def total(self, outputs: Tensor, targets: Tensor) -> Float[Tensor, ""]:
        logits, targets = self._arranged(outputs, targets)
        weights = self._weights(logits)
        return F.cross_entropy(
            logits,
            targets,
            weights,
            ignore_index=self.ignore_index,
            reduction="sum",
            label_smoothing=self.label_smoothing,
        )

    def weight(self, targets: Tensor) -> Float[Tensor, ""]:
        if targets.is_floating_point():
            classes = targets.shape[-1 if self.axis is None else self.axis]
            return torch.tensor(targets.numel() / classes, dtype=torch.float64)
        kept = targets[targets != self.ignore_index]
        if self.class_weights is None:
            return torch.tensor(kept.numel(), dtype=torch.float64)
        return torch.tensor(self.class_weights, dtype=torch.float64, device=targets.device)[kept.long()].sum()

    def hessian_product(self, outputs: Tensor, targets: Tensor, tangent: Tensor) -> Tensor:
        """m (p * u - p (p . u)) for every term, with p the softmax and m the mass of its target distribution."""
        axis = self._axis(outputs, targets)
        p = outputs.softmax(axis)
        product = p * tangent
        product = product - p * product.sum(axis, keepdim=True)
        return product * self._mass(outputs, targets, axis).unsqueeze(axis)

    def _axis(self, outputs: Tensor, targets: Tensor) -> int:
        """Where the classes lie; BadObjective when nothing fits, or more than one."""
        named = (1, -1) if self.axis is None else (self.axis,)
        axes = {axis % outputs.ndim for axis in named if outputs.ndim}
        if targets.is_floating_point():
            fits = axes if targets.shape == outputs.shape else set()
        else:
            fits = {axis for axis in axes if outputs.shape[:axis] + outputs.shape[axis + 1 :] == targets.shape}
        if len(fits) == 1:
            return fits.pop()
        shapes = f"outputs {tuple(outputs.shape)} and {targets.dtype} targets {tuple(targets.shape)}"
        if fits:
            raise BadObjective(f"The classes of {shapes} may lie on axis 1 or -1.", "Say CrossEntropy(axis=...).")
        raise BadObjective(
            f"Cross-entropy takes class indices (integers) or probabilities shaped like the outputs, but got {shapes}.",
            "Convert class indices with .long(), flatten outputs and targets alike, or use the loss 'mse'.",
        )

    def _arranged(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (T, C) and the targets (T,) or (T, C)."""
        axis = self._axis(outputs, targets)
        logits = outputs.movedim(axis, -1).reshape(-1, outputs.shape[axis])
        if targets.is_floating_point():
            return logits, targets.movedim(axis, -1).reshape(logits.shape)
        return logits, targets.reshape(-1).long()

    def _weights(self, logits: Tensor) -> Tensor | None:
        if self.class_weights is None:
            return None
        return torch.tensor(self.class_weights, dtype=logits.dtype, device=logits.device)

    def _mass(self, outputs: Tensor, targets: Tensor, axis: int) -> Tensor:
        """The mass m of every term's weighted and smoothed target distribution, without the class axis."""
        classes = outputs.shape[axis]
        weights = self._weights(outputs)
        ones = outputs.new_ones(classes) if weights is None else weights
        if targets.is_floating_point():
            mass = (targets.to(outputs.dtype).movedim(axis, -1) * ones).sum(-1)
        else:
            kept = targets != self.ignore_index
            mass = ones[targets.where(kept, 0).long()] * kept
        smooth = self.label_smoothing
        floor = smooth / classes * ones.sum()
        return (1 - smooth) * mass + (floor if targets.is_floating_point() else floor * kept)
