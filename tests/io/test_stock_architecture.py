"""A stock architecture is its description: what is built from it is the same, and nothing can hide in it."""

from __future__ import annotations

import json
import os
import zipfile

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from curvature.errors import BadFile, TooLarge, UnsafeFile
from curvature.io.architecture import (
    MAX_DEPTH,
    MAX_LAYERS,
    build,
    describe,
    load_stock,
    restore,
    stock_globals,
)
from curvature.io.layers import LAYERS

# An example of every stock layer, most with arguments off their defaults, and the shape of an input; an
# integer stands for indices below it.
EXAMPLES = [
    (nn.Linear(3, 2), (4, 3)),
    (nn.Linear(3, 2, bias=False), (4, 3)),
    (nn.Identity(7, unused=True), (4, 3)),
    (nn.Flatten(0, -2), (2, 3, 4)),
    (nn.Unflatten(1, (2, 3)), (4, 6)),
    (nn.Unflatten(-1, (3, 2)), (4, 6)),
    (nn.Fold((4, 5), kernel_size=(2, 2)), (1, 12, 12)),
    (nn.Unfold(2, dilation=1, padding=1, stride=2), (1, 3, 5, 5)),
    (nn.Embedding(5, 3, padding_idx=1, max_norm=2.0, scale_grad_by_freq=True), 5),
    (nn.EmbeddingBag(5, 3, mode="max", include_last_offset=False), 5),
    (nn.Conv1d(2, 4, 3, padding="same", dilation=2, groups=2), (1, 2, 9)),
    (nn.Conv2d(2, 4, (3, 2), stride=2, padding=(1, 0), bias=False, padding_mode="reflect"), (1, 2, 9, 9)),
    (nn.Conv3d(1, 2, 2), (1, 1, 4, 4, 4)),
    (nn.ConvTranspose1d(2, 4, 3, stride=2, output_padding=1), (1, 2, 5)),
    (nn.ConvTranspose2d(2, 4, 3, dilation=2, groups=2), (1, 2, 5, 5)),
    (nn.ConvTranspose3d(1, 2, 2, bias=False), (1, 1, 3, 3, 3)),
    (nn.BatchNorm1d(3, eps=1e-3, momentum=None), (4, 3)),
    (nn.BatchNorm2d(3, affine=False), (4, 3, 2, 2)),
    (nn.BatchNorm3d(3, track_running_stats=False), (4, 3, 2, 2, 2)),
    (nn.InstanceNorm1d(3, affine=True), (4, 3, 5)),
    (nn.InstanceNorm2d(3, track_running_stats=True), (4, 3, 5, 5)),
    (nn.InstanceNorm3d(3), (4, 3, 2, 2, 2)),
    (nn.LayerNorm([2, 3], eps=1e-3, bias=False), (4, 2, 3)),
    (nn.LayerNorm(3, elementwise_affine=False), (4, 3)),
    (nn.RMSNorm(3), (4, 3)),
    (nn.GroupNorm(2, 4, affine=False), (4, 4, 3)),
    (nn.LocalResponseNorm(2, k=1.5), (4, 4, 3)),
    (nn.ReLU(inplace=True), (4, 3)),
    (nn.ReLU6(), (4, 3)),
    (nn.LeakyReLU(0.2), (4, 3)),
    (nn.PReLU(3, init=0.1), (4, 3)),
    (nn.RReLU(0.1, 0.2), (4, 3)),
    (nn.ELU(0.5), (4, 3)),
    (nn.CELU(0.5), (4, 3)),
    (nn.SELU(), (4, 3)),
    (nn.GELU("tanh"), (4, 3)),
    (nn.GLU(0), (4, 3)),
    (nn.SiLU(), (4, 3)),
    (nn.Mish(), (4, 3)),
    (nn.Softplus(2, 10), (4, 3)),
    (nn.Softshrink(0.1), (4, 3)),
    (nn.Softsign(), (4, 3)),
    (nn.Sigmoid(), (4, 3)),
    (nn.LogSigmoid(), (4, 3)),
    (nn.Hardsigmoid(), (4, 3)),
    (nn.Tanh(), (4, 3)),
    (nn.Tanhshrink(), (4, 3)),
    (nn.Hardtanh(-2, 3), (4, 3)),
    (nn.Hardshrink(0.1), (4, 3)),
    (nn.Hardswish(), (4, 3)),
    (nn.Threshold(0.1, -1), (4, 3)),
    (nn.Softmin(1), (4, 3)),
    (nn.Softmax(-1), (4, 3)),
    (nn.Softmax2d(), (1, 3, 2, 2)),
    (nn.LogSoftmax(1), (4, 3)),
    (nn.Dropout(0.1), (4, 3)),
    (nn.Dropout1d(0.1), (4, 3, 2)),
    (nn.Dropout2d(0.1), (4, 3, 2, 2)),
    (nn.Dropout3d(0.1), (4, 3, 2, 2, 2)),
    (nn.AlphaDropout(0.1), (4, 3)),
    (nn.FeatureAlphaDropout(0.1), (4, 3, 2)),
    (nn.MaxPool1d(2), (1, 2, 6)),
    (nn.MaxPool2d((2, 3), stride=1, padding=(1, 0), dilation=1, ceil_mode=True), (1, 2, 6, 6)),
    (nn.MaxPool3d(2), (1, 2, 4, 4, 4)),
    (nn.AvgPool1d(2, padding=1), (1, 2, 6)),
    (nn.AvgPool2d(2, divisor_override=3), (1, 2, 6, 6)),
    (nn.AvgPool3d(2, count_include_pad=False), (1, 2, 4, 4, 4)),
    (nn.LPPool1d(2, 3), (1, 2, 6)),
    (nn.LPPool2d(2, 3, stride=2), (1, 2, 6, 6)),
    (nn.LPPool3d(2, 2), (1, 2, 4, 4, 4)),
    (nn.AdaptiveMaxPool1d(2), (1, 2, 6)),
    (nn.AdaptiveMaxPool2d((2, None)), (1, 2, 6, 6)),
    (nn.AdaptiveMaxPool3d(2), (1, 2, 4, 4, 4)),
    (nn.AdaptiveAvgPool1d(2), (1, 2, 6)),
    (nn.AdaptiveAvgPool2d((None, 2)), (1, 2, 6, 6)),
    (nn.AdaptiveAvgPool3d(1), (1, 2, 4, 4, 4)),
    (nn.Upsample(scale_factor=(2, 3), mode="bilinear", align_corners=True), (1, 2, 3, 3)),
    (nn.Upsample(size=7), (1, 2, 3)),
    (nn.UpsamplingNearest2d(scale_factor=2), (1, 2, 3, 3)),
    (nn.UpsamplingBilinear2d((5, 6)), (1, 2, 3, 3)),
    (nn.PixelShuffle(2), (1, 4, 3, 3)),
    (nn.PixelUnshuffle(2), (1, 4, 4, 4)),
    (nn.ChannelShuffle(2), (1, 4, 3, 3)),
    (nn.ZeroPad1d(1), (1, 2, 5)),
    (nn.ZeroPad2d((1, 0, 2, 1)), (1, 2, 5, 5)),
    (nn.ZeroPad3d(1), (1, 2, 3, 3, 3)),
    (nn.ConstantPad1d(1, 3.5), (1, 2, 5)),
    (nn.ConstantPad2d(1, -1), (1, 2, 5, 5)),
    (nn.ConstantPad3d(1, 2), (1, 2, 3, 3, 3)),
    (nn.ReflectionPad1d(2), (1, 2, 5)),
    (nn.ReflectionPad2d(2), (1, 2, 5, 5)),
    (nn.ReflectionPad3d(1), (1, 2, 3, 3, 3)),
    (nn.ReplicationPad1d(2), (1, 2, 5)),
    (nn.ReplicationPad2d(2), (1, 2, 5, 5)),
    (nn.ReplicationPad3d(1), (1, 2, 3, 3, 3)),
    (nn.CircularPad1d(2), (1, 2, 5)),
    (nn.CircularPad2d(2), (1, 2, 5, 5)),
    (nn.CircularPad3d(1), (1, 2, 3, 3, 3)),
]


