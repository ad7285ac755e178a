"""Networks with their hidden units in the order of another's: permutations that leave the function as it is.

Which axes of which tensors count the same units is read from the graph of the model. What that does not tell is held in
order, with whatever is computed from it or into it: only units that are understood from end to end are permuted.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.fx import Node, Tracer
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from curvature.errors import BadObjective, listing, one_line
from curvature.objective.function import OutputLoss, Tensors
from curvature.objective.objective import Objective
from curvature.objective.passes import Passes
from curvature.operators.engine import need_objective
from curvature.operators.followed import AGREEMENT
from curvature.probes.path import End, end_of

Axis = tuple[str, int]  # of a parameter or buffer, by its name
Units = Mapping[str, Sequence[Axis]]  # group -> the axes that count the same units
Order = Int[Tensor, " u"]  # which unit comes at each place

HELD: Axis = ("", 0)  # what stays in order: inputs, outputs, and all that is not understood
SWEEPS = 100
EXAMPLES = 256  # on which a permuted network is compared with itself
ROUNDING = 1e-12  # share of the squared length that an order gains by rounding alone
BY_HAND = "Say which axes count the same units: units={'1': [('fc1.weight', 0), ('fc1.bias', 0), ('fc2.weight', 1)]}."

# what makes each unit of its result from the same unit of what it is given: layers, and functions and methods by name
LAYERS = (
    *(nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout),
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Softplus, nn.Softsign),
    *(nn.Tanh, nn.Sigmoid, nn.LogSigmoid, nn.Hardtanh, nn.Hardsigmoid, nn.Hardswish, nn.Hardshrink, nn.Softshrink),
    *(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.Upsample),
    *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d),
    *(nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d),
)
NAMES = (
    *("relu", "relu_", "relu6", "leaky_relu", "elu", "selu", "celu", "gelu", "silu", "mish", "softplus", "softsign"),
    *("tanh", "sigmoid", "logsigmoid", "hardtanh", "hardsigmoid", "hardswish", "abs", "exp", "sin", "cos", "sqrt"),
    *("add", "add_", "iadd", "sub", "mul", "mul_", "imul", "truediv", "div", "neg", "square", "pow", "clamp"),
    *("max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d", "interpolate"),
    *("adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "contiguous", "clone"),
    *("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout"),
)
NUMBERS = ("size", "dim", "len", "shape", "ndim", "dtype", "device")  # of a tensor, whatever its units are
POSITIONS = ({2}, {2, 3}, {2, 3, 4}, {-1, -2})  # axes after those of examples and units


def align(
    objective: Objective, end: End, *, units: Units | None = None, sweeps: int = SWEEPS, seed: int = 0
) -> Objective:
    """The network at `end` with its hidden units permuted, so that its parameters come near those of the objective:
    min |theta - P(end)| over what leaves the function as it is, running statistics of normalisations permuted too.

    `end` is as in `interpolate`, which takes what is returned here: `interpolate(objective, align(objective, end))`.
    Each group of units in turn gets the best order given those of the others, a linear assignment, until none is better
    or `sweeps` times over, in a random order: a local minimum, which another `seed` may undercut.

    `units` says which axes of parameters and buffers count the same hidden units, by group; by default `units_of`
    finds them. An axis several times as long as the shortest of its group has so many entries in a row for each unit,
    as after a Flatten. BadObjective where none are found, or the permuted network has other outputs than before on the
    first examples of the objective's data, as it would if an axis were missing.

    Ainsworth, Hayase & Srinivasa 2023 (arXiv:2209.04836), weight matching.

    >>> net = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Tanh(), torch.nn.Linear(2, 1))
    >>> objective = Objective.of(net, "mse", (torch.randn(8, 2), torch.zeros(8, 1)))
    >>> params, flip = objective.params, [1, 0]
    >>> swapped = {"0.weight": params["0.weight"][flip], "0.bias": params["0.bias"][flip]}
    >>> end = objective.at({**params, **swapped, "2.weight": params["2.weight"][:, flip]})
    >>> torch.equal(align(objective, end).position, objective.position)
    True
    """
    need_objective("align", objective)
    if sweeps < 1:
        raise ValueError(f"Expected a sweep over the groups at least, but got sweeps={sweeps}.")
    other = end_of(objective, end)
    units = units_of(objective) if units is None else units
    counts = _counts(units, {**other.params, **other.buffers})
    orders = _matched(objective.params, other.params, units, counts, sweeps, seed)
    params, buffers = dict(other.params), dict(other.buffers)
    for group, order in orders.items():
        for tensors in (params, buffers):
            tensors.update(_reordered(tensors, units[group], order))
    aligned = replace(other, params=params, buffers=buffers)
    if not _same(other, aligned):
        raise BadObjective(f"The model has other outputs with its units permuted: {listing(list(units))}.", BY_HAND)
    return aligned


def units_of(objective: Objective) -> dict[str, list[Axis]]:
    """The axes (name, axis) of parameters and buffers that count the same hidden units, by the parameter that makes
    them: those that the graph of the model shows can be permuted.

    Linear, convolution and embedding layers make units, and take those that the last ones have made; normalisations,
    elementwise functions, pooling, dropout and flattening pass them on, and sums of two tie them together. Units that
    go through anything else (attention, recurrent layers, concatenation) or that the objective holds fixed are held
    in order. BadObjective where nothing is left, or torch.fx cannot trace the model.

    >>> net = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.ReLU(), torch.nn.Linear(3, 1))
    >>> units_of(Objective.of(net, "mse", (torch.randn(8, 2), torch.zeros(8, 1))))
    {'0.weight': [('0.weight', 0), ('0.bias', 0), ('2.weight', 1)]}
    """
    tied = _Tied(objective)
    groups: dict[Axis, list[Axis]] = {}
    for axis in list(tied.known):
        groups.setdefault(tied.root(axis), []).append(axis)
    groups.pop(tied.root(HELD))
    if not groups:
        raise BadObjective("No hidden units are understood that could be permuted.", BY_HAND)
    return {axes[0][0]: axes for axes in groups.values()}


class _Tracer(Tracer):
    proxy_buffer_attributes = True  # else a model that updates one in place would do so when it is traced


class _Tied:
    """Which axes count the same units: a forest, in which each axis knows another of its group, its root itself."""

    def __init__(self, objective: Objective) -> None:
        module = objective.function.module
        named = (module.named_parameters(remove_duplicate=False), module.named_buffers(remove_duplicate=False))
        tensors = dict(chain(*named))
        self.names = {id(t): name for name, t in reversed(tensors.items())}  # the first of several, as objectives do
        self.known: dict[Axis, Axis] = {HELD: HELD}
        try:
            with objective.randomness():
                # of a copy with the same tensors: a model may keep what it is called with, or count its calls
                module = copy.deepcopy(module, {id(t): t for t in tensors.values()}).eval()
                graph = _Tracer().trace(module)
        except Exception as error:  # models can raise anything
            raise BadObjective(f"The graph of the model cannot be traced: {one_line(error)}.", BY_HAND) from error
        self._hold(tensors[name] for name in objective.frozen)
        made: dict[Node, Axis | None] = {}  # the units of every tensor in the graph, None of numbers
        for node in graph.nodes:
            given = [axis for before in node.all_input_nodes if (axis := made[before]) is not None]
            match node.op:
                case "call_module":
                    made[node] = self._called(module.get_submodule(str(node.target)), given)
                case "call_function" | "call_method":
                    made[node] = self._computed(node, given)
                case "get_attr":
                    name = str(node.target)  # of a constant of the graph where it is none of the model's
                    made[node] = self._hold([tensors[name]] if name in tensors else [])
                case _:  # inputs and outputs
                    made[node] = self._tie([HELD, *given])

    def root(self, axis: Axis) -> Axis:
        """What stands for the group of an axis."""
        while (up := self.known.setdefault(axis, axis)) != axis:
            axis = up
        return axis

    def _tie(self, axes: Iterable[Axis]) -> Axis:
        first, *others = [self.root(axis) for axis in axes]
        self.known.update(dict.fromkeys(others, first))
        return first

    def _hold(self, tensors: Iterable[Tensor]) -> Axis:
        return self._tie([HELD, *(self._axis(t, axis) for t in tensors for axis in range(t.ndim))])

    def _axis(self, tensor: Tensor, axis: int) -> Axis:
        """HELD for what is computed from other tensors, as by weight norm."""
        return (self.names[id(tensor)], axis) if id(tensor) in self.names else HELD

    def _called(self, layer: nn.Module, given: list[Axis]) -> Axis:
        """The units that a layer makes of those it is given."""
        kind = _kind(layer)
        if kind is None:
            self._hold(layer.parameters())
            return self._tie([HELD, *given])
        taken, made = (
            [self._axis(t, axis) for name, axis in axes.items() if (t := getattr(layer, name)) is not None]
            for axes in kind
        )
        passed = self._tie([*given, *taken] or [HELD])
        return self._tie(made) if made else passed

    def _computed(self, node: Node, given: list[Axis]) -> Axis | None:
        """Those that a function or method makes of what it is given."""
        name = node.target if isinstance(node.target, str) else node.target.__name__
        name = str(node.args[1] if name == "getattr" else name)
        alone = node.op == "call_method" or node.target.__module__ in ("_operator", "builtins", "math")
        if name in NUMBERS or (alone and node.all_input_nodes and not given):
            return None
        return self._tie(given if given and _passes(name, node) else [HELD, *given])


def _kind(layer: nn.Module) -> tuple[dict[str, int], dict[str, int]] | None:
    """The tensors of a layer with their axes that count the units it is given, and those that it makes; of the latter
    none where they are the same units. None for a layer that is not understood."""
    same = {"weight": 0, "bias": 0}
    match layer:
        case nn.Linear():
            return {"weight": 1}, same
        case nn.Embedding():  # is given indices, which are in no tensor of its
            return {}, {"weight": 1}
        case _ConvNd(groups=1):
            given = int(not layer.transposed)
            return {"weight": given}, {"weight": 1 - given, "bias": 0}
        case _ConvNd() if layer.groups == layer.in_channels:
            return same, {}
        case _NormBase():
            return {**same, "running_mean": 0, "running_var": 0}, {}
        case nn.GroupNorm() if layer.num_groups in (1, layer.num_channels):
            return same, {}
        case nn.LayerNorm():
            return same, {}
        case nn.RMSNorm():
            return {"weight": 0}, {}
        case nn.PReLU():
            return {"weight": 0} if layer.num_parameters > 1 else {}, {}
        case nn.Flatten():
            return ({}, {}) if (layer.start_dim, layer.end_dim) == (1, -1) else None
    return ({}, {}) if isinstance(layer, LAYERS) else None


def _passes(name: str, node: Node) -> bool:
    """Whether a function makes each unit from the same unit of its arguments, or so many in a row, as flattening."""
    given = [*node.args[1:], *node.kwargs.values()]
    match name:
        case "flatten":
            return given == [1]
        case "view" | "reshape":
            return len(given) == 2 and isinstance(given[1], int) and given[1] == -1
        case "mean":
            axes = given[0] if given else ()
            return set(axes if isinstance(axes, Sequence) else [axes]) in POSITIONS
    return name in NAMES


def _counts(units: Units, tensors: Tensors) -> dict[str, int]:
    """How many units each group has; ValueError where its axes do not fit."""
    axes = [axis for group in units.values() for axis in group]
    if not axes or len(set(axes)) < len(axes) or not all(units.values()):
        raise ValueError("units has axes (name, axis) for every group, each axis once.")
    if wrong := [(name, axis) for name, axis in axes if name not in tensors or not 0 <= axis < tensors[name].ndim]:
        raise ValueError(f"There are no such axes of parameters or buffers: {listing(wrong)}. See `units_of`.")
    counts = {}
    for group, members in units.items():
        lengths = {axis: tensors[axis[0]].shape[axis[1]] for axis in members}
        counts[group] = min(lengths.values())
        if any(length % counts[group] for length in lengths.values()):
            raise ValueError(f"The axes of group {group!r} cannot count the same units: their lengths are {lengths}.")
    return counts


def _matched(
    ours: Tensors, theirs: Tensors, units: Units, counts: dict[str, int], sweeps: int, seed: int
) -> dict[str, Order]:
    """The order of each group in which theirs are nearest to ours, found by turns."""
    generator, theirs = torch.Generator().manual_seed(seed), dict(theirs)
    groups, orders = list(units), {group: torch.arange(count) for group, count in counts.items()}
    for _ in range(sweeps):
        settled = True
        for group in (groups[i] for i in torch.randperm(len(groups), generator=generator).tolist()):
            axes = [axis for axis in units[group] if axis[0] in theirs]  # buffers follow
            order = _assigned(ours, theirs, axes, counts[group])
            names = {name for name, _ in axes}
            before, after = theirs, {**theirs, **_reordered(theirs, axes, order)}
            # a group that is on two axes of a tensor moves both, and the assignment has seen only one at a time
            gain = sum(_inner(ours[name], after[name]) - _inner(ours[name], before[name]) for name in names)
            if gain > ROUNDING * sum(_inner(ours[name], ours[name]) for name in names):
                theirs, orders[group], settled = after, orders[group][order], False
        if settled:
            break
    return orders


def _assigned(ours: Tensors, theirs: Tensors, axes: Iterable[Axis], count: int) -> Order:
    """The order of units with the largest sum of inner products between ours and theirs."""
    from scipy.optimize import linear_sum_assignment

    products = torch.zeros(count, count, dtype=torch.float64)
    for name, axis in axes:
        a, b = (t[name].double().movedim(axis, 0).reshape(count, -1) for t in (ours, theirs))
        products += (a @ b.T).cpu()
    return torch.from_numpy(linear_sum_assignment(products.numpy(), maximize=True)[1])


def _reordered(tensors: Tensors, axes: Iterable[Axis], order: Order) -> dict[str, Tensor]:
    """Those of the tensors that have any of the axes, with the units on them in another order."""
    made: dict[str, Tensor] = {}
    for name, axis in axes:
        if name in tensors:
            tensor = made.get(name, tensors[name])
            block = tensor.shape[axis] // len(order)  # entries for each unit
            places = (order[:, None] * block + torch.arange(block)).flatten()
            made[name] = tensor.index_select(axis, places.to(tensor.device))
    return made


def _inner(a: Tensor, b: Tensor) -> float:
    return float(torch.dot(a.double().flatten(), b.double().flatten()))


def _outputs(objective: Objective) -> list[Tensor]:
    """Those of the first examples, batch by batch, or the losses where that is all there is."""
    few = objective.first(EXAMPLES).in_mode("eval")  # dropout has one mask for all orders

    def outputs(batch: Any) -> Tensor:
        own = isinstance(few.function, OutputLoss)
        return (few.outputs(few.params, batch)[0] if own else few.total(few.params, batch)).detach()

    return Passes(few).each(outputs)


def _same(one: Objective, other: Objective) -> bool:
    """Whether both have the same outputs, up to rounding."""
    outputs = _outputs(one)
    size = max((float(t.abs().max()) for t in outputs), default=0.0)
    pairs = zip(outputs, _outputs(other), strict=True)
    return all(float((a - b).abs().max()) <= AGREEMENT[one.space.dtype] * size for a, b in pairs)
