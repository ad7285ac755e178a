"""What a doctor asks beside the probes of an objective: environment, model, mode, terms, engines, cost, forecast."""

from __future__ import annotations

import platform
import re
import time
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from curvature.errors import BadObjective, TooLarge, listing, one_line
from curvature.linalg.memory import peak_bytes, short_of
from curvature.objective.batches import halves, leading
from curvature.objective.check import Examination, Probe, Seen
from curvature.objective.difference import ROUNDING, SYMMETRY
from curvature.objective.function import OutputLoss, ScalarLoss
from curvature.objective.guard import frozen_randomness
from curvature.objective.params import ParamSpace
from curvature.operators.engine import Engine, at_once, budget_of
from curvature.operators.hessian import hessian

SAFE = (2, 10)  # before, torch.load(weights_only=True) could be made to corrupt memory (CVE-2026-24747)
PRODUCTS: dict[Engine, int] = {"retained": 3, "batched": 2, "forward": 1}  # to try an engine by


class Plan(NamedTuple):
    """Work to be forecast: products with a matrix, and with the block of each layer or parameter in it, in so many
    passes over the data; losses; vectors that are kept."""

    products: int
    passes: int
    losses: int
    vectors: int
    layer_products: int = 0
    parameter_products: int = 0

    def of(self, space: ParamSpace) -> Plan:
        """The same in products alone, for a model with these parameters."""
        blocks = self.layer_products * len(space.groups()) + self.parameter_products * len(space.names)
        return Plan(self.products + blocks, self.passes, self.losses, self.vectors)


def environment(device: torch.device) -> Seen:
    """Versions, threads, and what makes float32 less precise than it says."""
    where = _many(torch.get_num_threads(), "thread") if device.type == "cpu" else torch.cuda.get_device_name(device)
    text = f"torch {torch.__version__}, Python {platform.python_version()}, {device}, {where}"
    if (release := tuple(int(n) for n in re.findall(r"\d+", torch.__version__)[:2])) < SAFE:
        return Seen(f"{text}; loading weights can corrupt memory before torch {'.'.join(map(str, SAFE))}",
                    f"Install a newer torch than {'.'.join(map(str, release))}.")  # fmt: skip
    if (precision := torch.get_float32_matmul_precision()) != "highest":
        return Seen(f"{text}; float32 matrix products are {precision!r}, with fewer bits",
                    "Call torch.set_float32_matmul_precision('highest').")  # fmt: skip
    if device.type == "cuda" and torch.backends.cudnn.allow_tf32:
        return Seen(f"{text}; convolutions in float32 are computed in TF32, with 10 bits",
                    "Set torch.backends.cudnn.allow_tf32 = False.")  # fmt: skip
    if torch.is_autocast_enabled(device.type):
        return Seen(f"{text}; autocast is on, but not inside the objective")
    return Seen(text)


def model(examination: Examination) -> Seen:
    """What kind of module it is, and which parts of it run otherwise here."""
    module = examination.objective.function.module
    parts = dict(module.named_modules())
    kinds = {name: [base.__name__ for base in type(part).__mro__] for name, part in parts.items()}
    text = f"{type(module).__name__} of {len(parts)} parts"
    wrapped = _with(kinds, "DistributedDataParallel", "DataParallel")
    if wrapped:
        return Seen(f"{text}; {listing(wrapped, 3)} is wrapped for several devices", "Pass the .module inside.")
    if compiled := [name or "the model" for name, part in parts.items() if _compiled(part)]:
        text += f"; {listing(compiled, 3)} is compiled, and runs eagerly here"
    if _with(kinds, "ScriptModule"):
        text += "; TorchScript hides its parts"
    dtypes = {p.dtype for p in module.parameters() if p.is_floating_point()} - {torch.float32, torch.float64}
    if dtypes:
        held = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
        text += f"; {held} parameters, computed in {str(examination.objective.space.dtype).removeprefix('torch.')}"
    if tied := _tied(module):
        text += f"; tied: {listing(tied, 3)}"
    return Seen(text)


