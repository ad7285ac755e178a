"""The one context every model call runs in: stock torch code becomes twice differentiable, and right.

Reverse-over-reverse differentiates torch's own backward formulas. Some have no derivative (fused attention,
`embedding_bag`, `cdist`, cuDNN's recurrent layers) and one has a wrong one (`weight_norm`). Those calls, and
only those, are replaced by formulas whose every derivative is right; each stand-in says what it mends.

Calls from Python and the operators of `torch.export` graphs are seen; inside TorchScript only attention is
mended. Gradient checkpointing is left out: the backward passes that repeat the forward pass come after it, when the
module has its own parameters again, and the graph of a gradient holds what checkpointing would save anyway.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils import checkpoint

_aten = torch.ops.aten  # what exported graphs call, with other argument orders than torch.nn.functional
_REWRITES: dict[Any, tuple[str, Callable[..., Any]]] = {}  # torch function: name it is counted by, stand-in


@contextmanager
def twice_differentiable(module: nn.Module | None = None) -> Iterator[Counter[str]]:
    """Context in which calls of `module` can be differentiated twice; counts by name the calls it rewrote.

    Compiled code has no second derivative: if any part of `module` is compiled, all compiled code runs
    eagerly. Without a `module` it always does, which also covers compiled functions that a model calls. Every
    flag is as before afterwards, whatever the body raised. The attention flags belong to the process, so that
    two threads must not be inside at once.

    >>> x = torch.ones(1, 2, 3, requires_grad=True)
    >>> with twice_differentiable() as rewritten:
    ...     distances = torch.cdist(x, x)
    >>> rewritten
    Counter({'cdist': 1})
    """
    eagerly = torch.compiler.set_stance("force_eager") if _compiled(module) else nullcontext()
    with eagerly, sdpa_kernel(SDPBackend.MATH), _Rewriting() as rewriting, _checkpointing_nothing(rewriting.counts):
        yield rewriting.counts


@contextmanager
def _checkpointing_nothing(counts: Counter[str]) -> Iterator[None]:
    """Context in which `torch.utils.checkpoint.checkpoint`, however it was imported, just calls the function."""

    def apply(function: Callable[..., Any], preserve: bool, *args: Any) -> Any:
        counts["checkpoint"] += 1
        return function(*args)

    def around_the_call(*args: Any, **kwargs: Any) -> Iterator[None]:
        counts["checkpoint"] += 1
        yield

    stand_ins = {
        "CheckpointFunction": SimpleNamespace(apply=apply),
        "_checkpoint_without_reentrant_generator": around_the_call,
    }
    before = {name: getattr(checkpoint, name) for name in stand_ins}
    try:
        checkpoint.__dict__.update(stand_ins)
        yield
    finally:
        checkpoint.__dict__.update(before)


def _compiled(module: nn.Module | None) -> bool:
    # Importing the compiler takes seconds. As long as nobody has, nothing is compiled.
    dynamo = sys.modules.get("torch._dynamo.eval_frame")
    if dynamo is None or module is None:
        return dynamo is not None
    return any(
        part._compiled_call_impl is not None or isinstance(part, dynamo.OptimizedModule) for part in module.modules()
    )


class _Rewriting(TorchFunctionMode):
    """While active, the torch functions in the table are replaced. Inside their stand-ins the mode is off.

    That it is active is also what keeps nn.MultiheadAttention and TransformerEncoderLayer off their fused eval path.
    """

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function in _REWRITES:
            name, stand_in = _REWRITES[function]
            output = stand_in(*args, **kwargs)
            if output is not NotImplemented:  # which says that torch's own is right, or refuses more clearly
                self.counts[name] += 1
                return output
        return function(*args, **kwargs)


def _instead_of(*functions: Any, name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """The decorated function, with the arguments of the replaced ones, runs instead of them."""

    def register(stand_in: Callable[..., Any]) -> Callable[..., Any]:
        _REWRITES.update(dict.fromkeys(functions, (name, stand_in)))
        return stand_in

    return register


def _around(*functions: Any, name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """The decorated function runs instead, with the function that was called as its first argument."""

    def register(stand_in: Callable[..., Any]) -> Callable[..., Any]:
        _REWRITES.update({function: (name, partial(stand_in, function)) for function in functions})
        return stand_in

    return register


@_around(F.scaled_dot_product_attention, _aten.scaled_dot_product_attention.default, name="attention")
def _attention(function: Any, *args: Any, **kwargs: Any) -> Any:
    """The same call with the math kernel, the only one with second derivatives, whichever the model chose."""
    with sdpa_kernel(SDPBackend.MATH):
        return function(*args, **kwargs)


@_around(F.multi_head_attention_forward, name="attention")
def _multi_head_attention(function: Any, *args: Any, need_weights: bool = True, **kwargs: Any) -> Any:
    """This calls scaled_dot_product_attention where no mode sees it, unless the weights are needed."""
    return NotImplemented if need_weights else _attention(function, *args, need_weights=False, **kwargs)


@_around(torch.lstm, _aten.lstm.input, _aten.lstm.data, name="rnn")
@_around(torch.gru, _aten.gru.input, _aten.gru.data, name="rnn")
@_around(torch.rnn_tanh, _aten.rnn_tanh.input, _aten.rnn_tanh.data, name="rnn")
@_around(torch.rnn_relu, _aten.rnn_relu.input, _aten.rnn_relu.data, name="rnn")
def _rnn(function: Any, input: Tensor, *args: Any, **kwargs: Any) -> Any:
    """The same call without cuDNN, whose backward has no derivative.

    The CPU needs nothing: through oneDNN's LSTM too, float32 products agree with float64 ones to 1e-7.
    """
    if not input.is_cuda:
        return NotImplemented
    enabled = torch._C._get_cudnn_enabled()
    torch._C._set_cudnn_enabled(False)  # backends.cudnn.flags(enabled=False) sets five other flags as well
    try:
        return function(input, *args, **kwargs)
    finally:
        torch._C._set_cudnn_enabled(enabled)


@_instead_of(F.batch_norm, name="batch_norm")
def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:
    """In evaluation the scaling and shift that it is: torch's double backward does the arithmetic of training."""
    if training or running_mean is None or running_var is None:
        return NotImplemented
    scale = torch.rsqrt(running_var + eps)
    scale = scale if weight is None else scale * weight
    shift = -running_mean * scale if bias is None else bias - running_mean * scale
    shape = (1, -1) + (1,) * (input.ndim - 2)
    return input * scale.view(shape) + shift.view(shape)


