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

    Calls without a tensor as argument and as result, outside the graph, or inside a transform, are not seen.
    """
    calls: dict[str, list[Call]] = {name: [] for name in modules}
    with ExitStack() as hooks:
        for name, (module, capture) in modules.items():
            handle = module.register_forward_hook(_recorder(calls[name], capture), with_kwargs=True)
            hooks.callback(handle.remove)
        yield calls


def _recorder(calls: list[Call], capture: Capture) -> Callable[..., Tensor | None]:
    def record(module: nn.Module, args: tuple, kwargs: dict, output: object) -> Tensor | None:
        given = argument(args, kwargs)
        if given is None or not isinstance(output, Tensor) or not output.requires_grad or inside_transform(output):
            return None
        kept, output = captured(capture, module, given), whole(output)
        calls.append(Call(kept, get_gradient_edge(output), output.shape))
        return output

    return record


def argument(args: tuple, kwargs: dict) -> Tensor | None:
    """The first tensor that a module was called with."""
    return next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)


def inside_transform(output: Tensor) -> bool:
    """Whether a tensor is one of torch.func.vmap, grad or the like, and means nothing outside."""
    return torch._C._functorch.is_functorch_wrapped_tensor(output)  # pyright: ignore[reportAttributeAccessIssue]


def captured(capture: Capture, module: nn.Module, input: Tensor) -> Tensor | None:
    """What to keep of the input; None of a module that is called in another way than layers of its kind."""
    with suppress(Exception), torch.no_grad():
        return capture(module, input.detach())


def whole(output: Tensor) -> Tensor:
    """The output, or a copy where it is a view: an operation in place on that would take its edge out of the graph."""
    return output.clone() if output._is_view() else output