def mode(examination: Examination) -> Seen:
    """How layers act that are not the same in training."""
    objective = examination.objective
    parts = list(objective.function.module.modules())
    norms = _many(sum(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in parts), "batch norm")
    drops = _many(sum(map(_drops, parts)), "dropout")
    if objective.mode == "eval":
        steady = f"{norms} by running statistics" if norms else ""
        return Seen(": ".join(filter(None, ["eval", ", ".join(filter(None, [steady, drops and f"{drops} off"]))])))
    masks = f"{drops} with a fixed mask" if drops else ""
    if not norms:
        return Seen(": ".join(filter(None, ["train", masks])))
    return Seen(
        ", ".join(filter(None, [f"train: {norms} by the statistics of each batch, so that its size matters", masks])),
        "Use mode='eval' (--mode eval) unless it is training that you look at.",
    )


def randomness(examination: Examination) -> Seen:
    """Whether the loss depends on the random state."""
    objective, batch = examination.objective, examination.batch
    with objective.context():
        values = []
        for seed in (objective.seed, objective.seed + 1):
            with frozen_randomness(seed):
                values.append(float(objective.total(objective.params, batch).detach()))
    if abs(values[0] - values[1]) <= ROUNDING * objective.space.eps * abs(values[0]):
        return Seen("nothing is drawn")
    if objective.mode == "train":
        return Seen("the loss depends on the seed, by which each batch has one draw, as of dropout")
    terms = objective.function.weight(batch) or 1
    first, second = (value / terms for value in values)
    return Seen(
        f"the loss depends on the seed, also in evaluation: {first:.6g}, or {second:.6g} with the next one",
        "What is analysed is one draw for each batch: compare several seeds (--seed), or draw nothing.",
    )


def terms(examination: Examination) -> Seen:
    """A bare scalar is the mean over as many terms as are counted, as far as halves of a batch tell."""
    objective, batch = examination.objective, examination.batch
    function = objective.function
    if not isinstance(function, ScalarLoss) or function.terms is not None:
        return Seen("counted by the loss" if isinstance(function, OutputLoss) else "counted by terms=")
    if objective.mode == "train" or (leading(batch) or 0) < 2:
        return Seen("counted by examples or labels, that the loss is their mean is not looked at here", open=True)

    def value(part: Any) -> float:
        with objective.randomness():
            return float(objective.total(objective.params, part).detach()) / (objective.function.weight(part) or 1)

    with objective.context():
        whole = value(batch)
        try:
            apart = [value(half) for half in halves(batch)]
        except Exception:
            return Seen("the loss takes batches as they are, so that a mean cannot be told from a sum", open=True)
    near = 1e-4 * abs(whole)
    if abs(whole - sum(apart)) <= near < abs(whole - sum(apart) / 2):
        return Seen(
            "the loss of a batch is the sum over its halves, but counts as a mean",
            "Take the mean in the loss, or pass terms=lambda batch: 1 to Objective.from_loss.",
        )
    return Seen("the loss of a batch counts as the mean over its terms")


def rewrites(examination: Examination) -> Seen:
    """What was replaced in a pass to be twice differentiable."""
    counts = examination.rewrites
    if not counts:
        return Seen("none: torch's own derivatives are right")
    replaced = ", ".join(f"{name} ({count})" for name, count in counts.items())
    return Seen(f"replaced by what can be differentiated twice: {replaced}")