def output(module, shape):
    """What the module makes of a fixed input, dropout drawn from a fixed seed."""
    torch.manual_seed(3)
    x = torch.randint(shape, (2, 3)) if isinstance(shape, int) else torch.randn(shape)
    return module(x)


def assert_same(left, right):
    """Equal in all that can be seen of a module."""
    assert repr(left) == repr(right)
    assert [module.training for module in left.modules()] == [module.training for module in right.modules()]
    assert [p.requires_grad for p in left.parameters()] == [p.requires_grad for p in right.parameters()]
    ours, theirs = left.state_dict(), right.state_dict()
    assert list(ours) == list(theirs)
    for name in ours:
        assert ours[name].dtype == theirs[name].dtype and torch.equal(ours[name], theirs[name])


def small():
    torch.manual_seed(0)
    head = nn.Sequential(nn.Dropout(0.2), nn.Linear(4, 2))
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), head)


def test_every_stock_layer_has_an_example():
    assert {type(layer) for layer, _ in EXAMPLES} == set(LAYERS.values())
    assert stock_globals() == [nn.Sequential, *LAYERS.values()]


@pytest.mark.parametrize("layer, shape", EXAMPLES, ids=lambda value: type(value).__name__)
def test_every_stock_layer_round_trips(tmp_path, layer, shape):
    stack = nn.Sequential(layer)
    description = json.loads(json.dumps(describe(stack), allow_nan=False))
    rebuilt = build(description)
    rebuilt.load_state_dict(stack.state_dict())
    assert_same(rebuilt, stack)
    assert describe(rebuilt) == description
    torch.save(stack, tmp_path / "m.pt")
    loaded = load_stock(tmp_path / "m.pt")
    assert_same(loaded, stack)
    torch.testing.assert_close(output(loaded, shape), output(stack, shape), rtol=0, atol=0)


