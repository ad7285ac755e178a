"""The map between flat vectors and the named parameters of a model, and the choice of parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from itertools import accumulate
from typing import Any, Literal

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from curvature.errors import BadObjective
from curvature.linalg.space import Space

Select = str | Sequence[str] | Callable[[str, nn.Parameter], bool]
By = Literal["layer", "parameter"] | Mapping[str, str | Sequence[str]]


@dataclass(frozen=True)
class ParamSpace(Space):
    """Flat vectors over named tensors: one after another in the order of `names`, each flattened row-major."""

    names: tuple[str, ...] = ()
    shapes: tuple[torch.Size, ...] = field(default=())

    @classmethod
    def of(cls, params: Mapping[str, Tensor]) -> ParamSpace:
        """The space of vectors shaped like `params`, which are of one dtype on one device."""
        first = next(iter(params.values()))
        return cls(
            size=sum(p.numel() for p in params.values()),
            dtype=first.dtype,
            device=first.device,
            names=tuple(params),
            shapes=tuple(p.shape for p in params.values()),
        )

    def flatten(self, tensors: Iterable[Tensor]) -> Float[Tensor, " n"]:
        """One vector of tensors given in the order of `names`."""
        return torch.cat([t.reshape(-1) for t in tensors])

    def unflatten(self, row: Shaped[Tensor, " n"]) -> list[Tensor]:
        """The tensors whose entries `row` holds, as views, in the order of `names`."""
        pieces = row.split([shape.numel() for shape in self.shapes])
        return [piece.view(shape) for piece, shape in zip(pieces, self.shapes, strict=True)]

    def places(self, by: By = "layer") -> dict[str, Tensor]:
        """The coordinates of each layer (module with parameters of its own), of each parameter, or of each group that
        `by` names by globs of parameters and layers, as in {"attention": "*.attn", "rest": "*.mlp"}."""
        index = self.named(torch.arange(self.size, device=self.device))
        groups = self.groups(by)
        return {group: torch.cat([index[name].reshape(-1) for name in names]) for group, names in groups.items()}

    def groups(self, by: By = "layer", *, root: str = "model") -> dict[str, list[str]]:
        """The names of the parameters of each; `root` is what the module itself is called, which has no name."""
        groups: dict[str, list[str]] = {}
        if isinstance(by, Mapping):
            if not by:
                raise ValueError("by names no group.")
            matches = {group: predicate(globs) for group, globs in by.items()}
            for group, match in matches.items():
                groups[group] = [name for name in self.names if match(name, None)]
                if not groups[group]:
                    raise nothing_selected(by[group], list(self.names))
            return groups
        if by not in ("layer", "parameter"):
            raise ValueError(f"by is 'layer', 'parameter' or a mapping of groups, but got {by!r}.")
        for name in self.names:
            groups.setdefault((name.rpartition(".")[0] or root) if by == "layer" else name, []).append(name)
        return groups

    def named(self, row: Shaped[Tensor, " n"]) -> dict[str, Tensor]:
        """The same by name."""
        return dict(zip(self.names, self.unflatten(row), strict=True))


def chosen(module: nn.Module, select: Select | None) -> dict[str, nn.Parameter]:
    """The trainable parameters of `module` that `select` names: globs of parameters or layers, or a predicate.

    Raises BadObjective when that leaves none.
    """
    trainable = {name: p for name, p in module.named_parameters() if p.requires_grad}
    if not trainable:
        raise BadObjective(
            "The model has no trainable parameters.",
            "Unfreeze some with requires_grad_(True); quantised models need their float original.",
        )
    matches = predicate(select)
    kept = {name: p for name, p in trainable.items() if matches(name, p)}
    if not kept:
        raise nothing_selected(select, list(trainable))
    return kept


def nothing_selected(select: Select | None, names: list[str]) -> BadObjective:
    """The error of a selection that matches none of `names`."""
    what = "the selection" if callable(select) else repr(select)
    return BadObjective(
        f"No trainable parameter matches {what}.", f"The names are {', '.join(names[:5])}, ... ({len(names)} in all)."
    )


def predicate(select: Select | None) -> Callable[[str, Any], bool]:
    """Whether a parameter is chosen, by its name and itself; a glob may also name a layer that it is somewhere in."""
    if callable(select):
        return select
    globs = ["*"] if select is None else [select] if isinstance(select, str) else list(select)
    return lambda name, _: any(fnmatchcase(path, glob) for path in _paths(name) for glob in globs)


def _paths(name: str) -> list[str]:
    """The name of a parameter and of the layers that it is in."""
    return list(accumulate(name.split("."), "{}.{}".format))
