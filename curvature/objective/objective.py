"""The function being studied: L(params) = sum of the loss over all terms of the data / their number + l2/2 |params|^2.

Everything downstream (operators, probes, diagnostics) asks an Objective and reads data only through its `average`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, distributed, nn

from curvature.errors import BadObjective, NonFinite, listing
from curvature.linalg.operator import Meter
from curvature.objective.batches import Batches, Cut, digest
from curvature.objective.check import Health, examine
from curvature.objective.compat import twice_differentiable
from curvature.objective.function import OutputLoss, ScalarLoss, cast
from curvature.objective.guard import frozen_randomness, in_mode
from curvature.objective.losses import Loss, as_loss
from curvature.objective.params import ParamSpace, Select, chosen, nothing_selected, predicate
from curvature.objective.passes import Passes
from curvature.objective.products import gradient_of

Mode = Literal["eval", "train"]


@dataclass(frozen=True, eq=False, repr=False)
class Objective:
    """A loss as a function of the selected parameters, on fixed data, in a stated mode.

    `params` are the selected parameters, `frozen` the others and `buffers` the buffers of the model: detached copies of
    their values when the objective was made. The module itself is never written to: mode, buffers,
    gradients and random generators are as before after any call. In "train" mode batch normalisation uses the
    statistics of each batch, which makes the objective depend on how the data is cut, and dropout a fixed mask.

    With a `group` the terms are those of all its processes, each of which has a share of the data: sums and averages
    over them are made together, and called for by all. Optimizers give the mini-batch theirs.
    """

    function: OutputLoss | ScalarLoss
    params: Mapping[str, Tensor]
    frozen: Mapping[str, Tensor]
    buffers: Mapping[str, Tensor]
    batches: Batches
    mode: Mode = "eval"
    seed: int = 0
    l2: float = 0.0
    meter: Meter = field(default_factory=Meter)
    group: distributed.ProcessGroup | None = None  # the processes that have the other shares of the data
    _health: list[Health] = field(default_factory=list, repr=False)  # empty, or what the check found

    @classmethod
    def of(
        cls,
        module: nn.Module,
        loss: Loss | nn.Module | str,
        data: Any,
        *,
        select: Select | None = None,
        mode: Mode = "eval",
        dtype: torch.dtype | None = None,
        batch_size: Cut = "auto",
        seed: int = 0,
        l2: float = 0.0,
    ) -> Objective:
        """The objective of a model whose outputs `loss` compares with targets.

        `loss` is a Loss, an `nn.*Loss` module, a name, or any function of (outputs, targets) that is a mean over
        examples (it has a Hessian only). `data` is a DataLoader, a list of batches, or a tuple (inputs, targets) of
        tensors, read `batch_size` examples at a time (256; None is for models that couple examples). A batch is
        (inputs, targets), or a dict whose "labels" (or "targets") are compared and whose rest are keywords of the
        model. `select` names parameters or layers by globs, or is a predicate; all trainable ones by default. `dtype`
        is that of the computation: by default that of the parameters, float32 for half precision. `l2` is the weight
        decay that the selected parameters were trained with. Raises BadObjective, before anything is computed.
        """
        function = OutputLoss(_unwrapped(module), as_loss(loss))
        return cls._make(function, Batches.of(data, batch_size=batch_size), select, mode, dtype, seed, l2)

    @classmethod
    def from_loss(
        cls,
        module: nn.Module,
        loss: Callable[[nn.Module, Any], Tensor],
        data: Any,
        *,
        terms: Callable[[Any], float] | None = None,
        select: Select | None = None,
        mode: Mode = "eval",
        dtype: torch.dtype | None = None,
        batch_size: Cut = None,
        seed: int = 0,
        l2: float = 0.0,
    ) -> Objective:
        """The objective of any scalar `loss(module, batch)`, a mean over `terms(batch)` terms. Hessian only.

        Without `terms` a batch counts by its labels that are not -100, else by the length of its first axis. `data` is
        a DataLoader, a list of batches, or tensors, which are one batch (the loss may couple its examples) unless
        `batch_size` cuts them.
        """
        function = ScalarLoss(_unwrapped(module), loss, terms)
        return cls._make(function, Batches.of(data, batch_size=batch_size), select, mode, dtype, seed, l2)

    @classmethod
    def _make(
        cls,
        function: OutputLoss | ScalarLoss,
        batches: Batches,
        select: Select | None,
        mode: Mode,
        dtype: torch.dtype | None,
        seed: int,
        l2: float,
    ) -> Objective:
        params = chosen(function.module, select)
        _check_placement(params)
        device = next(iter(params.values())).device
        working = _working_dtype(params) if dtype is None else _fine(dtype)
        frozen = {name: p for name, p in function.module.named_parameters() if name not in params}
        return cls(
            function=function,
            params=cast(params, device, working),
            frozen=cast(frozen, device, working),
            buffers=cast(dict(function.module.named_buffers()), device, working),
            batches=replace(batches, seed=seed),
            mode=mode,
            seed=seed,
            l2=l2,
        )

    def __post_init__(self) -> None:
        if self.mode not in ("eval", "train"):
            raise ValueError(f"mode is 'eval' or 'train', but got {self.mode!r}.")
        if not 0 <= self.l2 < float("inf"):
            raise ValueError(f"l2 is a finite number, 0 or more, but got {self.l2!r}.")

    def __repr__(self) -> str:
        what, space = type(self.function.module).__name__, self.space
        where = f"{space.size:,} parameters, {space.dtype}, {space.device}, {self.mode} mode"
        return f"<Objective: {self.function.name} of {what}, {where}>"

    @cached_property
    def space(self) -> ParamSpace:
        """The space of flat parameter vectors."""
        return ParamSpace.of(self.params)

    @property
    def position(self) -> Float[Tensor, " n"]:
        """The parameters, flat: where this is."""
        return self.space.flatten(self.params.values())

    def average(self, term: Callable[[Any], Tensor]) -> Tensor:
        """The sum of `term(batch)` over the data divided by the number of terms, in one pass over the data.

        `term` sees each batch on the device and in the dtype of the parameters, inside the context in which models are
        called, from a random state that depends only on `seed` and the place of the batch.
        """
        return Passes(self).average(term)

    def total(self, tensors: Mapping[str, Tensor], batch: Any) -> Float[Tensor, ""]:
        """The sum of the loss over the terms of a batch, with `tensors` as the selected parameters."""
        return self.function.total(self.complete(tensors), batch)

    def outputs(self, tensors: Mapping[str, Tensor], batch: Any) -> tuple[Tensor, Any]:
        """The model's outputs for a batch, and its targets; BadObjective when the loss is a bare scalar."""
        return self.function.outputs(self.complete(tensors), batch)

    @property
    def loss(self) -> Loss:
        """The loss of outputs and targets; BadObjective when the objective was made from a bare scalar."""
        if isinstance(self.function, OutputLoss):
            return self.function.loss
        raise self.function.no_outputs

    def value(self) -> float:
        """L at the parameters."""

        def term(batch: Any) -> Tensor:
            return self.total(self.params, batch).detach().double()  # no_grad would break losses with input derivatives

        return float(self.average(term) + self.penalty(self.position))

    def penalty(self, rows: Float[Tensor, "*k n"]) -> Float[Tensor, "*k"]:
        """l2/2 |row|^2 for each row, in float64."""
        if not self.l2:
            return torch.zeros(rows.shape[:-1], dtype=torch.float64, device=rows.device)
        return self.l2 / 2 * rows.double().square().sum(-1)

    def gradient(self) -> Float[Tensor, " n"]:
        """The gradient of L at the parameters, flat."""
        gradient = self.average(lambda batch: gradient_of(self, batch))
        return gradient + self.l2 * self.position if self.l2 else gradient

    def leaves(self) -> dict[str, Tensor]:
        """The parameters as fresh leaves of a graph."""
        return {name: p.detach().requires_grad_() for name, p in self.params.items()}

    def at(self, params: Float[Tensor, " n"] | Mapping[str, Tensor]) -> Objective:
        """The same function at other parameters, given flat or by name."""
        space = self.space
        if isinstance(params, Tensor):
            if params.shape != (space.size,):
                raise ValueError(f"Expected a flat vector of {space.size} numbers, but got {tuple(params.shape)}.")
            params = space.named(params)
        if any(not torch.isfinite(t).all() for t in params.values()):
            raise NonFinite("The given parameters are not all finite.", "Shorten the step that led there.")
        if {name: t.shape for name, t in params.items()} != dict(zip(space.names, space.shapes, strict=True)):
            raise ValueError(f"Expected a tensor for each of {listing(space.names)}, of its shape, as in `.params`.")
        return replace(self, params=cast({name: params[name] for name in space.names}, space.device, space.dtype))

    def on(self, data: Any, *, batch_size: Cut = "auto") -> Objective:
        """The same function on other data, not checked again."""
        if isinstance(self.function, ScalarLoss) and batch_size == "auto":  # the loss may couple the examples
            batch_size = None
        return replace(self, batches=replace(Batches.of(data, batch_size=batch_size), seed=self.seed))

    def first(self, examples: int | None) -> Objective:
        """The same function on the first so many examples of the data only; on all of it for None."""
        return self if examples is None else replace(self, batches=self.batches.first(examples))

    def split(self) -> list[tuple[float, Objective]]:
        """The number of terms of every batch that has any, and the same function on it alone, computed as in a pass."""
        alone = list(self.batches.separate())
        terms = Passes(self, lambda index, batch: (index, self.function.weight(batch))).each(lambda pair: pair)
        return [(weight, replace(self, batches=alone[index], seed=self.seed + index)) for index, weight in terms]

    def in_mode(self, mode: Mode) -> Objective:
        """The same function in another mode, to be checked again."""
        return replace(self, mode=mode, _health=[])

    def narrowed(self, select: Select) -> Objective:
        """The same function of fewer parameters, those `select` names; the others are held fixed."""
        matches = predicate(select)
        parameters = dict(self.function.module.named_parameters())
        kept = {name: p for name, p in self.params.items() if matches(name, parameters[name])}
        if not kept:
            raise nothing_selected(select, list(self.params))
        rest = {name: p for name, p in self.params.items() if name not in kept}
        health = [h.narrowed(kept) for h in self._health]  # second derivatives of a part are right if those of all are
        known = [h for h in health if len(h.unused) < len(kept)]
        return replace(self, params=kept, frozen={**self.frozen, **rest}, _health=known)

    def to(self, *, dtype: torch.dtype | None = None, device: torch.device | None = None) -> Objective:
        """The same function, computed in another dtype or on another device."""
        place = device or self.space.device, self.space.dtype if dtype is None else _fine(dtype)
        if place == (self.space.device, self.space.dtype):
            return self
        return replace(self, **{name: cast(getattr(self, name), *place) for name in ("params", "frozen", "buffers")})

    def with_state(self, state: Mapping[str, Tensor]) -> Objective:
        """The same function with the tensors of a state_dict, buffers included; strict about names and shapes."""
        module = self.function.module
        names = {id(t): name for name, t in (*module.named_parameters(), *module.named_buffers())}
        slots = {key: names[id(t)] for key, t in module.state_dict(keep_vars=True).items() if id(t) in names}
        own = {**self.params, **self.frozen, **self.buffers}
        given = {slots[key] for key in state.keys() & slots.keys()}  # of tied tensors one name is enough
        missing = {key for key, name in slots.items() if name not in given}
        unexpected = state.keys() - slots.keys()
        wrong = {key for key in slots.keys() & state.keys() if own[slots[key]].shape != state[key].shape}
        if missing or unexpected or wrong:
            raise BadObjective(
                f"The weights do not fit the model: {len(missing)} missing, {len(unexpected)} unexpected, {len(wrong)} "
                f"of another shape, such as {', '.join(sorted(missing | unexpected | wrong)[:3])}.",
                "Give the architecture that the weights were saved from.",
            )
        fresh = cast({slots[key]: t for key, t in state.items()}, self.space.device, self.space.dtype)
        return replace(
            self,
            params={name: fresh.get(name, t) for name, t in self.params.items()},
            frozen={name: fresh.get(name, t) for name, t in self.frozen.items()},
            buffers={name: fresh.get(name, t) for name, t in self.buffers.items()},
            _health=[],
        )

    def check(self) -> Health:
        """What a cheap probe finds: finite, deterministic, twice differentiable. Done once; operators call it before
        their first product. Raises BadObjective or NonFinite with the fix."""
        if not self._health:
            self._health.append(examine(self))
        return self._health[0]

    @cached_property
    def fingerprint(self) -> dict[str, str]:
        """Hashes of the values of all parameters and buffers, and of the data."""
        model = dict(sorted({**self.params, **self.frozen, **self.buffers}.items()))
        return {"model": digest(model), "data": digest(self.batches.digests)}

    @property
    def facts(self) -> dict[str, Any]:
        """What it is made of, JSON-ready."""
        return {
            "model": type(self.function.module).__name__,
            "loss": self.function.name,
            "mode": self.mode,
            "parameters": self.space.size,
            "fingerprint": self.fingerprint,
        }

    def save(self, path: str | Path, *, data: str | Path | None = None) -> Path:
        """Write a file from which `Objective.load` and the command line rebuild this objective; returns its path.

        A model of stock torch.nn layers is stored as data; of any other only the path of its class, which is imported
        only where that is trusted. The batches are stored too, or, with `data`, the path and checksum of their file.
        """
        from curvature.objective import storage

        return storage.save(self, Path(path), data=data)

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        trust: bool = False,
        arch: Callable[[], nn.Module] | None = None,
        data: Any = None,
        batch_size: Cut = "auto",
    ) -> Objective:
        """The objective that `save` wrote. Raises UnsafeFile when it names code, unless `trust`, or `arch` makes the
        model; `data` replaces the stored data, as `on` does."""
        from curvature.objective import storage

        return storage.load(Path(path), trust=trust, arch=arch, data=data, batch_size=batch_size)

    def randomness(self, index: int = 0) -> AbstractContextManager[None]:
        """The random state in which batch number `index` is computed."""
        return frozen_randomness(self.seed + index)

    @contextmanager
    def context(self) -> Iterator[Counter[str]]:
        """The state every model call runs in; whatever it changes is restored. Yields what compat rewrote."""
        module = self.function.module
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.autocast(self.space.device.type, enabled=False),
            in_mode(module, self.mode == "train"),
            twice_differentiable() as rewrites,
        ):
            yield rewrites

    def complete(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`tensors` and everything else the model computes with; buffers as copies that a call may write to."""
        return {**self.frozen, **{name: t.clone() for name, t in self.buffers.items()}, **tensors}


def _unwrapped(module: nn.Module) -> nn.Module:
    """The eager module inside wrappers that cannot be differentiated twice: torch.compile's and DDP's."""
    while type(module).__name__ in ("OptimizedModule", "DistributedDataParallel", "DataParallel"):
        inner = "_orig_mod" if type(module).__name__ == "OptimizedModule" else "module"
        module = getattr(module, inner)
    return module


def _check_placement(params: Mapping[str, nn.Parameter]) -> None:
    """Raise BadObjective unless all parameters hold real numbers on one device."""
    for name, p in params.items():
        if type(p).__name__ in ("DTensor", "FlatParameter"):  # of FSDP, which is imported only where it is used
            raise BadObjective(
                f"The parameter {name} is sharded: this process holds a part of it ({type(p).__name__}).",
                "Load the full state_dict (get_model_state_dict, full_state_dict=True) into the module without FSDP.",
            )
        if isinstance(p, nn.parameter.UninitializedParameter) or p.device.type == "meta":
            raise BadObjective(
                f"The parameter {name} has no values yet.",
                "Run one batch through lazy layers, or load the weights.",
            )
        if p.is_complex():
            raise BadObjective(
                f"The parameter {name} is complex.", "Hold its real and imaginary parts in two real parameters."
            )
    devices = sorted({str(p.device) for p in params.values()})
    if len(devices) > 1:
        raise BadObjective(
            f"The parameters lie on {', '.join(devices)}.",
            "Move the model to one device, or select= those of one.",
        )


def _fine(dtype: torch.dtype) -> torch.dtype:
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"Second derivatives take torch.float32 or torch.float64, but got {dtype}.")
    return dtype


def _working_dtype(params: Mapping[str, nn.Parameter]) -> torch.dtype:
    """float64 if any parameter has it, else float32: half precision is too coarse for second derivatives."""
    return torch.float64 if any(p.dtype == torch.float64 for p in params.values()) else torch.float32