def test_a_layer_alone_is_an_architecture():
    assert describe(nn.Linear(3, 2)) == {
        "class": "Linear",
        "args": {"in_features": 3, "out_features": 2, "dtype": "float32"},
    }


def test_names_nesting_modes_and_frozen_parameters_are_kept():
    model = nn.Sequential()
    model.add_module("body", small().eval())
    model.add_module("head", nn.Linear(2, 2))
    model.body[1].train()
    model.head.bias.requires_grad_(False)
    description = describe(model)
    rebuilt = build(description)
    rebuilt.load_state_dict(model.state_dict())
    assert_same(rebuilt, model)
    assert_same(restore(description, model.state_dict()), model)


@pytest.mark.filterwarnings("ignore:Complex modules")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.complex64])
def test_dtypes_are_kept(dtype):
    model = nn.Sequential(nn.Linear(3, 2), nn.Conv1d(1, 1, 1)).to(dtype)
    assert {p.dtype for p in build(describe(model)).parameters()} == {dtype}


def test_the_default_dtype_of_the_reader_does_not_matter():
    description = describe(nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)))
    torch.set_default_dtype(torch.float64)
    try:
        rebuilt = build(description)
    finally:
        torch.set_default_dtype(torch.float32)
    assert rebuilt[0].weight.dtype == rebuilt[1].running_mean.dtype == torch.float32


def test_a_layer_without_parameters_may_be_used_twice():
    act = nn.ReLU()
    model = nn.Sequential(nn.Linear(3, 3), act, nn.Linear(3, 3), act)
    assert repr(build(describe(model))) == repr(model)


