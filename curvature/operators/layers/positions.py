"""What goes into a layer, example by example and position by position, and the sums K-FAC takes over it.

A layer is, in each of its groups, a matrix W (out, in) that acts at every position r of every example: with inputs
a_r and gradients g_r of the outputs, the gradient of W in an example is the sum over r of g_r a_r^T.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

PIECE = 1 << 24  # entries of per-example gradients formed at a time: 64 MiB in float32


@dataclass(frozen=True)
class Rows:
    """Vectors, one a group: (examples, positions, groups, in); `ones` puts an entry 1 behind each, for a bias."""

    values: Float[Tensor, "n r g i"]
    ones: bool = False

    @property
    def count(self) -> int:
        """Positions of all examples."""
        return self.values.shape[0] * self.values.shape[1]

    @property
    def vectors(self) -> Float[Tensor, "n r g i"]:
        """The values with their ones."""
        return F.pad(self.values, (0, 1), value=1.0) if self.ones else self.values

    def norm(self) -> float:
        """The norm of all vectors together."""
        ones = self.count * self.values.shape[2] if self.ones else 0
        return (float(torch.linalg.vector_norm(self.values)) ** 2 + ones) ** 0.5

    def projected(self, V: Tensor | None) -> Rows:
        """The vectors in the basis of the columns of V; None is the one they have."""
        return Rows(self.vectors if V is None else torch.einsum("nrgi,gij->nrgj", self.vectors, V))

    def second_moment(self) -> Float[Tensor, "g i i"]:
        """The sum of a a^T over examples and positions."""
        values = self.values.flatten(0, 1)
        if not self.ones:
            return gram(values)
        total = values.sum(0).unsqueeze(-1)  # with a border: patches of convolutions are large to copy
        corner = total.new_full((len(total), 1, 1), len(values))
        return torch.cat([torch.cat([gram(values), total], -1), torch.cat([total.mT, corner], -1)], -2)

    def reduced(self) -> Rows:
        """The mean over the positions of each example."""
        return Rows(self.values.mean(1, keepdim=True), self.ones)

    @staticmethod
    def counted(cotangents: Float[Tensor, "n r g o"]) -> Float[Tensor, "n r g o"]:
        """Those of positions that count: all."""
        return cotangents

    @staticmethod
    def summed(cotangents: Float[Tensor, "n r g o"]) -> Float[Tensor, "n 1 g o"]:
        """What belongs to the reduced inputs: the sum over the positions of each example."""
        return cotangents.sum(1, keepdim=True)

    def gradient(self, cotangents: Float[Tensor, "n r g o"]) -> Float[Tensor, "g o i"]:
        """The sum over the gradients of all examples."""
        cotangents, values = (rows.flatten(0, 1).transpose(0, 1) for rows in (cotangents, self.values))
        weight = cotangents.mT @ values
        return torch.cat([weight, cotangents.sum(1).unsqueeze(-1)], -1) if self.ones else weight

    def whole(self, cotangents: Float[Tensor, "n r g o"]) -> Float[Tensor, "g oi oi"]:
        """The sum of G G^T over the gradients G of examples, a vector for each group: exact, for small groups."""
        return gram(torch.einsum("nrgo,nrgi->ngoi", cotangents, self.vectors).flatten(2))

    def gradients(self, cotangents: Float[Tensor, "n r g o"]) -> Float[Tensor, "n goi"]:
        """The gradient of every example."""
        return torch.einsum("nrgo,nrgi->ngoi", cotangents, self.vectors).flatten(1)

    def each(self, cotangents: Float[Tensor, "n r g o"]) -> Iterator[Float[Tensor, "e goi"]]:
        """The same, of a few examples at a time."""
        examples = max(1, PIECE // (cotangents.shape[2:].numel() * (self.values.shape[-1] + self.ones)))
        for some, values in zip(cotangents.split(examples), self.values.split(examples), strict=True):
            yield Rows(values, self.ones).gradients(some)

    def squares(self, cotangents: Float[Tensor, "n r g o"]) -> Float[Tensor, "g o i"]:
        """The sum of the squared entries of the gradients of examples."""
        values = self.vectors
        if values.shape[1] == 1:
            return torch.einsum("ngo,ngi->goi", cotangents[:, 0].square(), values[:, 0].square())
        total = cotangents.new_zeros(*cotangents.shape[2:], values.shape[-1])
        for gradients in self.each(cotangents):
            total += gradients.view(-1, *total.shape).square().sum(0)
        return total


@dataclass(frozen=True)
class Indices:
    """Indices (examples, positions) of `size` unit vectors that are the inputs of an embedding; -1 for none.

    Its matrix is (size, out), transposed against that of other layers, as embeddings keep it.
    """

    values: Int[Tensor, "n r"]
    size: int

    @property
    def count(self) -> int:
        """Positions of all examples that have an index."""
        return int((self.values >= 0).sum())

    def norm(self) -> float:
        """The norm of all vectors together."""
        return self.count**0.5

    def projected(self, V: Tensor | None) -> Indices:
        """The same: their second moment is diagonal, and V None."""
        return self

    def second_moment(self) -> Float[Tensor, " size"]:
        """How often each index occurs: the diagonal of the sum of a a^T."""
        ids = self.values[self.values >= 0]
        return torch.bincount(ids, minlength=self.size).double()

    def reduced(self) -> Indices:
        """The same: the second moment of means of unit vectors is not diagonal."""
        return self

    def counted(self, cotangents: Float[Tensor, "n r 1 o"]) -> Float[Tensor, "n r 1 o"]:
        """Those of positions that have an index, zero elsewhere: padding has no gradient."""
        return cotangents * (self.values >= 0)[..., None, None]

    def summed(self, cotangents: Float[Tensor, "n r 1 o"]) -> Float[Tensor, "n r 1 o"]:
        """The same, of positions that count."""
        return self.counted(cotangents)

    def gradient(self, cotangents: Float[Tensor, "n r 1 o"]) -> Float[Tensor, "1 size o"]:
        """The sum over the gradients of all examples."""
        kept = self.values >= 0
        rows = cotangents.new_zeros(self.size, cotangents.shape[-1])
        return rows.index_add_(0, self.values[kept], cotangents[:, :, 0][kept]).unsqueeze(0)

    def gradients(self, cotangents: Float[Tensor, "n r 1 o"]) -> Float[Tensor, "n sizeo"]:
        """The gradient of every example."""
        examples = len(self.values)
        kept = self.values >= 0
        place = self.values + self.size * torch.arange(examples, device=kept.device).unsqueeze(1)
        rows = cotangents.new_zeros(examples * self.size, cotangents.shape[-1])
        return rows.index_add_(0, place[kept], cotangents[:, :, 0][kept]).view(examples, -1)

    def each(self, cotangents: Float[Tensor, "n r 1 o"]) -> Iterator[Float[Tensor, "e sizeo"]]:
        """The same, of a few examples at a time."""
        examples = max(1, PIECE // (self.size * cotangents.shape[-1]))
        for some, values in zip(cotangents.split(examples), self.values.split(examples), strict=True):
            yield Indices(values, self.size).gradients(some)

    def squares(self, cotangents: Float[Tensor, "n r 1 o"]) -> Float[Tensor, "1 size o"]:
        """The sum of the squared entries of the gradients of examples."""
        kept = self.values >= 0
        example = torch.arange(len(self.values), device=kept.device).unsqueeze(1).expand_as(kept)
        pairs, place = torch.unique(example[kept] * self.size + self.values[kept], return_inverse=True)
        rows = cotangents.new_zeros(len(pairs), cotangents.shape[-1])
        rows.index_add_(0, place, cotangents[:, :, 0][kept])
        total = cotangents.new_zeros(self.size, cotangents.shape[-1])
        return total.index_add_(0, pairs % self.size, rows.square()).unsqueeze(0)


Inputs = Rows | Indices


def gram(vectors: Float[Tensor, "n g d"]) -> Float[Tensor, "g d d"]:
    """The sum of x x^T in each group."""
    if vectors.shape[1] == 1:
        return (vectors[:, 0].T @ vectors[:, 0]).unsqueeze(0)
    stacked = vectors.transpose(0, 1)
    return stacked.mT @ stacked
