"""Where in a model something goes wrong: which part of it raises, overflows, or cannot be differentiated again.

Nodes of autograd graphs are numbered as they are made. The numbers at the beginning and the end of each call of a part,
and of the backward of each node, tell of any node, of the graphs of first and second derivatives, which part it is of.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import Node

from curvature.errors import printable
from curvature.objective.calls import Span, call_record

if TYPE_CHECKING:
    from curvature.objective.objective import Objective

REFUSING = ("torch::autograd::Error", "torch::autograd::NotImplemented", "Error", "NotImplemented")


def nodes_of(tensors: Iterable[Tensor | None]) -> Iterator[Node]:
    """Every node of the graph behind some tensors, once."""
    seen: set[Node] = set()
    stack = [t.grad_fn for t in tensors if t is not None]
    while stack:
        node = stack.pop()
        if node is not None and node not in seen:
            seen.add(node)
            yield node
            stack.extend(following for following, _ in node.next_functions)


class Replay:
    """A batch once more through the model and the loss of an objective; each question is answered by the name of a
    part, "the loss" where it is outside of all of them, or nothing where it cannot be told."""

    def __init__(self, objective: Objective, batch: Any) -> None:
        self.objective, self.batch = objective, batch
        self.leaves = objective.leaves()
        self.total: Tensor | None = None
        self.backwards: list[tuple[int, int, Node]] = []  # numbers when it began and ended, and the node
        self.running: Node | None = None  # the one that began last
        self.refused: list[Node] = []  # those whose gradients have no derivative
        self.spoilt: Node | None = None  # the first that made what is not finite of what is
        module = objective.function.module
        with objective.context(), objective.randomness(), call_record(module) as self.calls:
            try:
                self.total = objective.total(self.leaves, batch)
            except Exception:  # what it was has been seen
                return

    def raising(self) -> str:
        """Where the forward pass, the backward pass, or the backward pass through that raises."""
        if self.total is None:
            outside = "the loss" if self.calls.ended else ""  # or in what is called unseen, as programs are
            return self.calls.open[-1].part if self.calls.open else outside
        grads = self._gradient
        if grads is not None:
            heads = [g for g in grads if g is not None and g.requires_grad]
            again = self._watched(heads, [torch.ones_like(g) for g in heads], create_graph=False) if heads else ()
            if again is not None:
                return ""
        return "" if self.running is None else self._part(self.running)

    def refusing(self) -> list[str]:
        """What has a gradient without a derivative, with its part."""
        graph = list(nodes_of(self._gradient or ()))  # which fills `refused`
        behind = [node for node in graph if any(n is not None and n.name() in REFUSING for n, _ in node.next_functions)]
        return _each(f"{_name(node)} in {self._part(node)}" for node in self.refused or map(self._maker, behind))

    def overflowing(self) -> str:
        """The first part whose output, or else the first whose gradient, is not finite though all before it is."""
        if self.total is None:
            return ""
        if not self.total.isfinite():
            return next((span.part for span in self.calls.ended if not span.finite), "the loss")
        self._watched([self.total], [torch.ones_like(self.total)], create_graph=False)
        return "" if self.spoilt is None else f"the backward of {_name(self.spoilt)} in {self._part(self.spoilt)}"

    def unlinked(self, names: Sequence[str]) -> str:
        """The first part whose output hangs on no graph though its input, or a parameter of its own, does; or else the
        widest with one of the parameters `names` whose output hangs on a graph that is none of the loss's."""
        owners = {name.rpartition(".")[0] for name in self.leaves}
        cuts = (s.part for s in self.calls.ended if not s.linked and (s.fed or _path(s) in owners))
        return next(cuts, "") or self._passed(names)

    def _passed(self, names: Sequence[str]) -> str:
        if self.total is None:
            return ""
        numbers = sorted(node._sequence_nr() for node in nodes_of([self.total]))
        calls = [s for s in self.calls.ended if s.linked and s.first < s.last]
        met = {s.part for s in calls if bisect_left(numbers, s.first) < bisect_left(numbers, s.last)}
        holders = ("the model", *names)  # the whole model, where it is the loss that cuts
        passed = [s for s in calls if s.part not in met and any(f"{n}.".startswith(f"{_path(s)}.") for n in holders)]
        widest = min(passed, key=lambda s: (s.first, -s.last), default=None)
        return "" if widest is None or _path(widest) == "the model" else widest.part

    def custom(self) -> list[str]:
        """The backwards that are not torch's own, with their parts."""
        found = [node for node in nodes_of([self.total]) if isinstance(node, BackwardCFunction) and not _ours(node)]
        return _each(f"{_name(node)} in {self._part(node)}" for node in found)

    @cached_property
    def _gradient(self) -> Sequence[Tensor | None] | None:
        """The gradient with its graph; None where it raises."""
        if self.total is None or not self.total.requires_grad:
            return ()
        return self._watched([self.total], [torch.ones_like(self.total)], create_graph=True)

    def _watched(
        self, outputs: list[Tensor], cotangents: list[Tensor], *, create_graph: bool
    ) -> Sequence[Tensor | None] | None:
        """The gradients of outputs, while it is known which node runs; None where that raises."""
        for node in nodes_of(outputs):
            node.register_prehook(self._beginning(node))
            node.register_hook(self._ending(node))
        with self.objective.context(), self.objective.randomness():
            try:
                return torch.autograd.grad(
                    outputs,
                    list(self.leaves.values()),
                    cotangents,
                    create_graph=create_graph,
                    retain_graph=True,
                    allow_unused=True,
                )
            except Exception:  # what it was has been seen
                return None

    def _beginning(self, node: Node) -> Callable[..., None]:
        def begin(grads: Any) -> None:
            self.running = node
            self.backwards.append((torch.autograd._get_sequence_nr(), -1, node))

        return begin

    def _ending(self, node: Node) -> Callable[..., None]:
        def end(inputs: Any, outputs: Any) -> None:
            for place in range(len(self.backwards) - 1, -1, -1):
                first, last, other = self.backwards[place]
                if other is node and last < 0:
                    self.backwards[place] = first, torch.autograd._get_sequence_nr(), node
                    break
            if any(t is not None and t.grad_fn is not None and t.grad_fn.name() in REFUSING for t in inputs):
                self.refused.append(node)
            if self.spoilt is None and not _finite(inputs) and _finite(outputs):
                self.spoilt = node

        return end

    def _maker(self, node: Node) -> Node:
        """The node of the forward pass in whose backward this one was made; itself where it is of the forward pass."""
        number = node._sequence_nr()
        return next((maker for first, last, maker in self.backwards if first <= number < last), node)

    def _part(self, node: Node) -> str:
        number = self._maker(node)._sequence_nr()
        inside = [s for s in (*self.calls.ended, *self.calls.open) if s.first <= number < s.last]
        return min(inside, key=lambda s: s.last - s.first).part if inside else "the loss"


def _path(span: Span) -> str:
    return span.part.partition(" (")[0]


def _finite(tensors: Iterable[Tensor | None]) -> bool:
    return all(t is None or bool(t.isfinite().all()) for t in tensors)


def _ours(node: BackwardCFunction) -> bool:
    return type(node)._forward_cls.__module__.startswith("curvature.")  # pyright: ignore[reportAttributeAccessIssue]


def _name(node: Node) -> str:
    """'Softmax' for SoftmaxBackward0."""
    return printable(node.name().removeprefix("torch::autograd::").rstrip("0123456789").removesuffix("Backward"))


def _each(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))