def test_numbers_of_numpy_are_numbers():
    assert describe(nn.Linear(np.int64(3), np.int64(2)))["args"]["in_features"] == 3
    assert describe(nn.Dropout(np.float32(0.25)))["args"] == {"p": 0.25}


def test_notes_that_no_layer_reads_are_left_out():
    model = small()
    model.name = "mine"
    model[0].history = [1, 2]
    assert describe(model) == describe(small())


def test_describing_and_building_draw_nothing_from_the_global_generator():
    model, state = small(), torch.get_rng_state()
    build(describe(model))
    assert torch.equal(torch.get_rng_state(), state)


# What is not stock


class Subclass(nn.Linear):
    pass


class Linear(nn.Module):
    """Called as a stock layer, but not it."""


def changed(change):
    model = small()
    change(model)
    return model


def double(*shape):
    return nn.Parameter(torch.ones(shape, dtype=torch.float64))


def parametrised(model):
    nn.utils.parametrizations.orthogonal(model[0])


def tied_values(model):
    model[0].weight = model[3][1].weight


NOT_STOCK = {
    "subclass": lambda model: model.append(Subclass(2, 2)),
    "same name": lambda model: model.append(Linear()),
    "other container": lambda model: model.append(nn.ModuleList()),
    "not in the table": lambda model: model.append(nn.LSTM(2, 2)),
    "none": lambda model: model.add_module("none", None),
    "lazy": lambda model: model.append(nn.LazyLinear(2)),
    "forward hook": lambda model: model[0].register_forward_hook(lambda *_: None),
    "forward pre-hook": lambda model: model.register_forward_pre_hook(lambda *_: None),
    "backward hook": lambda model: model[2].register_full_backward_hook(lambda *_: None),
    "state_dict hook": lambda model: model[2]._register_state_dict_hook(lambda *_: None),
    "load hook": lambda model: model[2].register_load_state_dict_post_hook(lambda *_: None),
    "tensor hook": lambda model: model[0].weight.register_hook(lambda grad: 2 * grad),
    "replaced forward": lambda model: setattr(model[2], "forward", torch.sin),
    "replaced method": lambda model: setattr(model[0], "extra_repr", lambda: ""),
    "more parameters": lambda model: model.register_parameter("scale", nn.Parameter(torch.ones(1))),
    "more buffers": lambda model: model[0].register_buffer("mask", torch.ones(1)),
    "more children": lambda model: model[0].add_module("extra", nn.ReLU()),
    "parametrised": parametrised,
    "weight norm": lambda model: nn.utils.parametrizations.weight_norm(model[0]),
    "spectral norm": lambda model: nn.utils.parametrizations.spectral_norm(model[0]),
    "pruned": lambda model: prune.l1_unstructured(model[0], "weight", 0.5),
    "tied": tied_values,
    "layer used twice": lambda model: model.insert(1, model[0]),
    "statistics shared": lambda model: model.append(model[1]),
    "parameter of another shape": lambda model: setattr(model[0], "weight", nn.Parameter(torch.ones(5, 3))),
    "parameter of another kind": lambda model: model[0].register_parameter("weight", double(4, 3)),
    "attribute out of step": lambda model: setattr(model[0], "in_features", 7),
    "hidden option": lambda model: setattr(model[1], "momentum", float("nan")),
    "tensor as an option": lambda model: setattr(model[3][0], "p", torch.tensor(0.2)),
    "buffer that is not saved": lambda model: model[1].register_buffer(
        "running_mean", torch.zeros(4), persistent=False
    ),
    "infinite option": lambda model: model.append(nn.ConstantPad1d(1, float("inf"))),
    "eight-bit floats": lambda model: model[0].to(torch.float8_e4m3fn),
    "list where JSON gives a tuple": lambda model: model.append(nn.MaxPool1d([2])),
    "tensor before a parameter": lambda model: model[0].__dict__.update(weight=torch.ones(4, 3)),
    "module before another": lambda model: model.__dict__.update({"0": nn.Linear(3, 4)}),
    "compiled": lambda model: model[0].compile(backend="eager"),
}


