"""One stock torch.nn layer as data: its class by name and the arguments of its constructor.

The arguments are read from the constructor's signature and the attributes of the same names: one rule for all
layers, not a function for each. It holds because torch.nn keeps every argument as an attribute; exceptions
are `bias` (a parameter or None) and `dtype` (of the tensors).
"""

from __future__ import annotations

import inspect
import math
import numbers
import warnings
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from curvature.errors import BadFile, TooLarge, printable

_NAMES = """
    Linear Identity Flatten Unflatten Fold Unfold Embedding EmbeddingBag
    Conv1d Conv2d Conv3d ConvTranspose1d ConvTranspose2d ConvTranspose3d
    BatchNorm1d BatchNorm2d BatchNorm3d InstanceNorm1d InstanceNorm2d InstanceNorm3d
    LayerNorm RMSNorm GroupNorm LocalResponseNorm
    ReLU ReLU6 LeakyReLU PReLU RReLU ELU CELU SELU GELU GLU SiLU Mish Softplus Softshrink Softsign
    Sigmoid LogSigmoid Hardsigmoid Tanh Tanhshrink Hardtanh Hardshrink Hardswish Threshold
    Softmin Softmax Softmax2d LogSoftmax
    Dropout Dropout1d Dropout2d Dropout3d AlphaDropout FeatureAlphaDropout
    MaxPool1d MaxPool2d MaxPool3d AvgPool1d AvgPool2d AvgPool3d LPPool1d LPPool2d LPPool3d
    AdaptiveMaxPool1d AdaptiveMaxPool2d AdaptiveMaxPool3d
    AdaptiveAvgPool1d AdaptiveAvgPool2d AdaptiveAvgPool3d
    Upsample UpsamplingNearest2d UpsamplingBilinear2d PixelShuffle PixelUnshuffle ChannelShuffle
    ZeroPad1d ZeroPad2d ZeroPad3d ConstantPad1d ConstantPad2d ConstantPad3d
    ReflectionPad1d ReflectionPad2d ReflectionPad3d ReplicationPad1d ReplicationPad2d ReplicationPad3d
    CircularPad1d CircularPad2d CircularPad3d
"""
LAYERS: dict[str, type[nn.Module]] = {name: getattr(nn, name) for name in _NAMES.split()}

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128)
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in _FLOATS}
_LONGEST = 64  # characters of a string, or entries of a tuple, among arguments
_TENSORS = {"_parameters", "_buffers", "_modules", "training"}  # attributes that are compared in other ways


def tensors_of(layer: nn.Module) -> list[Tensor]:
    """The layer's own parameters and buffers."""
    tensors = (*layer._parameters.values(), *layer._buffers.values())
    return [tensor for tensor in tensors if tensor is not None]


def arguments_of(layer: nn.Module) -> dict[str, Any] | None:
    """The arguments that a stock layer's constructor was given, less those at their default, as in JSON.

    The dtype is always there, since its default is a global setting. None when one is not a plain value.
    """
    attributes = vars(layer)
    arguments = {}
    for name, default in _signature(type(layer)).items():
        if name == "bias":
            value: Any = layer._parameters.get("bias") is not None
        elif name == "dtype":
            dtypes = [t.dtype for t in tensors_of(layer) if t.is_floating_point() or t.is_complex()]
            value = str(dtypes[0]).removeprefix("torch.") if dtypes else None
        elif name in attributes:
            value = _listed(attributes[name])
        else:  # an old spelling of another argument
            continue
        if not _is_plain(value):
            return None
        if value != default:
            arguments[name] = value
    return arguments


def make_layer(name: str, arguments: Mapping[str, Any], *, device: str) -> nn.Module:
    """The layer of that name and arguments, its tensors on `device` and drawn from the global generator.

    BadFile when the name or an argument is unknown or impossible, TooLarge when memory does not suffice.
    """
    if name not in LAYERS:
        raise BadFile(f"{printable(name)!r} is not a stock layer.")
    known = _signature(LAYERS[name])
    for key, value in arguments.items():
        if key not in known or not _is_plain(value) or (key == "dtype" and str(value) not in _DTYPES):
            raise BadFile(f"{name} takes no {printable(key)}={printable(repr(value))}.")
    values: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in arguments.items()}
    if "dtype" in known:
        values |= {"dtype": _DTYPES[values.get("dtype", "float32")], "device": device}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about layers without elements, which are allowed
            return LAYERS[name](**values)
    except Exception as error:  # constructors refuse arguments in many ways
        made = f"{name}({printable(', '.join(f'{key}={value!r}' for key, value in arguments.items()))})"
        if "can't allocate memory" in str(error):
            raise TooLarge(f"{made} takes more memory than there is.", "Use a larger machine.") from error
        raise BadFile(f"{made} is impossible: {printable(error)}.") from error


def same_layer(layer: nn.Module, fresh: nn.Module) -> bool:
    """Whether `layer`, given equal tensors, computes what the freshly made `fresh` does.

    An attribute that a fresh layer does not have at all is the user's note: torch never reads it.
    """
    return (
        type(layer) is type(fresh)
        and list(layer._modules) == list(fresh._modules)
        and _facts(layer._parameters) == _facts(fresh._parameters)
        and _facts(layer._buffers) == _facts(fresh._buffers)
        and all(_is_as_in(fresh, name, value) for name, value in vars(layer).items() if name not in _TENSORS)
        and layer.extra_repr() == fresh.extra_repr()
    )


def _is_as_in(fresh: nn.Module, name: str, value: Any) -> bool:
    """Whether the attribute is equal in the fresh layer, or hides nothing there (a parameter, a method)."""
    if name not in vars(fresh):
        return not hasattr(fresh, name)
    return not isinstance(value, Tensor) and bool(value == vars(fresh)[name])


def _facts(tensors: Mapping[str, Tensor | None]) -> dict[str, Any]:
    """What a freshly made layer must reproduce of its tensors."""
    facts = {}
    for name, tensor in tensors.items():
        hooked = tensor is not None and bool(tensor._backward_hooks)
        facts[name] = None if tensor is None else (type(tensor), tensor.shape, tensor.dtype, hooked)
    return facts


@cache
def _signature(layer: type[nn.Module]) -> dict[str, Any]:
    """Names and defaults of the constructor's arguments that describe a layer."""
    return {
        name: parameter.default
        for name, parameter in inspect.signature(layer).parameters.items()
        if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        and name != "device"
        and not name.startswith("_")
    }


def _listed(value: Any) -> Any:
    """The value as JSON has it: tuples as lists, numpy's numbers as Python's."""
    if isinstance(value, tuple | list):
        return [_listed(item) for item in value]
    if isinstance(value, bool):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    return float(value) if isinstance(value, numbers.Real) else value


def _is_plain(value: Any) -> bool:
    """Whether it can be an argument: None, a flag, a finite number, a short string, or a list of these."""
    if isinstance(value, list):
        nested = any(isinstance(item, list) for item in value)
        return len(value) <= _LONGEST and not nested and all(map(_is_plain, value))
    if isinstance(value, str):
        return len(value) <= _LONGEST
    if isinstance(value, float):
        return math.isfinite(value)
    return value is None or (isinstance(value, int) and abs(value) < 2**63)
