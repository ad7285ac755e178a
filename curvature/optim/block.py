"""Blocks: the parameters that a preconditioner treats as a unit."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from math import prod
from typing import Literal

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from curvature.linalg.space import Space

Role = Literal["matrix", "embedding", "head", "vector", "scalar"]
Grain = Literal["shape", "model"]

EMBEDDINGS = ("*embed*", "*wte*", "*wpe*", "*emb.*", "*_emb", "*tokens.*", "*positions.*")
HEADS = ("*lm_head*", "head.*", "*.head.*", "*unembed*", "*classifier.*", "*readout*")


@dataclass(frozen=True, eq=False)
class Block:
    """Parameters of one dtype on one device that are treated at once: a stack of parameters of one shape and role, or
    with the grain "model" all of them, one after another.

    A vector of a block has the entries of its parameters in order, each row-major: for a stack it is (stack, *shape)
    whatever the parameters are.
    """

    names: tuple[str, ...]
    params: tuple[Tensor, ...]
    grain: Grain
    role: Role

    @property
    def stack(self) -> int:
        """How many parameters."""
        return len(self.params)

    @cached_property
    def shape(self) -> torch.Size:
        """That of each parameter, for the grain "shape"."""
        return self.params[0].shape

    @cached_property
    def matrix(self) -> tuple[int, int]:
        """Rows and columns when each parameter is read as a matrix: a row for every entry of its first axis."""
        shape = self.shape
        return (shape[0], prod(shape[1:])) if len(shape) > 1 else (1, prod(shape))

    @cached_property
    def space(self) -> Space:
        """Its vectors: float32 for parameters in half precision."""
        return Space(sum(p.numel() for p in self.params), self.dtype, self.params[0].device)

    @cached_property
    def dtype(self) -> torch.dtype:
        return torch.promote_types(self.params[0].dtype, torch.float32)

    def zeros(self, *more: int) -> Tensor:
        """Room for a vector as a state holds it, (stack, *shape) or (n,); for `more` of them, these axes come before
        the last or after the first."""
        if self.grain == "model":
            return torch.zeros(*more, self.space.size, dtype=self.dtype, device=self.space.device)
        return torch.zeros(self.stack, *more, *self.shape, dtype=self.dtype, device=self.space.device)

    def gathered(self, tensors: Sequence[Tensor]) -> Float[Tensor, " n"]:
        """One vector of a tensor for each parameter; may share memory with a single one."""
        if len(tensors) == 1:
            return tensors[0].detach().reshape(-1).to(self.dtype)
        return torch.cat([tensor.detach().reshape(-1) for tensor in tensors]).to(self.dtype)

    def scattered(self, vector: Shaped[Tensor, " n"]) -> list[Tensor]:
        """The tensors whose entries a vector holds, as views."""
        pieces = vector.split([p.numel() for p in self.params])
        return [piece.view(p.shape) for piece, p in zip(pieces, self.params, strict=True)]

    def some(self, rows: Sequence[int]) -> Block:
        """The block of some of its parameters."""
        names, params = tuple(self.names[i] for i in rows), tuple(self.params[i] for i in rows)
        return Block(names, params, self.grain, self.role)


def role_of(name: str, param: Tensor, roles: dict[str, Role]) -> Role:
    """What a parameter is for: as `roles` says by globs of names, else by its name, else by its shape."""
    for pattern, role in roles.items():
        if fnmatchcase(name, pattern):
            return role
    if param.ndim < 2 or param.numel() == max(param.shape):
        return "scalar" if param.numel() == 1 else "vector"
    if any(fnmatchcase(name, pattern) for pattern in EMBEDDINGS):
        return "embedding"
    return "head" if any(fnmatchcase(name, pattern) for pattern in HEADS) else "matrix"


def blocks_of(named: Iterable[tuple[str, Tensor, Role]], grain: Grain) -> list[Block]:
    """Stacks of the parameters that have a shape, role, dtype and device in common; or all of a dtype and device."""
    groups: dict[tuple, list[tuple[str, Tensor, Role]]] = {}
    for name, param, role in named:
        kind = (param.dtype, param.device) if grain == "model" else (param.dtype, param.device, param.shape, role)
        groups.setdefault(kind, []).append((name, param, role))
    return [
        Block(tuple(n for n, _, _ in members), tuple(p for _, p, _ in members), grain, members[0][2])
        for members in groups.values()
    ]