@_instead_of(torch._weight_norm, _aten._weight_norm.default, name="weight_norm")
def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """g v / |v|, as torch computes it where its fused kernel (dim 0 or the last) does not apply.

    The fused kernel's second derivative is silently wrong, and not symmetric: derivatives.yaml passes the
    norms to _weight_norm_differentiable_backward as if they did not depend on v.
    """
    return v * (g / torch.norm_except_dim(v, 2, dim))


@_instead_of(F.hardsigmoid, _aten.hardsigmoid.default, name="hardsigmoid")
def _hardsigmoid(input: Tensor, inplace: bool = False) -> Tensor:
    """relu6(x + 3) / 6: hardsigmoid_backward has no derivative."""
    output = F.relu6(input + 3) / 6
    return input.copy_(output) if inplace else output


_instead_of(_aten.hardsigmoid_.default, name="hardsigmoid")(partial(_hardsigmoid, inplace=True))


@_instead_of(F.embedding, name="embedding")
def _embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Any:
    """Rows of `weight` whose gradient is dense and that of the loss.

    `scale_grad_by_freq` makes it the gradient of no function: its Jacobian is not symmetric. It is ignored.
    """
    if not (sparse or scale_grad_by_freq or max_norm is not None):
        return NotImplemented
    return _renormed(F.embedding(input, weight, padding_idx), max_norm, norm_type)


@_instead_of(_aten.embedding.default, name="embedding")
def _aten_embedding(
    weight: Tensor, ids: Tensor, padding_idx: int = -1, scale_grad_by_freq: bool = False, sparse: bool = False
) -> Tensor:
    padding = padding_idx if padding_idx >= 0 else None
    return _embedding(ids, weight, padding, scale_grad_by_freq=scale_grad_by_freq, sparse=sparse)


def _renormed(rows: Tensor, max_norm: float | None, norm_type: float) -> Tensor:
    """`rows` scaled down to `max_norm` by constants, as torch does, but without writing into the weight."""
    if max_norm is None:
        return rows
    norms = rows.detach().norm(norm_type, dim=-1, keepdim=True)
    scale = torch.where(norms > max_norm, max_norm / (norms + 1e-7), 1)  # embedding_renorm_ has the same 1e-7
    return rows + (scale - 1) * rows.detach()


