"""The cheap check an objective passes before the first product is believed, made of probes that a doctor can list.

Stock torch returns silently wrong second derivatives in places (backwards that are not differentiable themselves but do
not say so), and noisy or non-finite objectives give spectra without meaning. On the first batch, at the cost of about
ten gradients, this finds them, and the part of the model where they are.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from curvature.errors import BadObjective, CurvatureError, NonFinite, TooLarge, listing, one_line
from curvature.objective.batches import arrays, halves, leading, moved, stored_values
from curvature.objective.blame import REFUSING, Replay, nodes_of
from curvature.objective.difference import (
    DIFFERENCE,
    NEAR,
    ROUNDING,
    SYMMETRY,
    asymmetry,
    changing,
    difference,
    norm,
    value_of,
)
from curvature.objective.products import gradient_graph

if TYPE_CHECKING:
    from curvature.objective.objective import Objective

RUNNING = ("running_mean", "running_var", "num_batches_tracked")  # written in training, and not computed with
STEPPING = 1e-4  # how far off a product may be where a call writes to buffers: what it then does has no derivative
TWICE = ("derivative for", "differentiate twice", "double backward")
CUTS = "detach(), no_grad(), item(), argmax or NumPy"
HELD = "The batch is a {}: take what it holds, as in {}."
TYPES = (  # how torch complains of integers where it takes floating point, or the other way round
    "Input type (",
    "input dtype (",
    "target dtype",
    "same dtype",
    "mixed dtype",
    "scalar type",
    *(f"not implemented for '{kind}'" for kind in ("Byte", "Int", "Long")),
)
FIXES = {  # words of torch -> what to do
    **dict.fromkeys(
        TYPES,
        "Give numbers as floating point, x.float(), pictures as x.float() / 255, and labels or indices as y.long().",
    ),
    "modified by an inplace operation": "Do not change its result in place: x = x + 1 for x += 1, inplace=False.",
    "FlexAttention": "Take another attention: attn_implementation='eager', or scaled_dot_product_attention.",
    "unexpected keyword argument": (
        "Call the entries of a dict as the model's forward does, or give (inputs, targets), in a file x and y."
    ),
    "must be Tensor, not dict": HELD.format("dict", "batch['x']"),
    "found type 'dict'": HELD.format("dict", "batch['x']"),
    "must be Tensor, not list": HELD.format("list", "x, y = batch"),
    "must be Tensor, not tuple": HELD.format("tuple", "x, y = batch"),
}


@dataclass(frozen=True)
class Health:
    """What the check found in a healthy objective.

    `rewrites` counts by name what was replaced in a pass to be twice differentiable; `unused` are selected parameters
    that the gradient of the first batch does not reach, and `detached` those of them with which the loss changes all
    the same: derivatives take them as constants. `difference` is the relative difference between a Hessian product and
    a finite difference of gradients in float64, None when the model cannot be run in float64;
    `example_bytes` is the memory that the graph of a gradient holds for each example, and `example_tensor` that of its
    tensors, one with another: the mean over bytes of how many bytes the tensor has that they are in. `altered` are
    layers, with the reason, whose parameters turned out not to be known by what goes through them: whoever finds out
    adds them.
    """

    rewrites: Mapping[str, int] = field(default_factory=dict)
    unused: tuple[str, ...] = ()
    detached: tuple[str, ...] = ()
    difference: float | None = None
    example_bytes: float = 0.0
    example_tensor: float = 0.0
    altered: dict[str, str] = field(default_factory=dict)

    def narrowed(self, names: Container[str]) -> Health:
        """The same of the parameters of these names alone."""
        unused, detached = (tuple(name for name in some if name in names) for some in (self.unused, self.detached))
        return replace(self, unused=unused, detached=detached)

    @property
    def idle(self) -> tuple[str, ...]:
        """The unused parameters with which the loss does not change."""
        return tuple(name for name in self.unused if name not in self.detached)


class Seen(NamedTuple):
    """What a probe saw where nothing is wrong: a sentence, and what to do where it is worth doing something.

    `open` says that the question could not be answered.
    """

    text: str
    advice: str = ""
    open: bool = False


@dataclass
class Examination:
    """What is known of an objective while it is examined, by one probe after the other."""

    objective: Objective
    batch: Any = None
    value: float = 0.0  # of the loss, summed over the batch
    leaves: dict[str, Tensor] = field(default_factory=dict)
    grads: list[Tensor | None] = field(default_factory=list)
    detached: tuple[str, ...] = ()
    rewrites: dict[str, int] = field(default_factory=dict)
    held: list[int] = field(default_factory=list)  # bytes of each tensor that the graph of the gradient holds
    written: list[str] = field(default_factory=list)  # buffers that a call writes to, and may compute with
    asymmetry: float | None = None
    difference: float | None = None
    products: int = 0  # with the Hessian, until now

    @property
    def health(self) -> Health:
        """What all probes found."""
        total, examples = sum(self.held), leading(self.batch) or 1
        tensor = sum(size**2 for size in self.held) / total if total else 0.0
        sizes = total / examples, tensor / examples
        return Health(self.rewrites, self.unused, self.detached, self.difference, *sizes)

    @property
    def unused(self) -> tuple[str, ...]:
        """The parameters that the gradient does not reach."""
        return tuple(name for name, g in zip(self.leaves, self.grads, strict=True) if g is None)

    def run(self, probe: Probe) -> Seen:
        """What a probe sees; BadObjective, NonFinite or TooLarge says what is wrong, where, and the fix."""
        try:
            return probe(self)
        except Exception as error:  # models and losses can raise anything
            raise self._explained(error) from error

    def replay(self) -> Replay:
        """The first batch once more, to see where something is wrong."""
        return Replay(self.objective, self.batch)

    def _explained(self, error: Exception) -> CurvatureError:
        ours = explained(error, 1, cut=self.objective.batches.cut)
        if isinstance(error, CurvatureError) or isinstance(ours, TooLarge) or self.batch is None:
            return ours
        where = self.replay().raising()
        return type(ours)(f"{ours.cause.removesuffix('.')}, in {where}.", ours.fix) if where else ours


Probe = Callable[[Examination], Seen]


def examine(objective: Objective) -> Health:
    """The health of `objective`; raises BadObjective or NonFinite, with the fix, when it has none."""
    examination = Examination(objective)
    for probe in PROBES.values():
        examination.run(probe)
    return examination.health


def _parameters(examination: Examination) -> Seen:
    """All tensors hold finite numbers."""
    objective = examination.objective
    for name, tensor in {**objective.params, **objective.frozen, **objective.buffers}.items():
        values = stored_values(tensor)
        if tensor.is_floating_point() and not torch.isfinite(values).all() and "mask" not in name:
            count = int((~torch.isfinite(values)).sum())
            raise NonFinite(
                f"{name} has {count} of {tensor.numel()} entries that are not finite.",
                "Load an earlier checkpoint.",
            )
    space = objective.space
    text = f"{space.size:,} numbers in {len(space.names)} tensors, {str(space.dtype).removeprefix('torch.')}"
    held = sum(t.numel() for t in objective.frozen.values())
    return Seen(f"{text}, on {space.device}" + (f"; {held:,} more are held fixed" if held else ""))


def _data(examination: Examination) -> Seen:
    """There is a first batch, and a second pass over the data is like the first."""
    objective = examination.objective
    batches = objective.batches
    first, *more = [*islice(batches, 2)] or [None]
    if first is None:
        raise BadObjective("The data is empty: no batch came.", "Check the path and the filters of the data.")
    if more:
        objective.function.check_counted(first)
    if not batches.fixed and batches.digests != batches.digested():
        raise BadObjective(
            "A second pass over the data gave other batches than the first, so products would not be of one matrix.",
            "Use shuffle=False and fixed augmentation, or pass a list of batches: list(loader).",
        )
    examination.batch = moved(first, objective.space.device, objective.space.dtype)
    return Seen("the same batches in every pass" if more else "one batch")


def _loss(examination: Examination) -> Seen:
    """The loss of the batch fits its outputs and targets, is finite, and is the same when computed again."""
    objective, batch = examination.objective, examination.batch
    with objective.context():
        tensors = objective.complete(objective.params)
        with objective.randomness():
            objective.function.check(tensors, batch)
        values = [value_of(objective, batch) for _ in range(2)]
    changed = [name for name, buffer in objective.buffers.items() if not torch.equal(buffer, tensors[name])]
    examination.written = [name for name in changed if not name.endswith(RUNNING)]
    if not torch.isfinite(torch.tensor(values)).all():
        given = [stored_values(t) for t in arrays(batch) if isinstance(t, Tensor)]
        if count := sum(int((~torch.isfinite(t)).sum()) for t in given):
            raise NonFinite(
                f"The loss of the first batch is {values[0]}. Of the numbers in the batch {count} are not finite.",
                "Leave these examples out, or fill them in.",
            )
        where = examination.replay().overflowing()
        raise NonFinite(
            f"The loss of the first batch is {values[0]}{f': it begins in {where}' if where else ''}.",
            "Check the data and the weights for overflow.",
        )
    if abs(values[0] - values[1]) > ROUNDING * objective.space.eps * abs(values[0]):  # on GPUs sums may not repeat
        raise BadObjective(
            f"The loss is random: the first batch gave {values[0]:.6g}, then {values[1]:.6g}.",
            "Draw random numbers only from the global generators of torch, Python or NumPy, which are fixed here.",
        )
    examination.value = values[0]
    terms = objective.function.weight(batch)
    each = values[0] / terms if terms else values[0]
    return Seen(f"{objective.function.name}: {each:.6g}, the mean over {terms:g} terms of the first batch")


def _examples(examination: Examination) -> Seen:
    """Where tensors were cut into batches, the loss of a batch is the sum over those of its halves.

    Whether the first axis counts examples, and whether the model computes each by itself, is seen only in numbers. In
    training mode they may depend on the batch: batch normalisation does by design.
    """
    objective, batch = examination.objective, examination.batch
    if not objective.batches.cut or objective.mode == "train" or (leading(batch) or 0) < 2:
        return Seen("the batches are those that were given")
    with objective.context():
        together = value_of(objective, batch)
        try:
            apart = sum(value_of(objective, half) for half in halves(batch))
        except Exception as error:
            raise _coupled(f"a half of the first batch fails ({one_line(error)})") from error
    rounding = ROUNDING * objective.space.eps * (abs(together) + float(objective.function.weight(batch)))
    if abs(together - apart) > rounding:
        raise _coupled(f"the first batch has the loss {together:.6g}, and its halves {apart:.6g} together")
    return Seen("computed each by itself, however they are cut into batches")


def _coupled(how: str) -> BadObjective:
    return BadObjective(
        f"The tensors were cut into batches along their first axis, but do not fall into examples there: {how}.",
        "Take them as one batch: batch_size=None, or a --batch-size of all of them. Or pass a list of batches.",
    )


def _gradient(examination: Examination) -> Seen:
    """The gradient of the loss reaches the parameters, and is finite."""
    objective, batch = examination.objective, examination.batch
    with objective.context() as rewrites:  # of one pass
        try:
            with objective.randomness(), _saved_bytes() as held:
                leaves, grads = gradient_graph(objective, batch)
        except RuntimeError as error:
            if "saved tensor hooks" not in str(error):
                raise
            rewrites.clear()
            held = {}  # a loss that calls torch.func allows no such look at its graph
            with objective.randomness():
                leaves, grads = gradient_graph(objective, batch)
    examination.leaves, examination.grads = leaves, grads
    unused = examination.unused
    if unused:
        with objective.context():
            examination.detached = changing(objective, batch, examination.value, unused)
    if len(unused) == len(leaves):
        raise _unreached(examination)
    for name, g in zip(leaves, grads, strict=True):
        if g is not None and not torch.isfinite(g).all():
            where = examination.replay().overflowing()
            raise NonFinite(
                f"The gradient with respect to {name} is not finite{f': it begins in {where}' if where else ''}.",
                "Check the loss for overflow.",
            )
    examination.rewrites, examination.held = dict(rewrites), list(held.values())
    size = norm(g.detach() for g in grads if g is not None) / (objective.function.weight(batch) or 1)
    text = f"of norm {size:.4g}"
    told, fixes = _unused(examination)
    if not size:
        text += ": exactly zero"
        fixes.insert(0, "Look for dead or saturated units, and whether outputs and targets fit together.")
    elif not told:
        text += ", with respect to all parameters"
    return Seen("; ".join([text, *told]), " ".join(fixes))


def _unused(examination: Examination) -> tuple[list[str], list[str]]:
    """What there is to say of the parameters that the gradient does not reach, and to do about them."""
    detached, idle = examination.detached, examination.health.idle
    told, fixes = [], []
    if detached:
        some = listing(detached, 3)
        told.append(f"the loss changes with {len(detached)} parameters that no gradient reaches: {some}")
        fixes.append(f"Derivatives take them as constants: remove {CUTS}, or hold them fixed (--exclude, select=).")
    if idle:
        told.append(f"the loss does not depend on {len(idle)} parameters: {listing(idle, 3)}")
        fixes.append("Leave out what it does not depend on (--exclude, select=), unless other batches use it.")
    if told and (where := examination.replay().unlinked(detached or idle)):
        told[-1] += f". No gradient goes through {where}"
    return told, fixes


def _unreached(examination: Examination) -> BadObjective:
    """The refusal of a loss whose gradient reaches no parameter."""
    where = examination.replay().unlinked(examination.detached or examination.unused)
    if examination.detached:
        return BadObjective(
            f"The loss changes with the selected parameters, but no gradient goes through {where or 'the loss'}.",
            f"Compute it without {CUTS}.",
        )
    return BadObjective(
        f"The loss does not depend on the selected parameters{f': no gradient goes through {where}' if where else ''}.",
        "Compute it from the model that is passed in, or select parameters that it uses.",
    )


@contextmanager
def _saved_bytes() -> Iterator[dict[int, int]]:
    """Yields the bytes of every storage that graphs built inside save, by address."""
    held: dict[int, int] = {}

    def pack(tensor: Tensor) -> tuple[Tensor, int]:
        with suppress(NotImplementedError, RuntimeError):  # sparse tensors have no storage
            storage = tensor.untyped_storage()
            held[storage.data_ptr()] = storage.nbytes()
        return tensor, tensor._version

    def unpack(packed: tuple[Tensor, int]) -> Tensor:
        tensor, version = packed
        if tensor._version != version:  # what torch looks at only where nobody hooks in
            raise RuntimeError("a tensor needed for gradient computation has been modified by an inplace operation")
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield held


def _graph(examination: Examination) -> Seen:
    """No node in the graph of the gradients refuses to be differentiated, or is known to do it wrong.

    Such nodes may hang on detached leaves that the second pass never visits: it then returns wrong numbers silently.
    """
    names = [node.name() for node in nodes_of(examination.grads)]
    if any(name in REFUSING for name in names):
        where = listing(examination.replay().refusing(), 3)
        raise BadObjective(
            "A backward in the model cannot be differentiated again (once_differentiable, or no derivative known)"
            f"{f': {where}' if where else ''}.",
            "Replace the custom autograd Function or fused kernel by plain torch operations.",
        )
    if "WeightNormInterfaceBackward0" in names:  # what compat rewrites, out of its reach
        raise BadObjective(
            "weight_norm inside TorchScript has wrong second derivatives in torch.",
            "Export the eager model, or remove the weight norm before scripting.",
        )
    return Seen(f"all {len(names):,} operations behind the gradient have derivatives")


def _products(examination: Examination) -> Seen:
    """The Hessian can be multiplied with vectors; whether it is symmetric is judged when more is known."""
    with examination.objective.context():
        examination.asymmetry = asymmetry(examination.objective, examination.leaves, examination.grads)
    examination.products += 2
    return Seen("the backward pass can be differentiated")


def _difference(examination: Examination) -> Seen:
    """A product is the difference of gradients."""
    found, products = difference(examination.objective, examination.batch)
    examination.difference = found
    examination.products += products
    if found is None:
        return Seen("not known: the model does not run in float64, in which it is compared", open=True)
    if found > (STEPPING if examination.written else DIFFERENCE):
        raise _wrong(
            f"a Hessian product of the first batch is {found:.1%} off the finite difference of gradients", examination
        )
    text = f"a product is within {found:.1g} of a finite difference of gradients, in float64"
    if found <= NEAR:
        return Seen(text)
    return Seen(
        f"{text}, which is more than rounding", "Look for item() and detach(), and for parts that compute in float32."
    )


def _symmetry(examination: Examination) -> Seen:
    """The Hessian is symmetric. In float64 one that is right may be as asymmetric as float32 makes it, in which many
    models compute their norms."""
    gap, known = examination.asymmetry, examination.difference is not None
    if not gap or (known and gap < SYMMETRY[torch.float32]):
        return Seen("u.Hv = v.Hu but for rounding")
    if not known:
        raise _wrong(f"the Hessian of the first batch is not symmetric, by {gap:.1%}", examination)
    # A loss near zero, say: its curvature drowns in the rounding of the probabilities.
    raise BadObjective(
        f"float32 is too coarse here: rounding makes the Hessian of the first batch asymmetric by {gap:.1%}.",
        "Compute in float64: dtype=torch.float64, or --dtype float64 on the command line.",
    )


def _wrong(how: str, examination: Examination) -> BadObjective:
    """The refusal of second derivatives that torch computes without complaint."""
    cause = f"Second derivatives are wrong: {how}"
    if custom := examination.replay().custom():
        fix = (
            "Make that autograd Function twice differentiable: ctx.save_for_backward, torch's operations, no detach()."
        )
        return BadObjective(f"{cause}. Not torch's own is {listing(custom, 3)}.", fix)
    if examination.written:
        fix = "Use mode='eval' (--mode eval) if they stay as they are there, as those of spectral_norm do."
        return BadObjective(
            f"{cause}. Calls change {listing(examination.written, 3)}, by steps without derivative.", fix
        )
    return BadObjective(f"{cause}.", "Look for custom autograd Functions and detach().")


PROBES: dict[str, Probe] = {
    "parameters": _parameters,
    "data": _data,
    "loss": _loss,
    "examples": _examples,
    "gradient": _gradient,
    "graph": _graph,
    "products": _products,
    "difference": _difference,
    "symmetry": _symmetry,
}


def explained(error: Exception, number: int, *, cut: bool = False) -> CurvatureError:
    """An error of the user's model or loss in batch `number`, or of torch about it, in our words.

    Shapes may not fit because the batch was `cut` along an axis that counts no examples.
    """
    if isinstance(error, CurvatureError):
        return error
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error):
        return TooLarge(
            f"Batch {number} does not fit into memory.", "Use smaller batches, fewer vectors, or a larger machine."
        )
    if any(words in str(error) for words in TWICE):
        return BadObjective(
            f"The model has no second derivatives: {one_line(error)}.",
            "Replace that layer or loss by plain torch operations (attention: the math or eager implementation).",
        )
    expected = "Check that inputs and targets have the shapes and dtypes they expect"
    if cut and isinstance(error, RuntimeError | IndexError | ValueError):
        expected += (
            ", with examples along the first axis; of others make one batch: batch_size=None, or a --batch-size of all"
        )
    fix = next((fix for words, fix in FIXES.items() if words in str(error)), f"{expected}.")
    return BadObjective(f"The model or the loss failed on batch {number}: {one_line(error)}.", fix)
