"""What goes through a model in the passes that others make: the hooks that stay."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from curvature.errors import BadObjective
from curvature.objective.function import tensor_of
from curvature.objective.layers import Capture, argument, captured, inside_transform, whole


class Listener(Protocol):
    """Who is told of the passes that others make through a model."""

    def wants(self, name: str | None) -> bool:
        """Whether a call of this layer, or of the model itself (None), is to be told."""
        ...

    def take(self, name: str | None, input: Tensor | None, gradient: Tensor) -> None:
        """What was kept of the input of a call, and the gradient of its output, as soon as there is one."""
        ...


def listen(listener: Listener, model: nn.Module, modules: Mapping[str, tuple[nn.Module, Capture]]) -> None:
    """Tell a listener of the calls of these modules, and of the outputs of the model, for as long as it lives.

    The model does not keep it alive, and copies of the model know nothing of it.
    """
    own = weakref.ref(listener)
    hooks = [(module, _Told(own, name, capture)) for name, (module, capture) in modules.items()]
    hooks.append((model, _Told(own, None, None)))
    handles = [module.register_forward_hook(hook, with_kwargs=True) for module, hook in hooks]
    weakref.finalize(listener, _remove, handles)


class _Told:
    """The hook of a layer, or, without a name, of the model."""

    def __init__(self, listener: weakref.ref[Listener], name: str | None, capture: Capture | None) -> None:
        self.listener, self.name, self.capture = listener, name, capture

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        listener = self.listener()
        if torch.compiler.is_compiling() or listener is None or not torch.is_grad_enabled():
            return None
        if not listener.wants(self.name):
            return None
        if self.capture is None:
            with suppress(BadObjective):  # outputs that nobody can read tell nothing
                _heard(tensor_of(output), partial(listener.take, None, None))
            return None
        given = argument(args, kwargs)
        if given is None or not isinstance(output, Tensor) or not output.requires_grad or inside_transform(output):
            return None
        output = whole(output)
        _heard(output, partial(listener.take, self.name, captured(self.capture, module, given)))
        return output

    def __reduce__(self) -> Any:
        return _Silent, ()


class _Silent:
    """What becomes of a hook in a copy of its module."""

    def __call__(self, *args: Any) -> None:
        return None


def _heard(output: Tensor, take: Callable[[Tensor], None]) -> None:
    def hook(gradient: Tensor) -> None:
        take(gradient.detach())

    if output.requires_grad:
        output.register_hook(hook)


def _remove(handles: list[Any]) -> None:
    for handle in handles:
        handle.remove()
