"""Losses of logits: cross-entropy, Kullback-Leibler divergence, binary cross-entropy."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from curvature.errors import BadObjective
from curvature.objective.losses.closed import chunked, chunks, total
from curvature.objective.losses.elements import (
    Over,
    Uniform,
    check_elements,
    check_rows,
    count_of,
    example_axes,
    one_by_one,
)

NARROW = 16  # classes: along a last axis that is shorter, softmax on a CPU takes 7 times as long as along another


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
        return frozenset({"ggn", "sample"})

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
        if classes < 2:
            raise BadObjective(
                f"The outputs {tuple(outputs.shape)} have one class, the cross-entropy of which is always 0.",
                'Take "bce" for two classes by one output, "mse" for numbers.',
            )
        if targets.is_floating_point() and not bool((targets >= 0).all()):
            raise BadObjective(
                "Targets shaped like the outputs are probabilities, but some are negative, or not a number.",
                'Give probabilities, or class indices; for numbers take "mse".',
            )
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
        return total(self, outputs, targets)

    def value(self, outputs: Tensor, targets: Tensor) -> Float[Tensor, ""]:
        """The same, without derivatives."""
        sums = [self._value(logits, wanted) for logits, wanted in chunks(*self._arranged(outputs, targets))]
        return torch.stack(sums).sum()

    def weight(self, targets: Tensor) -> Float[Tensor, ""]:
        if targets.is_floating_point():
            classes = targets.shape[-1 if self.axis is None else self.axis]
            return torch.tensor(targets.numel() / classes, dtype=torch.float64)
        kept = targets[targets != self.ignore_index]
        if self.class_weights is None:
            return torch.tensor(kept.numel(), dtype=torch.float64)
        return torch.tensor(self.class_weights, dtype=torch.float64, device=targets.device)[kept.long()].sum()

    def event(self, outputs: Tensor, targets: Tensor) -> tuple[int, ...]:
        """The class axis: every position is a term of its own."""
        return (self._axis(outputs, targets),)

    def residual(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """m p - q for every term: p the softmax, q the weighted and smoothed target distribution, m the mass of q."""
        axis = self._axis(outputs, targets)
        return chunked(partial(self._residual, axis), outputs, targets)

    def hessian_product(self, outputs: Tensor, targets: Tensor, tangent: Tensor) -> Tensor:
        """m p (u - p . u) for every term, with p the softmax and m the mass of its target distribution."""
        axis = self._axis(outputs, targets)
        return chunked(partial(self._hessian_product, axis), outputs, targets, tangent)

    def root(self, outputs: Tensor, targets: Tensor) -> Iterator[Tensor]:
        """sqrt(m p_c) (p - e_c) for every term, class c after class."""
        axis = self._axis(outputs, targets)
        p = outputs.softmax(axis)
        mass = self._mass(outputs, targets, axis)
        for c in range(outputs.shape[axis]):
            residual = p.clone()
            residual.select(axis, c).sub_(1)
            yield residual * (mass * p.select(axis, c)).sqrt().unsqueeze(axis)

    def sample(self, outputs: Tensor, targets: Tensor, uniform: Uniform) -> Tensor:
        """sqrt(m) (p - e_c) for every term, with the class c drawn from the softmax p."""
        axis = self._axis(outputs, targets)
        return chunked(partial(self._sample, axis, uniform), outputs.detach(), targets)

    def right(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """For how many terms the largest output is the target, or the most probable one; and how many there are."""
        axis = self._axis(outputs, targets)
        wanted = targets.argmax(axis) if targets.is_floating_point() else targets
        kept = wanted != self.ignore_index
        return ((outputs.argmax(axis) == wanted) & kept).sum(), kept.sum()

    def _value(self, logits: Float[Tensor, "t c"], wanted: Tensor) -> Float[Tensor, ""]:
        weights = None if self.class_weights is None else self._weights(logits, logits.shape[1])
        if logits.shape[1] < NARROW:
            logits = logits.mT.contiguous().unsqueeze(0)
            wanted = (wanted.mT if wanted.is_floating_point() else wanted).unsqueeze(0)
        return F.cross_entropy(
            logits,
            wanted,
            weights,
            ignore_index=self.ignore_index,
            reduction="sum",
            label_smoothing=self.label_smoothing,
        )

    def _residual(self, axis: int, outputs: Tensor, targets: Tensor) -> Tensor:
        p_mass = outputs.softmax(axis) * self._mass(outputs, targets, axis).unsqueeze(axis)
        classes, smooth = outputs.shape[axis], self.label_smoothing
        weights = self._weights(outputs, classes)
        if targets.is_floating_point():
            q = (1 - smooth) * targets.to(outputs.dtype).movedim(axis, -1) + smooth / classes
            return p_mass - (q * weights).movedim(-1, axis)
        kept = targets != self.ignore_index
        chosen = targets.where(kept, 0).long()
        if smooth:
            uniform = (smooth / classes * weights).expand(*targets.shape, classes) * kept.unsqueeze(-1)
            p_mass = p_mass - uniform.movedim(-1, axis)
        mass = (1 - smooth) * weights[chosen] * kept
        return p_mass.scatter_add(axis, chosen.unsqueeze(axis), -mass.unsqueeze(axis))

    def _hessian_product(self, axis: int, outputs: Tensor, targets: Tensor, tangent: Tensor) -> Tensor:
        p = outputs.softmax(axis)
        along = torch.linalg.vecdot(p, tangent, dim=axis).unsqueeze(axis)
        return p * (tangent - along) * self._mass(outputs, targets, axis).unsqueeze(axis)

    def _sample(self, axis: int, uniform: Uniform, outputs: Tensor, targets: Tensor) -> Tensor:
        p = outputs.movedim(axis, -1).softmax(-1)
        steps = p.double().cumsum(-1)
        drawn = uniform(p.shape[:-1]).unsqueeze(-1) * steps[..., -1:]  # sums round: the last is not 1
        chosen = torch.searchsorted(steps, drawn, right=True).clamp(max=p.shape[-1] - 1)
        residual = p.scatter_add(-1, chosen, p.new_full(chosen.shape, -1))
        return residual.movedim(-1, axis) * self._mass(outputs, targets, axis).sqrt().unsqueeze(axis)

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
            raise BadObjective(
                f"The classes of {shapes} may lie on axis 1 or -1.",
                "Say CrossEntropy(axis=...), on the command line in the code of --objective.",
            )
        check_rows(outputs, targets)
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

    def _weights(self, outputs: Tensor, classes: int) -> Tensor:
        return outputs.new_ones(classes) if self.class_weights is None else outputs.new_tensor(self.class_weights)

    def _mass(self, outputs: Tensor, targets: Tensor, axis: int) -> Tensor:
        """The mass m of every term's weighted and smoothed target distribution, without the class axis."""
        classes = outputs.shape[axis]
        weights = self._weights(outputs, classes)
        if targets.is_floating_point():
            mass = (targets.to(outputs.dtype).movedim(axis, -1) * weights).sum(-1)
        else:
            kept = targets != self.ignore_index
            mass = weights[targets.where(kept, 0).long()] * kept
        smooth = self.label_smoothing
        floor = smooth / classes * weights.sum()
        return (1 - smooth) * mass + (floor if targets.is_floating_point() else floor * kept)


