"""What goes through the layers of a model while it runs: the only module hooks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

Capture = Callable[[nn.Module, Tensor], Tensor]  # what to keep of the input of a layer


class Call(NamedTuple):
    """One call of a layer: what was kept of its input, where its output hangs in the graph, and the output's shape.

    Nothing is kept of an input that `capture` failed on, of a layer that is called in a way of its own.
    The edge is that of the output itself, whatever an activation in place makes of the tensor afterwards.
    """

    input: Tensor | None
    output: GradientEdge
    shape: torch.Size


@contextmanager
def layer_tape(modules: Mapping[str, tuple[nn.Module, Capture]]) -> Iterator[dict[str, list[Call]]]:
    """Yields the calls of each module, by name, that are made while the context lasts: none, one or several.

    Calls without a tensor as argument and as result, or outside the graph, are not seen.
    """
    calls: dict[str, list[Call]] = {name: [] for name in modules}
    with ExitStack() as hooks:
        for name, (module, capture) in modules.items():
            handle = module.register_forward_hook(_recorder(calls[name], capture), with_kwargs=True)
            hooks.callback(handle.remove)
        yield calls


def _recorder(calls: list[Call], capture: Capture) -> Callable[..., Tensor | None]:
    def record(module: nn.Module, args: tuple, kwargs: dict, output: object) -> Tensor | None:
        given = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
        if given is None or not isinstance(output, Tensor) or not output.requires_grad:
            return None
        kept = None
        with suppress(Exception), torch.no_grad():  # a module that is called in another way than layers of its kind
            kept = capture(module, given.detach())
        if output._is_view():  # an operation in place on a view would take its edge out of the graph
            output = output.clone()
        calls.append(Call(kept, get_gradient_edge(output), output.shape))
        return output

    return record
