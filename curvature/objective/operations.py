"""Functions as the plain operations that they come to, without layers and autograd.

Layers and autograd take time in every call, whatever it computes, and nothing that differentiates inside can be
vectorised. Operations are traced once for all batches of the same shapes.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from contextlib import suppress
from dataclasses import dataclass, field
from operator import getitem
from typing import Any

import torch
from torch import Tensor
from torch._guards import TracingContext, tracing
from torch._subclasses import FakeTensorMode
from torch.fx import Graph, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

Program = Callable[[Tensor, Any], Tensor]  # of a point (n,), or points (k, n), and a batch


@dataclass(frozen=True)
class Operations:
    """What a program does with points and batches of some shapes; `random` if there are random numbers in it."""

    code: Callable[..., Tensor]
    random: bool

    @classmethod
    def of(cls, program: Program, points: Tensor, batch: Any) -> Operations:
        """Those with these points and this batch. Raises whatever the tracer does, and TypeError or ValueError where
        other numbers would make other operations."""
        leaves, structure = tree_flatten(batch)

        def function(points: Tensor, *tensors: Tensor) -> Tensor:
            left = iter(tensors)
            given = [next(left) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            return program(points, tree_unflatten(given, structure))

        # with one fake mode for all values, of which the tracer else makes one each: most of the time that it takes
        with _NothingRead(), tracing(TracingContext(FakeTensorMode(allow_fallback_kernels=True))):
            traced = make_fx(function)(points, *_tensors(batch))
        tags = {tag for node in traced.graph.nodes for tag in getattr(node.target, "tags", ())}
        if torch.Tag.dynamic_output_shape in tags:
            raise ValueError("Shapes in the program depend on numbers in the batch.")
        _lighten(traced.graph)
        traced.recompile()
        return cls(traced.forward, torch.Tag.nondeterministic_seeded in tags)

    def __call__(self, points: Tensor, batch: Any) -> Tensor:
        with torch.no_grad(), torch._C.DisableTorchFunction():
            return self.code(points, *_tensors(batch))


@dataclass
class Bare:
    """A program as the operations that it comes to, traced where shapes are new. TypeError where they cannot be."""

    program: Program
    known: dict[Hashable, Operations | None] = field(default_factory=dict)

    def __call__(self, points: Tensor, batch: Any) -> Tensor:
        operations = self.of(points, batch)
        if operations is None:
            raise TypeError("The program cannot be traced.")
        return operations(points, batch)

    def of(self, points: Tensor, batch: Any) -> Operations | None:
        shapes = shapes_of(batch)
        if shapes is None:
            return None
        if (points.shape, shapes) not in self.known:
            self.known[points.shape, shapes] = None
            with suppress(Exception):  # no tracer can follow everything
                self.known[points.shape, shapes] = Operations.of(self.program, points, batch)
        return self.known[points.shape, shapes]


def _lighten(graph: Graph) -> None:
    """The same with nothing that is not needed: copies of what nobody writes to, and views by way of torch's operators,
    which take three times as long as those of tensors."""
    graph.eliminate_dead_code()
    written = any(_writes(node) for node in graph.nodes)
    for node in list(graph.nodes):
        if node.target is torch.ops.aten.view.default:
            node.op, node.target = "call_method", "view"
        elif node.target is torch.ops.aten.clone.default and not node.kwargs and not written:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)


def _writes(node: Node) -> bool:
    """Whether an operation changes what it is given: as its schema says, or batch normalisation in training."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return node.op == "call_function" and node.target is not getitem
    return schema.is_mutable or (schema.name == "aten::native_batch_norm" and node.args[5] is not False)


def shapes_of(batch: Any) -> Hashable:
    """What batches have in common for which the same operations do the same; None where no tracer could tell."""
    leaves, structure = tree_flatten(batch)
    if not all(isinstance(leaf, Tensor | int | float | str | None) for leaf in leaves):
        return None
    described = [(t.shape, t.stride(), t.dtype, t.device) if isinstance(t, Tensor) else t for t in leaves]
    return structure, *described


def _tensors(batch: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)]


class _NothingRead(TorchFunctionMode):
    """Refuses what would tell a program its numbers behind the tracer's back, which takes them for constants."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in (Tensor.numpy, Tensor.tolist, Tensor.__array__, Tensor.__dlpack__):
            raise TypeError(f"{function.__name__} cannot be traced.")
        return function(*args, **(kwargs or {}))