@dataclass(frozen=True)
class KLDivergence:
    """sum_c q_c (log q_c - log softmax(outputs)_c), averaged over terms, for target distributions q.

    Cross-entropy less the entropy of the targets: its derivatives are the same. q is shaped like the outputs. The class
    axis is the last, or 1; where both have the right length, `axis` must say.
    """

    axis: int | None = None

    @property
    def offers(self) -> frozenset[str]:
        return self._cross_entropy.offers

    def check(self, outputs: Tensor, targets: Any) -> None:
        """Raise BadObjective unless targets are distributions shaped like the outputs."""
        if not isinstance(targets, Tensor) or not targets.is_floating_point():
            raise BadObjective(
                "The divergence takes target distributions, as floating-point numbers shaped like the outputs.",
                "For class indices use the loss 'cross-entropy'.",
            )
        if (targets < 0).any():
            raise BadObjective(
                "A target distribution has negative entries.", "Give probabilities, not their logarithms."
            )
        self._cross_entropy.check(outputs, targets)

    def total(self, outputs: Tensor, targets: Tensor) -> Float[Tensor, ""]:
        return self._cross_entropy.total(outputs, targets) + torch.special.xlogy(targets, targets).sum()

    def weight(self, targets: Tensor) -> Float[Tensor, ""]:
        return self._cross_entropy.weight(targets)

    def event(self, outputs: Tensor, targets: Tensor) -> tuple[int, ...]:
        """The class axis."""
        return self._cross_entropy.event(outputs, targets)

    def residual(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return self._cross_entropy.residual(outputs, targets)

    def hessian_product(self, outputs: Tensor, targets: Tensor, tangent: Tensor) -> Tensor:
        return self._cross_entropy.hessian_product(outputs, targets, tangent)

    def root(self, outputs: Tensor, targets: Tensor) -> Iterator[Tensor]:
        return self._cross_entropy.root(outputs, targets)

    def sample(self, outputs: Tensor, targets: Tensor, uniform: Uniform) -> Tensor:
        return self._cross_entropy.sample(outputs, targets, uniform)

    def right(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        return self._cross_entropy.right(outputs, targets)

    @property
    def _cross_entropy(self) -> CrossEntropy:
        return CrossEntropy(axis=self.axis)


@dataclass(frozen=True)
class BinaryCrossEntropy:
    """-(w y log s + (1 - y) log(1 - s)) with s = sigmoid(outputs), for every element, of targets y between 0 and 1.

    Averaged over all elements, as `nn.BCEWithLogitsLoss` does, or summed within and averaged over examples.
    `positive_weights` w, one for each entry of the last axis, or a single one, are torch's `pos_weight`.
    """

    positive_weights: tuple[float, ...] | None = None
    over: Over = "elements"

    @property
    def offers(self) -> frozenset[str]:
        return frozenset({"ggn", "sample"})

    @classmethod
    def of(cls, module: nn.BCEWithLogitsLoss) -> BinaryCrossEntropy:
        """The loss that the torch module computes."""
        if module.reduction != "mean" or module.weight is not None:
            raise BadObjective(
                "BCEWithLogitsLoss with a weight, or another reduction than 'mean', is not a mean over elements.",
                "Use reduction='mean' and no weight, or Objective.from_loss.",
            )
        pos_weight = module.pos_weight
        if pos_weight is not None and pos_weight.ndim > 1:
            raise BadObjective(
                f"pos_weight has shape {tuple(pos_weight.shape)}.", "Give one number for each entry of the last axis."
            )
        return cls(None if pos_weight is None else tuple(pos_weight.reshape(-1).tolist()))

    def check(self, outputs: Tensor, targets: Any) -> None:
        """Raise BadObjective unless targets are probabilities shaped like the outputs."""
        check_elements("Binary cross-entropy", outputs, targets, "choose the loss 'cross-entropy' for class indices")
        if targets.numel() and not 0 <= float(targets.min()) <= float(targets.max()) <= 1:
            raise BadObjective(
                f"Targets run from {float(targets.min()):g} to {float(targets.max()):g}, but lie between 0 and 1.",
                "Give 0 and 1, or probabilities.",
            )
        count = len(self.positive_weights or (1.0,))
        if count > 1 and (outputs.ndim == 0 or outputs.shape[-1] != count):
            raise BadObjective(
                f"{count} positive weights were given for outputs {tuple(outputs.shape)}.",
                "Give one for each entry of the last axis.",
            )

    def total(self, outputs: Tensor, targets: Tensor) -> Float[Tensor, ""]:
        weights = None if self.positive_weights is None else outputs.new_tensor(self.positive_weights)
        targets = targets.to(outputs.dtype)
        return F.binary_cross_entropy_with_logits(outputs, targets, pos_weight=weights, reduction="sum")

    def weight(self, targets: Tensor) -> Float[Tensor, ""]:
        return count_of(targets, self.over)

    def event(self, outputs: Tensor, targets: Tensor) -> tuple[int, ...]:
        """All axes but the first: an example is a term."""
        return example_axes(outputs)

    def residual(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """m s - w y, with the mass m = w y + 1 - y."""
        positive, mass = self._masses(outputs, targets)
        return mass * outputs.sigmoid() - positive

    def hessian_product(self, outputs: Tensor, targets: Tensor, tangent: Tensor) -> Tensor:
        """m s (1 - s) u."""
        s = outputs.sigmoid()
        return self._masses(outputs, targets)[1] * s * (1 - s) * tangent

    def root(self, outputs: Tensor, targets: Tensor) -> Iterator[Tensor]:
        """sqrt(m s (1 - s)), entry after entry."""
        s = outputs.sigmoid()
        return one_by_one((self._masses(outputs, targets)[1] * s * (1 - s)).sqrt())

    def sample(self, outputs: Tensor, targets: Tensor, uniform: Uniform) -> Tensor:
        """sqrt(m) (s - b) with b 1 in the share s of cases, else 0."""
        s = outputs.detach().sigmoid()
        drawn = (uniform(s.shape) < s).to(s.dtype)
        return self._masses(outputs, targets)[1].sqrt() * (s - drawn)

    def right(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """For how many elements the sign of the output says whether the target is above a half; and how many."""
        return ((outputs > 0) == (targets > 0.5)).sum(), torch.tensor(targets.numel(), device=outputs.device)

    def _masses(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """w y, and that plus 1 - y."""
        targets = targets.to(outputs.dtype)
        weights = 1 if self.positive_weights is None else outputs.new_tensor(self.positive_weights)
        return weights * targets, weights * targets + 1 - targets
