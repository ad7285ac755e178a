"""K-FAC and EKFAC: the inverse of a Fisher matrix that has a Kronecker product for every layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple, Unpack

import torch
from torch import Tensor, nn

from curvature.errors import NeedsEvidence, NonFinite
from curvature.linalg.known import known_diagonal
from curvature.linalg.operator import LinearOperator
from curvature.linalg.roots import eigen
from curvature.linalg.structured import BlockDiagonal, Diagonal, Kronecker, Places, Spectral
from curvature.operators.kfac import Bases, Sharing, kfac, second_moments
from curvature.operators.layer_record import LayerRecord
from curvature.operators.residuals import FisherKind
from curvature.optim.block import Block, Grain
from curvature.optim.checks import check_numbers
from curvature.optim.evidence import Evidence
from curvature.optim.optimizer import Options, Params, PreconditionedOptimizer
from curvature.optim.preconditioner import Need, State
from curvature.optim.rules.adam import AdamDiagonal
from curvature.optim.update import ClipKL, Finish, Graft, Momentum

Match = Literal["adam", "kl", "none"]

FAILURES = 3  # decompositions, or mini-batches, in a row after which training has come to an end
WHOLE = "block."  # how names of the state begin, and, for a layer or a parameter of that NAME, end
SEEN, MISSED, FAILED = WHOLE + "seen", WHOLE + "missed", WHOLE + "failed"
PLACES, L2 = WHOLE + "places", WHOLE + "l2"
LEFT, RIGHT, SQUARE, MOMENTS = ".left", ".right", ".square", ".moments"
VALUES, VECTORS = ".values", ".vectors"


@dataclass(frozen=True)
class KroneckerFisher:
    """(F + damping I)^-1, where F is L ⊗ R for every layer, L = E[g g^T] and R = E[a a^T] as `kfac` has them, and a
    diagonal for parameters without a layer. The l2 of the objective is more damping.

    Factors are averages over the mini-batches of every `collect` steps, the k-th with the weight max(1/k, 1 - beta).
    They are decomposed every `refresh` steps, and when there have been 1, 2, 4, ... mini-batches: those of the first
    alone would do harm until then. Damping is added to the products of their eigenvalues; with `factored` it is that of
    (L + sqrt(damping) / pi I) ⊗ (R + pi sqrt(damping) I), where pi^2 is the mean eigenvalue of R over that of L, and
    exact where a factor is a number. With `corrected` there are averages of the squared gradients along the
    eigenvectors in the place of products (EKFAC); when the eigenvectors turn by Q, averages v become the diagonal of
    Q diag(v) Q^T. Layers are those of the first mini-batch.

    With a `record` the mini-batch is not needed: it has seen the layers in the passes whose gradients these are. The
    diagonals are then those of T g g^T, of the gradient g of the mean of T terms.

    The state has for a layer "block.NAME.left" and ".right" with their eigenvalues and eigenvectors, for another
    parameter "block.NAME.square", and in "block.places" the coordinates of all these, one after another.
    """

    fisher: FisherKind = "sampled"
    sharing: Sharing = "expand"
    damping: float = 1e-3
    beta: float = 0.95
    collect: int = 1
    refresh: int = 10
    corrected: bool = False
    factored: bool = False
    record: LayerRecord | None = None
    needs: ClassVar[frozenset[Need]] = frozenset({"objective"})
    grain: ClassVar[Grain] = "model"

    def __post_init__(self) -> None:
        check_numbers(self)
        if self.fisher not in ("sampled", "empirical", "type-2"):
            raise ValueError(f"fisher is 'sampled', 'empirical' or 'type-2', but got {self.fisher!r}.")
        if self.sharing not in ("expand", "reduce"):
            raise ValueError(f"sharing is 'expand' or 'reduce', but got {self.sharing!r}.")
        if not self.damping > 0 or not 0 <= self.beta < 1:
            raise ValueError(f"Expected damping > 0 and 0 <= beta < 1, but got {self.damping} and {self.beta}.")
        if self.collect < 1 or self.refresh < 1 or self.refresh % self.collect:
            raise ValueError(
                f"every is a multiple of collect, which is 1 or more, but got {self.refresh} and {self.collect}."
            )

    @property
    def every(self) -> int:
        return self.collect

    def refuses(self, block: Block) -> str | None:
        return None

    def init(self, block: Block) -> State:
        return {
            name: torch.zeros(1, dtype=torch.float64, device=block.space.device) for name in (SEEN, MISSED, FAILED, L2)
        }

    def update(self, state: State, block: Block, evidence: Evidence, due: bool) -> None:
        seen = self._seen(state, block, evidence, due)
        if seen is None or not _finite(seen, state, block):
            return
        if PLACES in state:
            fresh = _fitted(seen, state)
        else:
            fresh, state[PLACES] = seen.fresh, _coordinates(seen)
        state[SEEN] += 1
        count = int(state[SEEN])
        weight = max(1 / count, 1 - self.beta)
        _average(state, fresh, weight)
        if evidence.taken % self.refresh == 0 or count & (count - 1) == 0:
            _decompose(state)
        if self.corrected and (objective := evidence.objective) is not None:
            bases = {name: _bases(state, name) for name in _named(state, LEFT) if WHOLE + name + LEFT in fresh}
            moments = second_moments(objective, bases, fisher=self.fisher, seed=evidence.seed)
            _average(state, {WHOLE + name + MOMENTS: tensor for name, tensor in moments.items()}, weight)

    def _seen(self, state: State, block: Block, evidence: Evidence, due: bool) -> Statistics | None:
        """What this step tells, if it is due."""
        if self.record is not None:
            self.record.asked[block.names[0]] = (evidence.taken + 1) % self.collect == 0
            seen = due and not self.record.missed
            return _recorded(self.record, block, evidence, PLACES in state) if seen else None
        if not due or evidence.objective is None:
            return None
        state[L2].fill_(evidence.objective.l2)
        F = kfac(evidence.objective, fisher=self.fisher, sharing=self.sharing, seed=evidence.seed)
        return _statistics(F)

    def operator(self, state: State, block: Block, evidence: Evidence, damping: float | None) -> LinearOperator:
        if PLACES not in state:  # statistics were not finite yet
            return Diagonal(block.zeros(), psd=True)
        damping = self.damping if damping is None else damping
        shift = damping + state[L2].to(block.dtype)
        blocks: dict[str, LinearOperator] = {}
        for name in _named(state, LEFT):
            if self.corrected:
                values = state[WHOLE + name + MOMENTS] + shift
            else:
                values = _products(state, name, shift, self.factored)
            blocks[name] = Spectral(values.reciprocal_(), *_bases(state, name), psd=True)
        for name in _named(state, SQUARE):
            blocks[name] = Diagonal((state[WHOLE + name + SQUARE] + shift).reciprocal_(), psd=True)
        places = Places(zip(blocks, state[PLACES].split([A.shape[0] for A in blocks.values()]), strict=True))
        return BlockDiagonal(blocks, places, block.space, source={"operator": "inverse of kfac", "damping": damping})


def _finite(seen: Statistics, state: State, block: Block) -> bool:
    """Whether statistics are; counts those in a row that are not, and raises NonFinite at the third."""
    fine = all(bool(tensor.isfinite().all()) for tensor in seen.fresh.values())
    state[MISSED] += 1
    state[MISSED] *= not fine
    if state[MISSED] >= FAILURES:
        raise NonFinite(
            f"The factors of {block.names[0]} and others were not finite in {FAILURES} mini-batches in a row.",
            "Lower the learning rate, or look for what is not finite in the data.",
        )
    return fine


def _average(state: State, fresh: State, weight: float) -> None:
    """Take tensors into their averages, which begin with the first."""
    for name, tensor in fresh.items():
        if name in state:
            state[name].lerp_(tensor.to(state[name]), weight)
        else:
            state[name] = tensor.clone()


def _named(state: State, end: str) -> list[str]:
    """The layers or parameters of which there is a tensor whose name has this end."""
    return sorted(name.removeprefix(WHOLE).removesuffix(end) for name in state if name.endswith(end))


@dataclass(frozen=True)
class RecordedFisher(KroneckerFisher):
    """The same of a `record`, without the mini-batch."""

    needs: ClassVar[frozenset[Need]] = frozenset({"grad"})


class Statistics(NamedTuple):
    """What a mini-batch tells: the factors of layers and the diagonals of other parameters, by names of the state;
    where each layer and parameter has its coordinates; and the whole diagonal."""

    fresh: State
    places: Mapping[str, Tensor | slice]
    diagonal: Callable[[], Tensor | None]


def _statistics(F: BlockDiagonal) -> Statistics:
    """Those of a K-FAC matrix."""
    found: State = {}
    for name, A in F.blocks.items():
        if isinstance(A, Kronecker):
            found |= {WHOLE + name + LEFT: A.left, WHOLE + name + RIGHT: A.right}
        elif isinstance(A, Diagonal):
            found[WHOLE + name + SQUARE] = A.entries
    return Statistics(found, F.places, lambda: known_diagonal(F))


def _recorded(record: LayerRecord, block: Block, evidence: Evidence, begun: bool) -> Statistics | None:
    """Those of the passes that were seen; None where they do not have the gradients of this step."""
    names = {id(p): name for name, p in record.params.items()}
    if unknown := [name for name, p in zip(block.names, block.params, strict=True) if id(p) not in names]:
        raise NeedsEvidence(
            f"The {type(record.model).__name__} given as model= has no parameter {unknown[0]}.",
            "Give the model that is trained: KFAC(model.named_parameters(), model=model, ...).",
        )
    own = [names[id(p)] for p in block.params]
    grads = dict(zip(own, block.scattered(evidence.grad), strict=True))
    factors = record.factors(grads, evidence.group) if evidence.grad.any() else {}
    if not factors:
        if begun or not evidence.grad.any():
            return None
        raise NeedsEvidence(
            f"No layer of the {type(record.model).__name__} has the gradients that its passes would have given it.",
            "Call the model itself, and backward, between zero_grad() and step(); or leave model= out, and call "
            "step(objective=curvature.Objective.of(model, loss, [batch])).",
        )
    index = dict(zip(own, block.scattered(torch.arange(len(evidence.grad), device=evidence.grad.device)), strict=True))
    square = evidence.grad.square() * record.terms
    fresh, places = {}, {}
    for name, A in factors.items():
        layer = record.narrowed(name, grads)
        fresh |= {WHOLE + name + LEFT: A.left, WHOLE + name + RIGHT: A.right}
        places[name] = layer.arranged(index).reshape(-1)
        for param in layer.params:
            index.pop(param, None)
    for name, place in index.items():
        places[name] = place.reshape(-1)
        fresh[WHOLE + name + SQUARE] = square[places[name]]
    return Statistics(fresh, places, lambda: square)


def _coordinates(seen: Statistics) -> Tensor:
    """The coordinates of all blocks in the order of `operator`: layers, then other parameters, each by name."""
    diagonal = seen.diagonal()
    assert diagonal is not None
    size = len(diagonal)
    index = torch.arange(size, dtype=torch.int32 if size < 2**31 else torch.int64, device=diagonal.device)
    return torch.cat([index[seen.places[name]] for end in (LEFT, SQUARE) for name in _named(seen.fresh, end)])


def _fitted(seen: Statistics, state: State) -> State:
    """Statistics of what there was in the first mini-batch: a layer that is not called now has none, and one that was
    not called then has no factors, but the diagonal."""
    found = {name: tensor for name, tensor in seen.fresh.items() if name in state}
    lone = [WHOLE + name + SQUARE for name in _named(state, SQUARE)]
    if not found.keys() >= set(lone):
        diagonal, sizes = seen.diagonal(), [len(state[name]) for name in lone]
        assert diagonal is not None
        places = state[PLACES][-sum(sizes) :].split(sizes)
        found |= {name: diagonal[place] for name, place in zip(lone, places, strict=True)}
    return found


def _bases(state: State, name: str) -> Bases:
    """The eigenvectors of both factors of a layer; None for a factor that is diagonal."""
    return state.get(WHOLE + name + LEFT + VECTORS), state.get(WHOLE + name + RIGHT + VECTORS)


def _products(state: State, name: str, damping: Tensor, factored: bool) -> Tensor:
    """The damped eigenvalues l_i r_j of a layer; those that rounding made negative are zero."""
    left, right = (
        state.get(key + VALUES, state[key]).clamp(min=0) for key in (WHOLE + name + LEFT, WHOLE + name + RIGHT)
    )
    if not factored or 1 in (left.shape[-1], right.shape[-1]):
        return left.unsqueeze(-1) * right.unsqueeze(-2) + damping
    pi = (right.mean(-1, keepdim=True) / left.mean(-1, keepdim=True)).sqrt()
    pi = torch.where(pi.isfinite() & (pi > 0), pi, 1.0)  # a factor that is zero
    return (left + damping**0.5 / pi).unsqueeze(-1) * (right + pi * damping**0.5).unsqueeze(-2)


def _decompose(state: State) -> None:
    """Eigenvalues and eigenvectors of all factors, of those of one size at once; averages along them turn with them.

    A factor that fails keeps what it had: NonFinite where that is nothing, or after several times in a row.
    """
    failed = None
    factors = [name for name in state if name.endswith((LEFT, RIGHT)) and state[name].ndim == 3]
    for size in sorted({state[name].shape[-1] for name in factors}):
        names = [name for name in factors if state[name].shape[-1] == size]
        found = eigen(torch.cat([state[name] for name in names]))
        counts = [len(state[name]) for name in names]
        for name, values, vectors, fine in zip(names, *(part.split(counts) for part in found), strict=True):
            if not bool(fine.all()):
                failed = name
            elif name + VECTORS in state:
                _turn(state, name, vectors)
                state[name + VALUES].copy_(values)
                state[name + VECTORS].copy_(vectors)
            else:
                state |= {name + VALUES: values.clone(), name + VECTORS: vectors.clone()}
    state[FAILED] += 1
    state[FAILED] *= failed is not None
    if failed is not None and (failed + VECTORS not in state or state[FAILED] >= FAILURES):
        raise NonFinite(f"The factor {failed} has no eigenvectors.", "Lower the learning rate, or raise the damping.")


def _turn(state: State, factor: str, vectors: Tensor) -> None:
    """The averages of a layer along other eigenvectors of one of its factors: the diagonal of Q diag(v) Q^T."""
    left = factor.endswith(LEFT)
    name = factor.removesuffix(LEFT if left else RIGHT) + MOMENTS
    if name in state:
        squares = (vectors.mT @ state[factor + VECTORS]).square()
        state[name].copy_(squares @ state[name] if left else state[name] @ squares.mT)


class KFAC(PreconditionedOptimizer):
    """Natural gradient with a Kronecker-factored Fisher matrix: (F + damping I)^-1 m for the average m of gradients.

    `match` says what `lr` means. With "adam" the direction is as long as that of AdamW, over the whole model, so that
    its learning rate and decay carry over. With "kl" it is shortened until d . (F + damping I) d, about twice the KL
    divergence between the model and the model after d, is at most `kl`: a step changes the model by lr^2 kl / 2 at
    most, and lr is near 1. With "none", as for a step `control`, it is as it comes: lr = 1 is a Newton step. Weights
    decay by lr times `weight_decay`: give less for an lr near 1.

    Every `collect` steps it needs the mini-batch, `step(objective=Objective.of(model, loss, [batch]))`, which goes
    through the model once more; `fisher` and `sharing` are as in `kfac`. Factors are decomposed every `every` steps.
    They do not depend on how many examples a mini-batch has, and neither does `damping`, in units of curvature of the
    mean loss, to which its l2 is added. Layers that are tied, or used outside their modules, get the diagonal of the
    Fisher matrix, as all parameters without a layer. `factored` damps each factor, as published, which is more than
    `damping` in all, and otherwise the product.

    With fisher="empirical", `model` may be given, and then no mini-batch: every `collect` steps layers are recorded in
    your own passes, of `model(x)`, not compiled, and `backward`. Terms are counted by the gradients of its outputs:
    each row that sums to zero is one, as those of softmax do, else each entry. Second moments are those of gradients as
    the optimizer gets them, clipped and unscaled. Gradients of terms that share a layer (tokens) add up there with
    their own signs, and other parameters have T g^2, of the mean of T terms, for the diagonal.

    Martens & Grosse 2015 (arXiv:1503.05671); Grosse & Martens 2016 (arXiv:1602.01407), convolutions; Eschenhagen et
    al. 2023 (arXiv:2311.00636), sharing.
    """

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.9,
        weight_decay: float = 0.01,
        *,
        fisher: FisherKind = "sampled",
        damping: float = 1e-3,
        beta: float = 0.95,
        every: int = 10,
        collect: int = 1,
        sharing: Sharing = "expand",
        match: Match = "adam",
        kl: float = 1e-3,
        factored: bool = False,
        model: nn.Module | None = None,
        **options: Unpack[Options],
    ) -> None:
        if model is not None and fisher != "empirical":
            raise ValueError(f"model= records gradients of the real targets: give fisher='empirical', not {fisher!r}.")
        record = None if model is None else LayerRecord(model, sharing)
        kind = KroneckerFisher if record is None else RecordedFisher
        rule = kind(fisher, sharing, damping, beta, collect, every, factored=factored, record=record)
        super().__init__(
            params,
            lr,
            rule,
            momentum=Momentum(momentum, corrected=True),
            finish=_finish(match, kl),
            weight_decay=weight_decay,
            **options,
        )


class EKFAC(PreconditionedOptimizer):
    """K-FAC with the true second moments of gradients along the eigenvectors of its factors: see KFAC.

    They are averaged every `collect` steps, which goes through the model twice more, so that eigenvectors may be made
    anew rarely. George et al. 2018 (arXiv:1806.03884).
    """

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.9,
        weight_decay: float = 0.01,
        *,
        fisher: FisherKind = "sampled",
        damping: float = 1e-3,
        beta: float = 0.95,
        every: int = 50,
        collect: int = 1,
        sharing: Sharing = "expand",
        match: Match = "adam",
        kl: float = 1e-3,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(
            params,
            lr,
            KroneckerFisher(fisher, sharing, damping, beta, collect, every, corrected=True),
            momentum=Momentum(momentum, corrected=True),
            finish=_finish(match, kl),
            weight_decay=weight_decay,
            **options,
        )


def _finish(match: Match, kl: float) -> tuple[Finish, ...]:
    finishes: dict[str, tuple[Finish, ...]] = {"adam": (Graft(AdamDiagonal()),), "kl": (ClipKL(kl),), "none": ()}
    if match not in finishes:
        raise ValueError(f"match is 'adam', 'kl' or 'none', but got {match!r}.")
    return finishes[match]
