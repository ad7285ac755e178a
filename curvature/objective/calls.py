"""Which part of a model is being called: hooks for the time of one call, to say where something went wrong."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.autograd import _get_sequence_nr
from torch.jit import ScriptModule

from curvature.objective.batches import arrays


class Span(NamedTuple):
    """A call of a part of a model: the nodes of the graph that were made in it have the numbers from `first` to before
    `last`. `fed` says whether something that went in hangs on a graph, `linked` whether all that came out does, and
    `finite` whether that is numbers."""

    part: str
    first: int
    last: int
    fed: bool = False
    linked: bool = True
    finite: bool = True


@dataclass
class CallRecord:
    """The calls of all parts of a model: `ended` in the order they did, and those that are still `open`."""

    ended: list[Span] = field(default_factory=list)
    open: list[Span] = field(default_factory=list)

    def begin(self, part: str, inputs: Any) -> None:
        """A call of `part` begins."""
        fed = any(isinstance(t, Tensor) and t.requires_grad for t in arrays(inputs))
        self.open.append(Span(part, _get_sequence_nr(), sys.maxsize, fed))

    def end(self, part: str, output: Any) -> None:
        """The call of `part` that began last has ended; what began since has raised something that was caught."""
        while self.open:
            span = self.open.pop()
            if span.part == part:
                tensors = [t for t in arrays(output) if isinstance(t, Tensor) and t.is_floating_point()]
                linked = all(t.requires_grad for t in tensors)
                finite = all(bool(t.isfinite().all()) for t in tensors)
                self.ended.append(span._replace(last=_get_sequence_nr(), linked=linked, finite=finite))
                return


@contextmanager
def call_record(module: nn.Module) -> Iterator[CallRecord]:
    """Yields the calls of all parts of `module` that are made while the context lasts; those inside TorchScript are not
    seen, nor that of a scripted model. Parts go by their name and type: "encoder.0 (Linear)"."""
    record = CallRecord()
    with ExitStack() as hooks:
        for name, part in module.named_modules():
            if isinstance(part, ScriptModule) and name:
                continue
            label = f"{name} ({type(part).__name__})" if name else f"the model ({type(part).__name__})"
            try:
                begin = part.register_forward_pre_hook(
                    lambda _, *inputs, label=label: record.begin(label, inputs), prepend=True, with_kwargs=True
                )
            except RuntimeError:  # what torch.jit.script made takes no hooks, what torch.jit.trace made does
                continue
            hooks.callback(begin.remove)
            end = part.register_forward_hook(lambda _, args, output, label=label: record.end(label, output))
            hooks.callback(end.remove)
        yield record
