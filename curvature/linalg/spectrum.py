"""The whole eigenvalue distribution of a symmetric operator: stochastic Lanczos quadrature.

Lin, Saad & Yang 2016 (arXiv:1308.5467); Ubaru, Chen & Saad 2017; for networks Ghorbani, Krishnan & Xiao 2019
(arXiv:1901.10159). Here all probes share one block Krylov space, so they advance with one pass over the data a step,
and its Ritz values come with residuals and in their multiplicities.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from curvature.errors import Interrupted
from curvature.linalg.krylov import Krylov, Recurrence
from curvature.linalg.measurement import Measurement
from curvature.linalg.operator import LinearOperator, as_operator
from curvature.progress import Run
from curvature.result import Estimate, Quantity, Result

Axis = Literal["log", "linear"]
Keep = Literal["device", "main", "nowhere"]

SETTLED = 1e-2  # residuals of the ends, relative to the largest magnitude


@dataclass(frozen=True, kw_only=True, repr=False)
class SpectralDensity(Result):
    """The eigenvalue distribution of an operator with `size` rows, as one measure a probe on common nodes.

    `nodes` are the Ritz values, ascending, `residuals` theirs; `weights` the mass every probe gives them, rows summing
    to 1. Where `single` is true a node is one eigenvalue, converged and counted: its mass is exactly 1/size.
    Eigenvalues within `floor` of zero are rounding noise of the products. `steps` block steps were done. Where
    `reorthogonalised` is false nothing is counted, and nodes may be copies of one eigenvalue that share its mass.
    """

    nodes: Float[Tensor, " d"]
    weights: Float[Tensor, "p d"]
    residuals: Float[Tensor, " d"]
    single: Bool[Tensor, " d"]
    size: int
    floor: float
    steps: int
    reorthogonalised: bool = True

    def mean(self, function: Callable[[Tensor], Tensor]) -> Estimate:
        """The mean of `function` over all eigenvalues, (1/size) tr f(A), with its standard error over probes.

        `function` maps the nodes (d,) to (..., d); the estimate has the leading shape.
        """
        values = function(self.nodes) @ self.weights.T
        probes = 0 if self.single.all() else len(self.weights)  # all eigenvalues were counted: nothing is random
        return Estimate(
            value=values.mean(-1),
            stderr=values.std(-1) / probes**0.5 if probes else torch.zeros_like(values[..., 0]),
            samples=probes,
            dof=max(0, probes - 1),
            cost=self.cost,
            origin=self.origin,
        )

    def cdf(self, points: Float[Tensor, " t"]) -> Estimate:
        """The share of eigenvalues at or below each of `points` (t,): a staircase that needs no bandwidth.

        `stderr` is the spread over probes. A node stands for the eigenvalues around it: they have its residual r as
        their standard deviation, so up to r^2 / (r^2 + d^2) of its mass lies beyond a point at distance d (Cantelli).
        `floor` sums that over one block of nodes on either side of a point, the larger of the two: in a dense spectrum
        the nodes come in blocks of as many as there are probes. It is part of every interval.
        """
        points = points.double().unsqueeze(1)
        share = self.mean(lambda nodes: (nodes <= points).double())
        spread = self.residuals.square()
        beyond = spread / (spread + (self.nodes - points).square()).clamp(min=1e-300) * self.weights.mean(0)
        place = torch.arange(len(self.nodes)) - torch.searchsorted(self.nodes, points, right=True)
        below = beyond.where((place < 0) & (place >= -len(self.weights)), 0).sum(1)
        above = beyond.where((place >= 0) & (place < len(self.weights)), 0).sum(1)
        return replace(share, floor=torch.maximum(below, above).clamp(min=1e-12))  # sums round

    def quantile(self, share: float) -> float:
        """The smallest node at or below which at least `share` of the eigenvalues lie."""
        if not 0 <= share <= 1:
            raise ValueError(f"A share lies between 0 and 1, but got {share}.")
        reached = self.weights.mean(0).cumsum(0) >= share - 1e-12
        return float(self.nodes[reached.nonzero()[0, 0] if reached.any() else -1])

    def quantile_interval(self, share: float, level: float = 0.95) -> tuple[float, float]:
        """Between which nodes the eigenvalue lies at or below which that share of all of them lies: where the intervals
        of `cdf` have it."""
        self.quantile(share)  # for the check
        low, high = self.cdf(self.nodes).interval(level)
        before, behind = self.nodes[high < share], self.nodes[low >= share]
        ends = before[-1] if len(before) else self.nodes[0], behind[0] if len(behind) else self.nodes[-1]
        return float(ends[0]), float(ends[1])

    @property
    def alone(self) -> Bool[Tensor, " d"]:
        """Which nodes are outliers: counted, at an end, and further than `width` from the next node inwards, or beyond
        one that is.

        Distances are on the signed logarithmic axis, where `width` is a factor beyond `unit`.
        """
        s = signed_log(self.nodes, self.unit)
        gap = torch.cat([torch.zeros(1, dtype=torch.float64), s.diff()])  # to the next node below
        top = _beyond_a_gap(self.single & (s > 0), gap > self.width)
        bottom = _beyond_a_gap((self.single & (s < 0)).flip(0), gap.roll(-1).flip(0) > self.width)
        return top | bottom.flip(0)

    @property
    def outliers(self) -> Float[Tensor, " o"]:
        """The eigenvalues that stand alone, ascending."""
        return self.nodes[self.alone]

    @property
    def unit(self) -> float:
        """Where the signed logarithmic axis turns from linear to logarithmic: 1e-4 of the largest magnitude."""
        return 1e-4 * float(self.nodes.abs().max()) or 1.0  # of a zero matrix any unit will do

    @property
    def width(self) -> float:
        """The resolution on that axis: how far apart `steps` nodes would be on average."""
        s = signed_log(self.nodes[[0, -1]], self.unit)
        return max(float(s[1] - s[0]) / self.steps, 1e-6)

    def density(self, points: Float[Tensor, " t"], *, axis: Axis = "log") -> Estimate:
        """The density of all but the outliers at `points`, as mass per unit of an axis.

        On the signed logarithmic axis s(t) = sign(t) log10(1 + |t| / unit), or the "linear" one, every node is a
        Gaussian; its standard deviation is the range divided by `steps` (`width`) or, for a node that stands for many
        eigenvalues, a quarter of the way between the blocks of nodes beside it, so that a gap between two blocks does
        not look like one in the spectrum.
        """
        if axis not in ("log", "linear"):
            raise ValueError(f"axis is 'log' or 'linear', but got {axis!r}.")
        s, nodes = points.double(), self.nodes
        if axis == "log":
            s, nodes = (signed_log(t, self.unit) for t in (s, nodes))
        bulk = ~self.alone
        ends = nodes[bulk if bulk.any() else slice(None)][[0, -1]].tolist()  # outliers are beside no block of nodes
        narrow = self.width if axis == "log" else (ends[1] - ends[0]) / self.steps or self.width
        reach = torch.arange(len(nodes))
        above, below = (reach + len(self.weights)).clamp(max=len(nodes) - 1), (reach - len(self.weights)).clamp(min=0)
        within = nodes.clamp(*ends)
        width = ((within[above] - within[below]) / 4).clamp(min=narrow).where(~self.single, narrow)
        height = bulk.double() / (width * (2 * math.pi) ** 0.5)
        return self.mean(lambda _: height * (-0.5 * ((s.unsqueeze(1) - nodes) / width).square()).exp())

    @property
    def negative(self) -> Estimate:
        """The share of eigenvalues that are negative beyond the noise floor."""
        below = math.nextafter(-self.floor, -math.inf)  # of a zero matrix the floor is zero too
        share = self.cdf(torch.tensor([below], dtype=torch.float64))
        resolution = torch.as_tensor(share.floor).max()
        return replace(share, value=share.value[0], stderr=share.stderr[0], floor=float(resolution))

    @property
    def ends(self) -> tuple[Quantity, Quantity]:
        """The smallest and the largest eigenvalue, converged where their residuals are small beside the spectrum."""
        small = SETTLED * float(self.nodes.abs().max())
        pairs = ((float(self.nodes[place]), float(self.residuals[place])) for place in (0, -1))
        first, last = (Quantity(value, bound=residual, converged=residual <= small) for value, residual in pairs)
        return first, last

    def summary(self) -> dict[str, str]:
        outliers = self.outliers
        trace = self.mean(lambda nodes: nodes * self.size)
        negative = self.negative
        shown = ", ".join(f"{value:.5g}" for value in outliers.flip(0)[:5].tolist())
        counted = {
            "outliers": f"{len(outliers)}: {shown}{', ...' if len(outliers) > 5 else ''}" if len(outliers) else "none",
            "converged": f"{int(self.single.sum())} eigenvalues to the precision of the products",
        }
        if self.single.all():  # nothing stands alone in a spectrum that is all known
            counted = {"converged": "all, to the precision of the products"}
        ends = (f"{end.value:.4g}{'' if end.converged else ' (not converged)'}" for end in self.ends)
        return {
            "eigenvalues": f"{self.size:,}, from {' to '.join(ends)}",
            **(counted if self.reorthogonalised else {"outliers": "not counted (not reorthogonalised)"}),
            "bulk": f"90 % within [{self.quantile(0.05):.3g}, {self.quantile(0.95):.3g}]",
            "trace": str(Quantity(float(trace.value), float(trace.stderr), trace.dof)),
            "negative": percent(negative),
            "noise floor": f"±{self.floor:.1e} ({self.origin.operator.get('dtype', 'rounding')})",
            "probes, steps": f"{len(self.weights)} x {self.steps}" + ("" if self.complete else " (interrupted)"),
        }

    def quantities(self) -> dict[str, Quantity]:
        means = {"trace": self.mean(lambda nodes: nodes * self.size), "negative_share": self.negative}
        return {
            **dict(zip(("lambda_min", "lambda_max"), self.ends, strict=True)),
            **{name: Quantity(float(e.value), float(e.stderr), e.dof, float(e.floor)) for name, e in means.items()},
            **({"outliers": Quantity(len(self.outliers))} if self.reorthogonalised else {}),
        }

    __repr__ = Result.__str__


def _beyond_a_gap(candidates: Tensor, gap: Tensor) -> Tensor:
    """The last entries, all candidates, from the first of them that has a gap before it."""
    run = candidates.flip(0).long().cumprod(0).flip(0).bool()
    return (run & gap).long().cumsum(0).bool()


def percent(share: Estimate) -> str:
    """A share with its standard error and, where it matters, its resolution."""
    value, stderr, floor = (100 * float(x) for x in (share.value, share.stderr, share.floor))
    shown = f"{value:.3g} %" + (f" ± {stderr:.2g} %" if stderr else "") if value else "none"
    return shown + (f" (resolution {floor:.2g} %)" if floor > 0.1 else "")


def signed_log(t: Tensor, unit: float) -> Tensor:
    """sign(t) log10(1 + |t| / unit): linear around zero, logarithmic from `unit` on."""
    return t.sign() * torch.log10(1 + t.abs() / unit)


def spectral_density(
    A: LinearOperator,
    *,
    probes: int = 8,
    steps: int = 80,
    keep: Keep = "device",
    seed: int = 0,
    run: Run | None = None,
) -> SpectralDensity:
    """The eigenvalue distribution of symmetric A from `probes` random vectors and `steps` products with all of them.

    Probes make the error bars small (for a share f of the eigenvalues a probe has variance 2 f (1 - f) / size), steps
    the resolution: about the range of the bulk divided by `steps`, finer at its ends. One step is one pass over the
    data. An interrupt raises Interrupted with the density so far in `.result`.

    `keep` says where the basis of probes x steps vectors is: on the "device" of A, in "main" memory, or "nowhere",
    which takes four blocks of vectors: without them no step can be orthogonalised against those before, the density is
    as good, and no eigenvalue is counted or called an outlier.

    >>> from curvature import Diagonal
    >>> density = spectral_density(Diagonal(torch.arange(1.0, 101.0)), probes=2, steps=10)
    >>> density.weights.shape
    torch.Size([2, 20])
    """
    A = as_operator(A)
    options = {"probes": probes, "steps": steps, "keep": keep}
    measurement = Measurement(A, "spectral_density", options=options, seed=seed, run=run)
    if not A.symmetric:
        raise ValueError(f"spectral_density needs a symmetric operator, but got {A!r}.")
    if probes < 2 or steps < 1:
        raise ValueError(f"Expected probes >= 2 (for an error bar) and steps >= 1, but got {probes} and {steps}.")
    krylov = _kept(measurement, probes, steps, keep)  # raises when memory will not do
    starts = A.domain.draw(probes, seed=seed, kind="sphere").to(krylov.space.device)
    krylov.start(starts)
    first = krylov.space.inner(starts, krylov.frontier) / A.shape[0] ** 0.5  # (p, b) the probes in the first block
    done, largest = 0, 0.0
    try:
        while done < steps:
            more = krylov.step()
            done += 1
            if done == 1 or done % max(1, steps // 10) == 0:  # an eigenproblem: dear beside a cheap product
                largest = float(torch.linalg.eigvalsh(krylov.projected)[-1])
            measurement.report(done, steps, f"largest {largest:.5g}")
            if not more or done == steps or not krylov.extend():
                break
    except KeyboardInterrupt as stop:
        if krylov.multiplied == 0:
            raise
        raise Interrupted(_density(krylov, first, done, complete=False)) from stop
    return _density(krylov, first, done, complete=True)


def _kept(measurement: Measurement, probes: int, steps: int, keep: Keep) -> Krylov | Recurrence:
    capacity = min(probes * steps, measurement.operator.shape[0])
    match keep:
        case "device":
            return Krylov(measurement, capacity, sparing=True)
        case "main":
            return Krylov(measurement, capacity, device=torch.device("cpu"), sparing=True)
        case "nowhere":
            return Recurrence(measurement, probes)
        case _:
            raise ValueError(f"keep is 'device', 'main' or 'nowhere', but got {keep!r}.")


def _density(krylov: Krylov | Recurrence, first: Tensor, steps: int, *, complete: bool) -> SpectralDensity:
    """The quadrature of every probe: squared components of its start vector along the Ritz vectors."""
    nodes, vectors = torch.linalg.eigh(krylov.projected)
    residuals = krylov.residuals(vectors)
    weights = (first @ vectors[: first.shape[1]]).square()
    weights /= weights.sum(1, keepdim=True)
    size = krylov.space.size
    floor = max(krylov.space.eps * float(nodes.abs().max()), krylov.noise)
    single = _counted(nodes, weights, residuals, size=size, eps=krylov.space.eps)
    whole = isinstance(krylov, Krylov)
    if not whole:
        single = torch.zeros_like(single)  # copies cannot be told from eigenvalues
    elif len(nodes) == size:
        single = torch.ones_like(single)  # the basis is complete: every node is an eigenvalue
    return SpectralDensity(
        nodes=nodes.cpu(),
        weights=_with_exact_mass(weights, single, size).cpu(),
        residuals=residuals.cpu(),
        single=single.cpu(),
        size=size,
        floor=floor,
        steps=steps,
        reorthogonalised=whole,
        complete=complete,
        cost=krylov.measurement.cost,
        origin=krylov.measurement.origin,
    )


def _counted(nodes: Tensor, weights: Tensor, residuals: Tensor, *, size: int, eps: float) -> Tensor:
    """Which nodes are one eigenvalue each: in a cluster smaller than the block, all of which has converged.

    A block of p probes sees an eigenvalue at most p times; seen fewer times, it was seen in full. What is judged is
    the residual times the root of the cluster's mass. The residual alone is inversely proportional to what the
    probes have of the eigenvector: the eigenvalues not yet counted would be those of too small mass, and the rest
    would be biased.
    """
    precision = eps**0.5 * nodes.abs()
    floor = 10 * eps * float(nodes.abs().max())
    apart = nodes.diff() > (precision[1:] + precision[:-1] + floor)
    cluster = torch.cat([torch.zeros_like(nodes[:1]), apart.double().cumsum(0)]).long()
    members = torch.bincount(cluster)[cluster]
    mass = torch.bincount(cluster, weights=size * weights.mean(0))[cluster] / members  # 1 on average, once converged
    unseen = mass < 1e-4  # a direction that only rounding has brought in
    late = (residuals * mass.sqrt() > precision) | (nodes.abs() <= floor) | unseen
    all_converged = torch.bincount(cluster, weights=late.double())[cluster] == 0
    return all_converged & (members < len(weights))


def _with_exact_mass(weights: Tensor, single: Tensor, size: int) -> Tensor:
    """Give every counted eigenvalue its mass 1/size, and scale what each probe has on the rest to fill up to 1.

    Conditional on the found eigenvectors the rest of a probe is uniform on their complement, so the mean stays
    unbiased, and the large and random masses of outliers leave the error bar.
    """
    exact = (single.double() / size).repeat(len(weights), 1)
    rest = torch.where(single, 0.0, weights)
    mass = rest.sum(1, keepdim=True)
    left = 1 - float(single.sum()) / size
    if single.all():
        return exact
    return exact + rest * left / mass