@pytest.mark.parametrize("name", NOT_STOCK)
def test_whatever_could_compute_something_else_is_not_described(name):
    model = small()
    assert describe(model) is not None
    NOT_STOCK[name](model)
    assert describe(model) is None


def test_too_deep_or_too_many_is_not_described():
    model = nn.ReLU()
    for _ in range(MAX_DEPTH + 2):
        model = nn.Sequential(model)
    assert describe(model) is None
    twice = nn.ReLU()
    for _ in range(20):  # a million ReLUs
        twice = nn.Sequential(twice, twice)
    assert describe(twice) is None
    endless = nn.Sequential()
    endless._modules["0"] = endless
    assert describe(endless) is None


# Descriptions that came from somewhere else

LINEAR = {"class": "Linear", "args": {"in_features": 3, "out_features": 2}}


def stack(*children):
    return {"class": "Sequential", "children": [[str(n), child] for n, child in enumerate(children)]}


def nested(depth):
    return LINEAR if depth == 0 else stack(nested(depth - 1))


def doubled(times):
    part = LINEAR
    for _ in range(times):
        part = stack(part, part)
    return part


WRONG = {
    "not a dict": (
        "Linear",
        r"The module of the description is not the description of a module\. Save it again",
    ),
    "no class": ({"args": {}}, r"is not the description of a module"),
    "class of a wrong type": ({"class": ["Linear"], "args": {}}, r"is not the description of a module"),
    "unknown class": (
        {"class": "system", "args": {}},
        r"The module .* cannot be made: 'system' is not a stock layer",
    ),
    "a class of torch.nn": (
        stack({"class": "Module", "args": {}}),
        r"Layer '0' .*'Module' is not a stock layer",
    ),
    "dunder": ({"class": "__class__", "args": {}}, r"'__class__' is not a stock layer"),
    "unknown key": (LINEAR | {"forward": 1}, r"is not the description of a module"),
    "no arguments": ({"class": "Linear"}, r"is not the description of a module"),
    "arguments of a stack": (stack() | {"args": {}}, r"is not the description of a module"),
    "children of a layer": (LINEAR | {"children": []}, r"is not the description of a module"),
    "children without names": (
        {"class": "Sequential", "children": [LINEAR]},
        r"is not the description of a module",
    ),
    "name that is no text": (
        {"class": "Sequential", "children": [[0, LINEAR]]},
        r"is not the description of a module",
    ),
    "name of a method": (
        {"class": "Sequential", "children": [["forward", LINEAR]]},
        r"Layer 'forward' of the description has a name that torch does not allow",
    ),
    "empty name": (
        {"class": "Sequential", "children": [["", LINEAR]]},
        r"has a name that torch does not allow",
    ),
    "training": (LINEAR | {"training": 1}, r"is not the description of a module"),
    "frozen": (LINEAR | {"frozen": "weight"}, r"is not the description of a module"),
    "frozen what is not there": (LINEAR | {"frozen": ["mask"]}, r"has no parameter 'mask' to freeze"),
    "unknown argument": ({"class": "ReLU", "args": {"x": 1}}, r"cannot be made: ReLU takes no x=1\."),
    "private argument": ({"class": "Embedding", "args": {"_weight": 1}}, r"Embedding takes no _weight=1"),
    "device": (
        {"class": "Linear", "args": LINEAR["args"] | {"device": "cuda"}},
        r"Linear takes no device='cuda'",
    ),
    "dtype": (
        {"class": "Linear", "args": LINEAR["args"] | {"dtype": "int8"}},
        r"Linear takes no dtype='int8'",
    ),
    "dtype of a wrong type": (
        {"class": "Linear", "args": LINEAR["args"] | {"dtype": [1]}},
        r"takes no dtype=\[1\]",
    ),
    "argument that is no value": (
        {"class": "Linear", "args": {"in_features": {}}},
        r"Linear takes no in_features=\{\}",
    ),
    "argument not a number": ({"class": "Dropout", "args": {"p": float("nan")}}, r"Dropout takes no p=nan"),
    "long text": ({"class": "GELU", "args": {"approximate": "x" * 99}}, r"GELU takes no approximate='xxx"),
    "missing argument": (
        stack(LINEAR, {"class": "Linear", "args": {}}),
        r"Layer '1' .*Linear\(\) is impossible: .*missing",
    ),
    "impossible": (
        {"class": "Conv2d", "args": {"in_channels": 3, "out_channels": 2, "kernel_size": 1, "groups": 2}},
        r"divisible",
    ),
    "overflow": (
        {"class": "Linear", "args": {"in_features": 2**62, "out_features": 2**62}},
        r"Linear\(.*\) is impossible",
    ),
    "too deep": (nested(MAX_DEPTH + 2), rf"at most {MAX_LAYERS} layers, nested {MAX_DEPTH} deep"),
    "too many": (doubled(20), rf"is one too many: at most {MAX_LAYERS} layers"),
    "escape": ({"class": "\x1b[31m", "args": {}}, r"\\x1b\[31m' is not a stock layer"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_description_is_told_with_its_part(name):
    description, message = WRONG[name]
    with pytest.raises(BadFile, match=message) as caught:
        build(description)
    assert caught.value.fix == "Save it again with this version of curvature."
    assert "\x1b" not in str(caught.value)


def test_more_weights_than_memory_are_told():
    with pytest.raises(TooLarge, match=r"Linear\(in_features=.*\) takes more memory than there is\. Use a"):
        build({"class": "Linear", "args": {"in_features": 2**24, "out_features": 2**24}})


def test_restoring_takes_no_memory_for_what_is_only_claimed():
    with pytest.raises(BadFile, match=r"weight \(file \[1, 1\], model \[16777216, 16777216\]\)"):
        restore(
            {"class": "Linear", "args": {"in_features": 2**24, "out_features": 2**24, "bias": False}},
            {"weight": torch.ones(1, 1)},
        )


def test_restored_tensors_are_those_given():
    state = {name: tensor.double() for name, tensor in nn.Linear(3, 2).state_dict().items()}
    module = restore(LINEAR, state)
    assert module.weight.dtype == torch.float64 and module.weight.data_ptr() == state["weight"].data_ptr()
    assert module.weight.requires_grad


# Pickled stock modules


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_pickled_stock_module_loads_without_trust(tmp_path, wrapped):
    model = small().double()
    model[0].weight.requires_grad_(False)
    model[3].eval()
    torch.save({"epoch": 3, "model": model} if wrapped else model, tmp_path / "m.pt")
    assert_same(load_stock(tmp_path / "m.pt"), model)


def test_layers_that_the_program_allows_stay_allowed(tmp_path):
    torch.save(small(), tmp_path / "m.pt")
    with torch.serialization.safe_globals([nn.Linear]):
        load_stock(tmp_path / "m.pt")
        assert nn.Linear in torch.serialization.get_safe_globals()
    assert nn.Linear not in torch.serialization.get_safe_globals()


def test_a_module_in_the_old_format_needs_trust(tmp_path):
    torch.save(small(), tmp_path / "m.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(UnsafeFile, match=r"is a pickled nn\.Module in the format before 1\.6, .* --trust"):
        load_stock(tmp_path / "m.pt")


@pytest.mark.parametrize(
    "plant",
    [
        lambda model: model[2].__dict__.update(forward=nn.Linear(1, 1)),
        lambda model: model.__dict__.update(__call__="x", forward="x"),
        lambda model: model[0].__dict__.update(_forward_hooks={0: torch.nn.Tanh()}),
        lambda model: model[0].__dict__.update(in_features=[[1]]),
        lambda model: model[0].__dict__.update(_modules=3),
        lambda model: model[0].__dict__.update(_parameters={"weight": 1, "bias": None}),
        lambda model: model[0].__dict__.update(weight=torch.ones(4, 3)),
        lambda model: model.__dict__.update(state_dict="x"),
        lambda model: model._modules.update(loop=model),
        lambda model: model[0].__dict__.update(in_features=torch.ones(2)),
    ],
)
def test_a_planted_attribute_that_matters_is_refused(tmp_path, plant):
    model = small()
    plant(model)
    torch.save(model, tmp_path / "m.pt")
    with pytest.raises(UnsafeFile, match=r"m\.pt holds a module with altered, shared or added parts\. Pass"):
        load_stock(tmp_path / "m.pt")


def test_a_planted_attribute_that_nothing_reads_does_not_survive(tmp_path):
    model = small()
    model.note = {"anything": nn.Tanh()}
    torch.save(model, tmp_path / "m.pt")
    loaded = load_stock(tmp_path / "m.pt")
    assert_same(loaded, model)
    for part, fresh in zip(loaded.modules(), small().modules(), strict=True):
        assert vars(part).keys() == vars(fresh).keys()


class Payload:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def test_a_payload_in_a_stock_module_never_runs(tmp_path):
    model = small()
    model.__dict__["note"] = Payload(tmp_path / "ran")
    torch.save(model, tmp_path / "m.pt")
    with pytest.raises(UnsafeFile, match=rf"run code: {os.system.__module__}\.system\. No model needs that"):
        load_stock(tmp_path / "m.pt")
    assert not (tmp_path / "ran").exists()


def test_another_class_is_refused_by_name(tmp_path):
    torch.save(nn.Sequential(nn.Linear(3, 2), Subclass(2, 2)), tmp_path / "m.pt")
    with pytest.raises(UnsafeFile, match=rf"run code: {__name__}\.Subclass\."):
        load_stock(tmp_path / "m.pt")


def test_a_constructor_is_not_called_for_the_file(tmp_path):
    fields = b"(X\x0b\x00\x00\x00_parametersX\x08\x00\x00\x00_buffersX\x08\x00\x00\x00_modules10"
    call = b"ctorch.nn.modules.linear\nLinear\nJ\xff\xff\xff\x00J\xff\xff\xff\x00\x86R."
    with zipfile.ZipFile(tmp_path / "m.pt", "w") as records:
        records.writestr("x/data.pkl", b"\x80\x02" + fields + call)
        records.writestr("x/version", b"3")
    with pytest.raises(
        UnsafeFile, match=r"m\.pt calls constructors of layers, as torch\.save never does\. Pass --trust"
    ):
        load_stock(tmp_path / "m.pt")


def test_a_weight_that_is_only_claimed_is_refused(tmp_path):
    model = nn.Sequential(nn.Linear(3, 2, bias=False))
    model[0].weight = nn.Parameter(torch.ones(1).expand(2, 3))
    torch.save(model, tmp_path / "m.pt")
    with pytest.raises(BadFile, match=r"In .*m\.pt, 0\.weight has shape \[2, 3\] but 4 bytes are stored"):
        load_stock(tmp_path / "m.pt")


def test_a_file_without_a_module_is_told(tmp_path):
    torch.save(small().state_dict(), tmp_path / "w.pt")
    with pytest.raises(BadFile, match=r"is a torch\.save file of tensors, not a pickled nn\.Module\. Name"):
        load_stock(tmp_path / "w.pt")
    torch.save(small().state_dict(), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(BadFile, match=r"old\.pt holds a OrderedDict without a module\. Name the class"):
        load_stock(tmp_path / "old.pt")
