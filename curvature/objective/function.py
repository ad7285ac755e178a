"""What a model and a loss make of one batch: a sum over terms, and how many terms there are.

Two kinds: a model whose outputs a Loss compares with targets (its curvature has a Gauss-Newton part), and any scalar
`loss(model, batch)` (Hessian only).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from curvature.errors import BadObjective, listing
from curvature.objective.batches import leading, lengths, mapped, split, targets_of
from curvature.objective.call import call_with
from curvature.objective.losses import Loss, described
from curvature.objective.losses.criterion import scalar

Tensors = Mapping[str, Tensor]  # parameters and buffers by name


@dataclass(frozen=True)
class OutputLoss:
    """loss(model(inputs), targets), the model called with the given tensors in place of its own."""

    module: nn.Module
    loss: Loss

    @property
    def name(self) -> str:
        """The loss with what it has set apart from its defaults."""
        return described(self.loss)

    def outputs(self, tensors: Tensors, batch: Any) -> tuple[Tensor, Any]:
        """(outputs, targets) for the batch."""
        inputs, targets = split(batch)
        inputs = _copied(inputs)
        args, kwargs = ((), inputs) if isinstance(inputs, Mapping) else (_positional(inputs), {})
        return tensor_of(call_with(self.module, dict(tensors), args, dict(kwargs))), targets

    def total(self, tensors: Tensors, batch: Any) -> Float[Tensor, ""]:
        """The sum of the loss over the terms of the batch."""
        return self.loss.total(*self.outputs(tensors, batch))

    def weight(self, batch: Any) -> float:
        """How many terms the batch has."""
        return float(self.loss.weight(split(batch)[1]))

    def check(self, tensors: Tensors, batch: Any) -> None:
        """Raise BadObjective when outputs and targets do not fit the loss."""
        outputs, targets = self.outputs(tensors, batch)
        if not outputs.is_floating_point():
            raise BadObjective(
                f"The model returned {outputs.dtype} of shape {tuple(outputs.shape)}, which cannot be differentiated.",
                "Return logits or predictions before argmax or thresholding.",
            )
        inputs, _ = split(batch)
        if isinstance(inputs, Mapping) and _unshifted(inputs.get("input_ids"), targets):
            raise BadObjective(
                "The labels are the input_ids, so that each position would be compared with its own token.",
                "Shift the labels by one, or use Objective.from_loss with a loss that does, as m(**batch).loss.",
            )
        self.loss.check(outputs, targets)

    def check_counted(self, batch: Any) -> None:
        """The loss counts its terms."""


@dataclass(frozen=True)
class ScalarLoss:
    """function(model, batch), a mean over `terms(batch)` terms; without `terms` they are counted by `counted`."""

    module: nn.Module
    function: Callable[[nn.Module, Any], Tensor]
    terms: Callable[[Any], float] | None = None

    @property
    def name(self) -> str:
        return getattr(self.function, "__qualname__", type(self.function).__qualname__)

    @property
    def no_outputs(self) -> BadObjective:
        """The error of asking for what needs the outputs of the model."""
        return BadObjective(
            f"{self.name} returns a scalar, and this needs the model's outputs.",
            "Build the objective with Objective.of(model, loss, data); of a scalar there is the Hessian.",
        )

    def outputs(self, tensors: Tensors, batch: Any) -> tuple[Tensor, Any]:
        raise self.no_outputs

    def total(self, tensors: Tensors, batch: Any) -> Float[Tensor, ""]:
        """The loss of the batch times its number of terms."""
        bound = _Bound(self.module, self.function)
        loss = call_with(bound, {f"module.{name}": t for name, t in tensors.items()}, (_copied(batch),), {})
        return scalar(loss) * self.weight(batch)

    def weight(self, batch: Any) -> float:
        """How many terms the batch has; the loss is a mean over them."""
        return float(self.terms(batch) if self.terms is not None else counted(self.module, batch))

    def check(self, tensors: Tensors, batch: Any) -> None:
        """Raise BadObjective when the loss is no scalar."""
        self.total(tensors, batch)

    def check_counted(self, batch: Any) -> None:
        """Raise BadObjective when the number of terms would be a guess, of which only a single batch is independent."""
        found = sorted(lengths(batch))
        if self.terms is None and len(found) > 1:
            raise _uncounted(f"whose tensors have {listing(found)} entries")


def counted(module: nn.Module, batch: Any) -> int:
    """How many terms a mean loss of this batch is over: integer targets that are not -100, else the number of examples.

    Hugging Face's causal models compare each position with the next label, so that the first label counts for nothing.
    """
    targets = targets_of(batch)
    if isinstance(targets, Tensor) and not targets.is_floating_point() and targets.ndim:
        causal = targets.ndim == 2 and type(module).__name__.endswith(("ForCausalLM", "LMHeadModel"))
        return int(((targets[:, 1:] if causal else targets) != -100).sum())
    length = leading(batch)
    if length is None:
        raise _uncounted(f"of type {type(batch).__name__}")
    return length


def _uncounted(kind: str) -> BadObjective:
    return BadObjective(
        f"How many terms a batch {kind} averages over cannot be read from it.",
        "Pass terms=lambda batch: ... to Objective.from_loss (1 if the loss is a sum over what a batch holds).",
    )


class _Bound(nn.Module):
    """A loss with its model as a submodule, so that the model's tensors can be given by name."""

    def __init__(self, module: nn.Module, function: Callable[[nn.Module, Any], Tensor]) -> None:
        super().__init__()
        self.module, self.function = module, function

    def forward(self, batch: Any) -> Tensor:
        return self.function(self.module, batch)


def _unshifted(ids: Any, labels: Any) -> bool:
    """Whether labels are what Hugging Face's causal models take, which shift them inside: input_ids, or -100."""
    if not (isinstance(ids, Tensor) and isinstance(labels, Tensor) and ids.shape == labels.shape):
        return False
    kept = labels != -100
    return bool(kept.any() and (ids == labels)[kept].all())


def _copied(batch: Any) -> Any:
    """The batch with copies of its tensors: a model may begin with an operation in place."""
    return mapped(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, batch)


def _positional(inputs: Any) -> tuple[Any, ...]:
    return inputs if type(inputs) is tuple else (inputs,)  # a PackedSequence, for one, is a tuple and one argument


def tensor_of(outputs: Any) -> Tensor:
    """The logits or predictions among what a model returned."""
    if isinstance(outputs, Tensor):
        return outputs
    if isinstance(outputs, Mapping) and "logits" in outputs:
        return outputs["logits"]
    logits = getattr(outputs, "logits", None)
    if isinstance(logits, Tensor):
        return logits
    first, last = getattr(outputs, "start_logits", None), getattr(outputs, "end_logits", None)
    if isinstance(first, Tensor) and isinstance(last, Tensor):
        return torch.stack([first, last], -1)  # (n, tokens, 2): where an answer begins, and where it ends
    if isinstance(outputs, list | tuple) and outputs and isinstance(outputs[0], Tensor):
        return outputs[0]
    raise BadObjective(
        f"The model returned a {type(outputs).__name__}, in which no output tensor is recognised.",
        "Return a tensor, something with .logits, or use Objective.from_loss.",
    )


def cast(tensors: Tensors, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """Detached copies on `device`, floating-point ones in `dtype`; of inference mode's tensors, too, for autograd."""
    with torch.inference_mode(False):
        return {
            name: t.detach().to(device, dtype if t.is_floating_point() else None, copy=True)
            for name, t in tensors.items()
        }