@_instead_of(F.embedding_bag, name="embedding_bag")
def _embedding_bag(
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Any:
    """Rows of `weight`, then their sum, mean or maximum over each bag: torch's backward has no derivative.

    No shape depends on the values of `input`, so this runs under vmap too.
    """
    if input.is_nested or mode not in ("sum", "mean", "max"):
        return NotImplemented
    if per_sample_weights is not None and (mode != "sum" or per_sample_weights.shape != input.shape):
        return NotImplemented
    if input.dim() == 2 and offsets is None:
        offsets = input.shape[1] * torch.arange(len(input), device=input.device)
    elif input.dim() != 1 or offsets is None:
        return NotImplemented
    ids = input.reshape(-1)
    bag = torch.bucketize(torch.arange(len(ids), device=ids.device), offsets, right=True) - 1
    bags = len(offsets) - include_last_offset
    kept = torch.ones_like(ids, dtype=torch.bool) if padding_idx is None else ids != padding_idx % len(weight)
    rows = _renormed(F.embedding(ids, weight), max_norm, norm_type)
    if per_sample_weights is not None:
        rows = rows * per_sample_weights.reshape(-1, 1)
    if mode == "max":
        return _largest(rows, kept, bag, bags)
    total = _sum(rows, kept, bag, bags)
    return total if mode == "sum" else total / _sum(torch.ones_like(rows[:, :1]), kept, bag, bags).clamp(min=1)


@_instead_of(_aten.embedding_bag.default, _aten.embedding_bag.padding_idx, name="embedding_bag")
def _aten_embedding_bag(
    weight: Tensor,
    ids: Tensor,
    offsets: Tensor,
    scale_grad_by_freq: bool = False,
    mode: int = 0,
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> tuple[Tensor, None, None, None]:
    reduced = _embedding_bag(
        ids,
        weight,
        offsets,
        mode=("sum", "mean", "max")[mode],
        per_sample_weights=per_sample_weights,
        include_last_offset=include_last_offset,
        padding_idx=padding_idx,
    )
    return reduced, None, None, None  # the other three serve torch's own backward


def _sum(rows: Tensor, kept: Tensor, bag: Tensor, bags: int) -> Tensor:
    return rows.new_zeros(bags, rows.shape[1]).index_add(0, bag, rows.masked_fill(~kept[:, None], 0))


def _largest(rows: Tensor, kept: Tensor, bag: Tensor, bags: int) -> Tensor:
    """Maximum over each bag, zero if it is empty. The first of equals has the gradient, as in torch's own."""
    count, width = rows.shape
    index = bag[:, None].expand(-1, width)
    with torch.no_grad():
        least = rows.new_full((bags, width), -torch.inf)
        top = least.scatter_reduce(0, index, rows.masked_fill(~kept[:, None], -torch.inf), "amax")
        place = torch.arange(count, device=bag.device)[:, None]
        place = torch.where(kept[:, None] & (rows == top[bag]), place, count)
        first = bag.new_full((bags, width), count).scatter_reduce(0, index, place, "amin")
    return torch.cat([rows, rows.new_zeros(1, width)]).gather(0, first)  # an empty bag picks the row of zeros


@_instead_of(torch.cdist, name="cdist")
def _cdist(x1: Tensor, x2: Tensor, p: float = 2.0, compute_mode: str = "use_mm_for_euclid_dist_if_necessary") -> Any:
    """Distances between all rows: torch's backward has no derivative, or one that is nan at distance zero.

    All differences are formed, except where torch itself takes matrix products to save their memory.
    """
    products = {
        "use_mm_for_euclid_dist": True,
        "use_mm_for_euclid_dist_if_necessary": max(x1.shape[-2], x2.shape[-2]) > 25,  # torch's threshold
        "donot_use_mm_for_euclid_dist": False,
    }
    if compute_mode not in products:
        return NotImplemented
    if p != 2 or not products[compute_mode]:
        return _p_norm(x1.unsqueeze(-2) - x2.unsqueeze(-3), p)
    scale = x1.square().sum(-1)[..., :, None] + x2.square().sum(-1)[..., None, :]
    squares = scale - 2 * x1 @ x2.mT
    # Between equal rows rounding leaves 1 to 4 eps (float32, widths 2 to 4096): a root with huge derivatives.
    return _power(torch.where(squares > 8 * torch.finfo(x1.dtype).eps * scale, squares, 0), 0.5)


@_instead_of(_aten.cdist.default, name="cdist")
def _aten_cdist(x1: Tensor, x2: Tensor, p: float = 2.0, compute_mode: int | None = None) -> Tensor:
    modes = {1: "use_mm_for_euclid_dist", 2: "donot_use_mm_for_euclid_dist"}
    return _cdist(x1, x2, p, modes.get(compute_mode or 0, "use_mm_for_euclid_dist_if_necessary"))


@_instead_of(torch.pdist, _aten.pdist.default, name="pdist")
def _pdist(input: Tensor, p: float = 2.0) -> Tensor:
    """Distances between rows i < j: torch's backward has no derivative."""
    first, second = torch.triu_indices(len(input), len(input), offset=1, device=input.device)
    return _p_norm(input[first] - input[second], p)


def _p_norm(x: Tensor, p: float) -> Tensor:
    """p-norm over the last axis, with zero derivatives at x = 0, the subgradient of torch's distances."""
    size = x.abs()
    if p == 0:
        return size.sign().sum(-1)
    if p == torch.inf:
        return size.amax(-1)
    return _power(_power(size, p).sum(-1), 1 / p)


def _power(x: Tensor, exponent: float) -> Tensor:
    """x^exponent for x >= 0, with zero derivatives at x = 0, where torch's can be infinite, then nan."""
    positive = x > 0
    return torch.where(positive, torch.where(positive, x, 1).pow(exponent), 0)