class Trials:
    """Products of the first batch by each engine: whether they work, and what they take."""

    def __init__(self) -> None:
        self.products = 0
        self.seconds: dict[Engine, float] = {}  # of a product
        self.figures: dict[str, float] = {}
        self.expected: Tensor | None = None  # the products of the first engine

    @property
    def questions(self) -> dict[str, Probe]:
        """Those that are asked in order."""
        return {**{f"engine {name}": partial(self.engine, name) for name in PRODUCTS}, "cost": self.cost}

    def engine(self, engine: Engine, examination: Examination) -> Seen:
        """A few products; those of the first engine one by one, which tells what building the graph takes."""
        objective = examination.objective
        A = hessian(objective.on([examination.batch]), engine=engine)
        rows = objective.space.draw(3, seed=objective.seed)[: PRODUCTS[engine]]
        blocks = (rows,) if engine == "batched" else rows.split(1)
        self.products += len(rows)
        times, found = [time.perf_counter()], []
        try:
            for block in blocks:
                found.append(A.apply(block))
                _finish(objective.space.device)
                times.append(time.perf_counter())
        except BadObjective as error:
            if engine == "retained":
                raise
            return Seen(f"not for this model ({one_line(error.__cause__ or error)}), and not needed", open=True)
        spans = [end - start for start, end in pairwise(times)]
        self.seconds[engine] = min(spans[1:] or spans) / len(blocks[-1])  # the first one builds the graph
        products = torch.cat(found)
        if self.expected is None:
            self.expected = products
            self.figures["gradient_seconds"] = max(spans[0] - spans[1], 0.0)
            self.figures["product_seconds"] = self.seconds[engine]
            return Seen("works")
        gap = float((products - self.expected[: len(rows)]).norm() / (self.expected[: len(rows)].norm() or 1))
        if gap > SYMMETRY[objective.space.dtype] and gap > ROUNDING * objective.space.eps * len(rows) ** 0.5:
            return Seen(
                f"its products are {gap:.1%} off those of retained", "Use engine='retained' (--engine retained)."
            )
        return Seen("works")

    def cost(self, examination: Examination) -> Seen:
        """Of the first batch."""
        graph = float(sum(examination.held))
        self.figures["graph_bytes"] = graph
        count = leading(examination.batch) or 1
        gradient, product = (_seconds(self.figures[f"{name}_seconds"]) for name in ("gradient", "product"))
        what = f"of the first batch ({_many(count, 'example')})"
        peak = _bytes(peak_bytes(examination.objective.space.device))
        return Seen(f"{gradient} a gradient {what}, {product} a product more, {_bytes(graph)} its graph; peak {peak}")

    def forecast(self, plan: Plan, examination: Examination) -> Seen:
        """What the work of the plan takes on all data; TooLarge where that is more than there is."""
        objective, health = examination.objective, examination.health
        space, (batches, examples) = objective.space, objective.batches.extent()
        plan = plan.of(space)
        scale = examples / (leading(examination.batch) or 1)
        chunk, bulk = at_once(health, examination.batch, budget_of("auto", space.device), space)
        together = chunk > 1 and bulk <= 1 and plan.products > plan.passes
        product = min(self.seconds["retained"], self.seconds.get("batched", 1e9) if together else 1e9)
        graph = health.example_bytes * examples
        kept = graph <= budget_of("auto", space.device)
        builds = (1 if kept else plan.passes) + plan.losses / 3  # a loss is a third of a gradient
        seconds = scale * (builds * self.figures["gradient_seconds"] + plan.products * product)
        vectors = plan.vectors * space.size * torch.empty(0, dtype=space.dtype).element_size()
        size = vectors + (graph if kept else graph / batches)
        self.figures.update(forecast_seconds=seconds, forecast_bytes=size)
        asked = [(plan.products, "product"), (plan.losses, "loss"), (plan.vectors, "vector")]
        work = ", ".join(filter(None, [_many(count, name) for count, name in asked]))
        what = f"{work} on {_many(examples, 'example')} in {_many(batches, 'batch')}"
        text = f"about {_seconds(seconds)} and {_bytes(size)} for {what}"
        if (free := short_of(size, space.device)) is not None:
            raise TooLarge(
                f"{text}, but {_bytes(free)} are free.",
                "Ask for fewer steps, probes or vectors, for fewer --params, or take a larger machine.",
            )
        return Seen(text)


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _with(kinds: dict[str, list[str]], *names: str) -> list[str]:
    return [name or "the model" for name, bases in kinds.items() if set(names) & set(bases)]


def _compiled(part: nn.Module) -> bool:
    return type(part).__name__ == "OptimizedModule" or getattr(part, "_compiled_call_impl", None) is not None


def _tied(module: nn.Module) -> list[str]:
    """'head.weight = embedding.weight' for every parameter that goes by several names."""
    first = {id(p): name for name, p in module.named_parameters()}
    every = module.named_parameters(remove_duplicate=False)
    return [f"{name} = {first[id(p)]}" for name, p in every if first[id(p)] != name]


def _many(count: int, name: str) -> str:
    """'3 losses'; nothing for none."""
    ending = "es" if name[-1] in "sh" else "s"
    return f"{count:,} {name}{ending if count > 1 else ''}" if count else ""


def _drops(part: nn.Module) -> bool:
    """Whether some of what goes through is set to zero in training."""
    share = part.dropout if isinstance(part, nn.RNNBase) else getattr(part, "p", 0)
    return share > 0 if isinstance(part, nn.RNNBase | nn.modules.dropout._DropoutNd) else False


def _seconds(seconds: float) -> str:
    if seconds < 1:
        return f"{1e3 * seconds:.2g} ms" if seconds < 0.1 else f"{seconds:.1g} s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _bytes(size: float) -> str:
    unit, name = next((u, n) for u, n in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")) if size >= u or n == "KiB")
    return f"{size / unit:.3g} {name}"
