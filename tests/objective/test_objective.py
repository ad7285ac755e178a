"""The objective: what it computes, how it is varied, and that a model never notices having been analysed."""

from __future__ import annotations

import contextlib
import copy
import gc
from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from objectives import Case, zoo
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from untouched import untouched

import curvature as cv

ZOO = pytest.mark.parametrize("case", zoo(), ids=str)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.last = nn.LSTM(2, 3, batch_first=True), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.lstm(x.view(len(x), 2, 2))[0][:, -1])


class Attentive(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(2, 2, batch_first=True)
        self.norm, self.last = nn.LayerNorm(2, eps=0.1), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.view(len(x), 2, 2)
        mixed, _ = self.attention(tokens, tokens, tokens, need_weights=False)
        return self.last(self.norm(tokens + mixed).flatten(1))


class Tied(nn.Module):
    """One matrix in two places, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.second.weight = self.first.weight
        self.register_buffer("shift", torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.second(torch.tanh(self.first(x) + self.shift))))


def perceptron(*between: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 5), *between, nn.Tanh(), nn.Linear(5, 3))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "batch-norm": lambda: perceptron(nn.BatchNorm1d(5)),
    "batch-norm-without-running": lambda: perceptron(nn.BatchNorm1d(5, track_running_stats=False)),
    "dropout": lambda: perceptron(nn.Dropout(0.4)),
    "lstm": Recurrent,
    "weight-norm": lambda: perceptron(nn.utils.parametrizations.weight_norm(nn.Linear(5, 5))),
    "attention": Attentive,
    "transformer": lambda: nn.Sequential(
        nn.Unflatten(1, (2, 2)),
        nn.TransformerEncoderLayer(2, 1, 4, batch_first=True, dropout=0.3, activation="gelu", layer_norm_eps=0.1),
        nn.Flatten(),
        nn.Linear(4, 3),
    ),
    "tied": Tied,
}
MODEL = pytest.mark.parametrize("name", MODELS)


def made(name: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(5)
    return MODELS[name]().to(dtype)


def batches(dtype: torch.dtype = torch.float64) -> list[tuple[Tensor, Tensor]]:
    """Three uneven batches of one classification task."""
    generator = torch.Generator().manual_seed(6)
    x, y = torch.randn(12, 4, generator=generator, dtype=dtype), torch.arange(12) % 3
    return list(zip(x.split([5, 3, 4]), y.split([5, 3, 4]), strict=True))


def classifier(**options) -> cv.Objective:
    return cv.Objective.of(made("tied"), "cross-entropy", batches(), **options)


def by_differences(objective: cv.Objective, rows: Tensor, step: float = 1e-3) -> Tensor:
    """The Hessian times each row from first derivatives alone: central differences of sixth order."""
    center = objective.position
    products = []
    for row in rows * step:
        near, far, farther = (
            objective.at(center + k * row).gradient() - objective.at(center - k * row).gradient() for k in (1, 2, 3)
        )
        products.append((45 * near - 9 * far + farther) / (60 * step))
    return torch.stack(products)


def assert_hessian_equals_differences(objective: cv.Objective) -> None:
    rows = objective.space.draw(6, seed=4)
    products = cv.hessian(objective).apply(rows)
    torch.testing.assert_close(products, by_differences(objective, rows), rtol=1e-6, atol=1e-7)


# What it computes


@MODEL
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_value_and_gradient_are_those_of_the_model_itself(name, mode):
    module = made(name)
    objective = cv.Objective.of(module, "cross-entropy", batches(), mode=mode, seed=3)
    twin = copy.deepcopy(module).train(mode == "train")
    fresh = {name: buffer.clone() for name, buffer in twin.named_buffers()}
    total = 0.0
    for index, (x, y) in enumerate(batches()):
        for buffer_name, buffer in twin.named_buffers():  # every batch meets the same running statistics
            buffer.copy_(fresh[buffer_name])
        torch.manual_seed(3 + index)
        part = F.cross_entropy(twin(x), y, reduction="sum") / 12
        part.backward()
        total += part.item()
    expected = torch.cat([p.grad.reshape(-1) for p in twin.parameters()])
    torch.testing.assert_close(objective.value(), total, rtol=1e-12, atol=0)
    torch.testing.assert_close(objective.gradient(), expected, rtol=1e-9, atol=1e-13)


@MODEL
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_hessian_equals_differences_of_gradients(name, mode):
    objective = cv.Objective.of(made(name), "cross-entropy", batches(), mode=mode)
    assert_hessian_equals_differences(objective)


@MODEL
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_products_repeat_bit_for_bit(name, mode):
    objective = cv.Objective.of(made(name), "cross-entropy", batches(), mode=mode)
    for matrix in (cv.hessian, cv.ggn):
        v = objective.space.draw(1, seed=1)[0]
        product = matrix(objective) @ v
        torch.rand(5), np.random.rand(5)
        assert torch.equal(matrix(objective) @ v, product)


def test_train_mode_depends_on_the_mask_and_on_the_batches():
    dropout = [cv.Objective.of(made("dropout"), "cross-entropy", batches(), mode="train", seed=s) for s in (0, 1)]
    assert dropout[0].value() != dropout[1].value()
    whole = tuple(torch.cat(part) for part in zip(*batches(), strict=True))
    values = [cv.Objective.of(made("batch-norm"), "cross-entropy", d, mode="train").value() for d in (whole, batches())]
    assert abs(values[0] - values[1]) > 1e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_half_precision_is_computed_in_single(dtype):
    module = made("tied", dtype)
    objective = cv.Objective.of(module, "cross-entropy", batches(dtype))
    assert objective.space.dtype == torch.float32
    single = cv.Objective.of(copy.deepcopy(module).float(), "cross-entropy", batches(dtype))
    assert torch.equal(cv.hessian(objective).dense(), cv.hessian(single).dense())
    assert next(module.parameters()).dtype == dtype


def test_dtype_is_that_of_the_computation():
    exact, coarse = classifier(), classifier(dtype=torch.float32)
    assert (exact.space.dtype, coarse.space.dtype) == (torch.float64, torch.float32)
    torch.testing.assert_close(coarse.value(), exact.value(), rtol=1e-6, atol=0)
    for dtype in (torch.float16, torch.bfloat16, torch.int64):
        with pytest.raises(ValueError, match=f"take torch.float32 or torch.float64, but got {dtype}"):
            classifier(dtype=dtype)
        with pytest.raises(ValueError, match="but got"):
            exact.to(dtype=dtype)


def test_mixed_dtypes_meet_in_the_finer():
    module = perceptron()
    module[2].double()
    assert cv.Objective.of(module, "cross-entropy", batches()).space.dtype == torch.float64


# Parameters


def test_tied_parameters_count_once():
    objective = classifier()
    assert objective.space.names == ("first.weight", "first.bias", "second.bias", "last.weight", "last.bias")
    assert objective.space.size == 39


def test_frozen_parameters_are_held_fixed():
    module = made("tied")
    whole = cv.hessian(cv.Objective.of(module, "cross-entropy", batches())).dense()
    module.first.bias.requires_grad_(False)
    objective = cv.Objective.of(module, "cross-entropy", batches())
    assert "first.bias" in objective.frozen and "first.bias" not in objective.params
    kept = torch.tensor([i for i in range(39) if not 16 <= i < 20])
    torch.testing.assert_close(cv.hessian(objective).dense(), whole[kept][:, kept], rtol=1e-12, atol=1e-14)
    assert not module.first.bias.requires_grad


@pytest.mark.parametrize(
    "select",
    ["last.*", ["last.weight", "*.bias"], lambda name, p: name.startswith("last") and p.ndim == 2],
    ids=["glob", "globs", "predicate"],
)
def test_selections(select):
    objective = classifier(select=select)
    narrowed = classifier().narrowed(select)
    assert objective.space.names == narrowed.space.names
    assert "last.weight" in objective.space.names and "first.weight" not in objective.space.names
    assert torch.equal(cv.hessian(objective).dense(), cv.hessian(narrowed).dense())


def test_selections_of_nothing():
    with pytest.raises(cv.BadObjective, match=r"No trainable parameter matches 'nope'. The names are first.weight,"):
        classifier(select="nope")
    with pytest.raises(cv.BadObjective, match="No trainable parameter matches the selection"):
        classifier().narrowed(lambda name, p: False)
    with pytest.raises(cv.BadObjective, match="The model has no trainable parameters"):
        cv.Objective.of(perceptron().requires_grad_(False), "cross-entropy", batches())


def test_parameters_that_hold_no_real_numbers():
    with pytest.raises(cv.BadObjective, match=r"0.weight has no values yet.*lazy"):
        cv.Objective.of(nn.Sequential(nn.LazyLinear(3)), "cross-entropy", batches())
    with pytest.raises(cv.BadObjective, match="weight has no values yet"):
        cv.Objective.of(nn.Linear(4, 3, device="meta"), "cross-entropy", batches())
    with pytest.raises(cv.BadObjective, match="The parameter weight is complex"):
        cv.Objective.of(nn.Linear(4, 3, dtype=torch.complex64), "cross-entropy", batches())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what the compiler imports
def test_wrappers_are_looked_through():
    module = made("tied")
    wrapped = torch.compile(module)
    assert cv.Objective.of(wrapped, "cross-entropy", batches()).function.module is module
    assert cv.Objective.of(nn.DataParallel(module), "cross-entropy", batches()).function.module is module


def test_an_objective_is_a_copy_of_the_weights():
    module = made("batch-norm")
    objective = cv.Objective.of(module, "cross-entropy", batches())
    before = objective.value()
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            tensor.mul_(2)
    assert objective.value() == before


# Variations


def test_at_is_the_function_elsewhere():
    objective = classifier()
    point = torch.randn(objective.space.size).double()
    moved = objective.at(point)
    assert moved.at(objective.params).value() == objective.value() != moved.value()
    assert torch.equal(moved.space.flatten(moved.params.values()), point)
    named = moved.space.named(point)
    assert objective.at(dict(reversed(named.items()))).value() == moved.value()  # by name, not by order
    assert objective.at({name: t.float() for name, t in named.items()}).space.dtype == torch.float64
    point.zero_()
    assert moved.value() != objective.at(point).value()


@pytest.mark.parametrize("flat", [torch.zeros(3), torch.zeros(39, 1), torch.tensor(0.0)])
def test_at_refuses_vectors_of_another_size(flat):
    with pytest.raises(ValueError, match="Expected a flat vector of 39 numbers, but got"):
        classifier().at(flat)


def test_at_refuses_tensors_of_other_names_or_shapes():
    params = dict(classifier().params)
    for wrong in ({}, {**params, "more": torch.zeros(1)}, {**params, "last.bias": torch.zeros(1)}):
        with pytest.raises(ValueError, match=r"Expected a tensor for each of first\.weight"):
            classifier().at(wrong)


def test_on_first_and_max():
    objective = classifier()
    (x, y), *_ = batches()
    part = objective.on((x, y))
    torch.testing.assert_close(part.value(), objective.first(5).value(), rtol=1e-14, atol=0)
    torch.testing.assert_close(objective.on(batches()).value(), objective.value(), rtol=0, atol=0)
    assert objective.first(None) is objective
    cut = objective.on(tuple(torch.cat(p) for p in zip(*batches(), strict=True)), batch_size=2)
    torch.testing.assert_close(cut.gradient(), objective.gradient(), rtol=1e-12, atol=1e-15)
    assert len(list(cut.batches)) == 6


def test_on_cuts_for_losses_that_may_couple_examples_only_when_told_so():
    x, y = (torch.cat(2 * [part]) for part in batches()[0])
    objective = cv.Objective.from_loss(made("tied"), lambda model, batch: model(batch[0]).square().mean(), (x, y))
    assert len(list(objective.on((x, y)).batches)) == 1
    assert len(list(objective.on((x, y), batch_size=5).batches)) == 2


def test_parameters_that_are_not_finite_are_refused():
    objective = classifier()
    vector = torch.zeros(objective.space.size).double()
    vector[3] = torch.nan
    with pytest.raises(cv.NonFinite, match="The given parameters are not all finite"):
        objective.at(vector)


def test_to_changes_the_dtype_only():
    objective = classifier()
    assert objective.to() is objective and objective.to(dtype=torch.float64) is objective
    single = objective.to(dtype=torch.float32)
    assert {t.dtype for t in (*single.params.values(), *single.buffers.values())} == {torch.float32}
    torch.testing.assert_close(single.value(), objective.value(), rtol=1e-6, atol=0)


def test_in_mode():
    objective = cv.Objective.of(made("dropout"), "cross-entropy", batches())
    train = objective.in_mode("train")
    assert train.value() != objective.value() == train.in_mode("eval").value()
    for make in (lambda: objective.in_mode("test"), lambda: classifier(mode="test")):
        with pytest.raises(ValueError, match="mode is 'eval' or 'train', but got 'test'"):
            make()


def test_with_state_is_the_function_of_other_weights():
    for name in MODELS:
        module = made(name)
        torch.manual_seed(9)
        other = MODELS[name]().double()
        with torch.no_grad():
            for buffer in other.buffers():
                if buffer.is_floating_point():
                    buffer.add_(torch.rand_like(buffer))
        objective = cv.Objective.of(module, "cross-entropy", batches(), select="*bias*")
        expected = cv.Objective.of(other, "cross-entropy", batches(), select="*bias*")
        assert objective.with_state(other.state_dict()).value() == expected.value() != objective.value()
        single = {key: t.float() if t.is_floating_point() else t for key, t in other.state_dict().items()}
        assert objective.with_state(single).space.dtype == torch.float64


def test_with_state_is_strict_but_for_tied_names():
    objective, state = classifier(), made("tied").state_dict()
    assert objective.with_state({k: t for k, t in state.items() if k != "second.weight"}).value() == objective.value()
    for wrong, words in [
        (
            {k: t for k, t in state.items() if k != "shift"},
            "1 missing, 0 unexpected, 0 of another shape, such as shift",
        ),
        ({**state, "more": torch.zeros(1)}, "0 missing, 1 unexpected, 0 of another shape, such as more"),
        ({**state, "last.bias": torch.zeros(7)}, "0 missing, 0 unexpected, 1 of another shape, such as last.bias"),
    ]:
        with pytest.raises(cv.BadObjective, match=words):
            objective.with_state(wrong)


def test_fingerprints_tell_model_and_data_apart():
    objective = classifier()
    assert objective.fingerprint == classifier().fingerprint
    assert objective.at(objective.params).fingerprint == objective.fingerprint
    elsewhere = objective.at(torch.zeros(39)).fingerprint
    assert elsewhere["model"] != objective.fingerprint["model"]
    assert elsewhere["data"] == objective.fingerprint["data"] != objective.first(3).fingerprint["data"]


def test_objectives_are_compared_by_identity():
    objective = classifier()
    assert objective == objective != classifier()
    assert len({objective, objective, classifier()}) == 2


# Batches of all kinds


Pair = namedtuple("Pair", ["x", "y"])


@dataclass
class Sample:
    x: Tensor
    y: Tensor


class Keywords(nn.Module):
    """Takes its inputs by name, and returns what Hugging Face's models do."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = made("tied")

    def forward(self, features: Tensor, scale: Tensor | None = None):
        logits = self.inner(features if scale is None else features * scale[:, None])
        return namedtuple("Output", ["loss", "logits"])(None, logits)


def test_dict_batches_are_keywords_of_the_model():
    plain = classifier()
    dicts = [{"features": x, "labels": y} for x, y in batches()]
    torch.testing.assert_close(
        cv.Objective.of(Keywords(), "cross-entropy", dicts).gradient(), plain.gradient(), rtol=1e-12, atol=1e-15
    )
    scaled = [{"features": x, "scale": torch.ones(len(x)), "targets": y} for x, y in batches()]
    assert cv.Objective.of(Keywords(), "cross-entropy", scaled).value() == pytest.approx(plain.value(), rel=1e-12)
    x, y = (torch.cat(part) for part in zip(*batches(), strict=True))
    whole = cv.Objective.of(Keywords(), "cross-entropy", {"features": x, "labels": y}, batch_size=5)
    assert whole.value() == pytest.approx(plain.value(), rel=1e-12)


def test_several_positional_inputs():
    triples = [(x, torch.ones(len(x)), y) for x, y in batches()]
    assert cv.Objective.of(Keywords(), "cross-entropy", triples).value() == pytest.approx(
        classifier().value(), rel=1e-12
    )


@pytest.mark.parametrize("kind", [Pair, Sample])
def test_batches_of_ones_own_class(kind):
    data = [kind(x.float(), y) for x, y in batches()]

    def loss(model: nn.Module, batch) -> Tensor:
        assert type(batch) is kind
        return F.cross_entropy(model(batch.x), batch.y)

    objective = cv.Objective.from_loss(made("tied"), loss, data)
    plain = cv.Objective.of(made("tied"), "cross-entropy", [(b.x, b.y) for b in data])
    torch.testing.assert_close(objective.gradient(), plain.gradient(), rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(cv.hessian(objective).dense(), cv.hessian(plain).dense(), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("output", [dict, tuple, list])
def test_outputs_in_containers(output):
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = made("tied")

        def forward(self, x):
            logits = self.inner(x)
            return {"logits": logits, "hidden": x} if output is dict else output((logits, x))

    objective = cv.Objective.of(Wrapped(), "cross-entropy", batches())
    torch.testing.assert_close(objective.gradient(), classifier().gradient(), rtol=0, atol=0)


def test_outputs_that_are_none():
    class Nothing(nn.Linear):
        def forward(self, x):
            return {"hidden": super().forward(x)}

    objective = cv.Objective.of(Nothing(4, 3).double(), "cross-entropy", batches())
    with pytest.raises(cv.BadObjective, match="returned a dict, in which no output tensor is recognised"):
        objective.check()


def test_a_shuffling_loader_is_the_whole_data_every_time():
    x, y = (torch.cat(part) for part in zip(*batches(), strict=True))
    loader = DataLoader(TensorDataset(x, y), batch_size=5, shuffle=True)
    objective = cv.Objective.of(made("tied"), "cross-entropy", loader)
    v = objective.space.draw(1, seed=2)[0]
    H = cv.hessian(objective)
    product = H @ v
    assert torch.equal(H @ v, product)
    torch.testing.assert_close(product, cv.hessian(classifier()) @ v, rtol=1e-11, atol=1e-14)


def test_a_loader_with_its_own_generator_is_refused():
    x, y = batches()[0]
    loader = DataLoader(TensorDataset(x, y), batch_size=2, shuffle=True, generator=torch.Generator())
    objective = cv.Objective.of(made("tied"), "cross-entropy", loader)
    with pytest.raises(cv.BadObjective, match=r"second pass over the data gave other batches.*shuffle=False"):
        cv.hessian(objective) @ torch.zeros(39).double()


def test_what_shares_one_iterator_between_passes_is_refused():
    class Shared:
        def __init__(self) -> None:
            self.pairs = iter(batches())

        def __iter__(self):
            return self.pairs

    objective = cv.Objective.of(made("tied"), "cross-entropy", Shared())
    with pytest.raises(cv.BadObjective, match="other batches than the first"):
        objective.check()


# Scalar losses


def mean_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def test_a_mean_loss_counts_by_the_first_axis():
    bare = cv.Objective.from_loss(made("tied"), mean_loss, batches())
    torch.testing.assert_close(bare.value(), classifier().value(), rtol=1e-13, atol=0)
    torch.testing.assert_close(bare.gradient(), classifier().gradient(), rtol=1e-11, atol=1e-14)


def test_terms_say_what_a_mean_is_over():
    data = [(x, y.masked_fill(y == 2, -100)) for x, y in batches()]
    plain = cv.Objective.of(made("tied"), "cross-entropy", data)
    counted = cv.Objective.from_loss(made("tied"), mean_loss, data, terms=lambda batch: (batch[1] != -100).sum())
    torch.testing.assert_close(counted.gradient(), plain.gradient(), rtol=1e-11, atol=1e-14)
    bare = cv.Objective.from_loss(made("tied"), mean_loss, data)  # targets of -100 are what is not counted
    torch.testing.assert_close(bare.gradient(), plain.gradient(), rtol=1e-11, atol=1e-14)
    twice = cv.Objective.from_loss(made("tied"), mean_loss, data, terms=lambda batch: 1)
    assert abs(twice.value() - plain.value()) > 1e-6


def graphs() -> list[dict[str, Tensor]]:
    """Two graphs of different sizes, whose first tensors, the edges, have two rows each."""
    return [
        {"edges": torch.randint(0, nodes, (2, 3 * nodes)), "features": torch.randn(nodes, 4).double()}
        for nodes in (5, 25)
    ]


def graph_loss(model: nn.Module, graph: dict[str, Tensor]) -> Tensor:
    features = graph["features"]
    gathered = torch.zeros_like(features).index_add(0, graph["edges"][1], features[graph["edges"][0]])
    return model(gathered).square().mean()


def test_a_number_of_terms_that_would_be_a_guess_is_asked_for():
    with pytest.raises(cv.BadObjective, match=r"whose tensors have 2, 5 entries .*Pass terms="):
        cv.Objective.from_loss(made("tied"), graph_loss, graphs()).check()
    counted = cv.Objective.from_loss(made("tied"), graph_loss, graphs(), terms=lambda graph: len(graph["features"]))
    counted.check()
    cv.Objective.from_loss(made("tied"), graph_loss, graphs()[:1]).check()  # of one batch any number will do


class TinyLM(nn.Module):
    """Next-token loss as Hugging Face's: the labels are shifted inside, -100 is ignored."""

    def __init__(self, shift: bool) -> None:
        super().__init__()
        self.shift, self.embed, self.head = shift, nn.Embedding(7, 4), nn.Linear(4, 7)

    def logits(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.embed(ids)).cumsum(1))

    def forward(self, input_ids: Tensor, labels: Tensor):
        logits = self.logits(input_ids)
        if self.shift:
            logits, labels = logits[:, :-1], labels[:, 1:]
        return namedtuple("Output", ["loss"])(F.cross_entropy(logits.flatten(0, 1), labels.flatten()))


TinyForCausalLM = type("TinyForCausalLM", (TinyLM,), {})
TinyForMaskedLM = type("TinyForMaskedLM", (TinyLM,), {})


@pytest.mark.parametrize("kind", [TinyForCausalLM, TinyForMaskedLM])
def test_hugging_face_labels_count_by_what_is_not_ignored(kind):
    shift = kind is TinyForCausalLM
    module = kind(shift).double()
    ids, labels = torch.randint(0, 7, (5, 6)), torch.randint(0, 7, (5, 6))
    labels[0, 2:], labels[3], labels[1, 0] = -100, -100, -100
    data = [{"input_ids": ids[i], "labels": labels[i]} for i in (slice(0, 2), slice(2, 3), slice(3, 5))]
    objective = cv.Objective.from_loss(module, lambda model, batch: model(**batch).loss, data)
    logits = module.logits(ids)
    logits, targets = (logits[:, :-1], labels[:, 1:]) if shift else (logits, labels)
    whole = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    torch.testing.assert_close(objective.value(), whole.item(), rtol=1e-13, atol=0)


def test_a_batch_without_terms_adds_nothing():
    """A mean over none of its labels is not a number, and must not poison the rest."""
    module = TinyForMaskedLM(False).double()
    ids, labels = torch.randint(0, 7, (5, 6)), torch.randint(0, 7, (5, 6))
    labels[2] = -100
    data = [{"input_ids": ids[i : i + 1], "labels": labels[i : i + 1]} for i in range(5)]
    objective = cv.Objective.from_loss(module, lambda model, batch: model(**batch).loss, data)
    rest = objective.on([batch for i, batch in enumerate(data) if i != 2])
    assert objective.value() == rest.value()
    assert torch.equal(cv.hessian(objective).dense(), cv.hessian(rest).dense())


def test_data_without_terms_is_refused():
    ignored = [(x, torch.full_like(y, -100)) for x, y in batches()]
    with pytest.raises(cv.BadObjective, match=r"The data has no terms.*every target is ignored"):
        cv.Objective.of(made("tied"), "cross-entropy", ignored).value()
    with pytest.raises(cv.BadObjective, match="The data has no terms"):
        cv.Objective.of(made("tied"), "cross-entropy", []).gradient()


def test_terms_that_cannot_be_read_are_asked_for():
    objective = cv.Objective.from_loss(made("tied"), lambda model, batch: model(torch.ones(1, 4).double()).sum(), ["a"])
    with pytest.raises(cv.BadObjective, match=r"batch of type str averages over cannot be read.*terms=lambda"):
        objective.value()


def test_a_batch_that_does_not_touch_the_parameters_adds_nothing_to_the_gradient():
    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        return model(batch).square().mean() if len(batch) == 5 else batch.mean()

    data = [x for x, _ in batches()]
    objective = cv.Objective.from_loss(made("tied"), loss, data)
    alone = cv.Objective.from_loss(made("tied"), loss, data[:1])
    torch.testing.assert_close(objective.gradient() * 12, alone.gradient() * 5, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(cv.hessian(objective).dense() * 12, cv.hessian(alone).dense() * 5)


def test_a_loss_with_a_hidden_module_of_its_own():
    """The model again, held by the loss: both are called with the given parameters."""

    class WithPenalty(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
            return mean_loss(model, batch) + 0.1 * self.model.last.weight.square().sum()

    module = made("tied")
    assert_hessian_equals_differences(cv.Objective.from_loss(module, WithPenalty(module), batches()))


# Whatever mode torch is in


@pytest.mark.parametrize(
    "around",
    [
        torch.no_grad,
        torch.inference_mode,
        lambda: torch.autocast("cpu", torch.bfloat16),
        lambda: torch.autograd.set_detect_anomaly(True),
        lambda: torch.set_grad_enabled(False),
    ],
    ids=["no_grad", "inference_mode", "autocast", "anomaly", "grad-disabled"],
)
@pytest.mark.filterwarnings("ignore:Anomaly Detection")
def test_the_mode_torch_is_in_changes_nothing(around):
    def measured() -> list[Tensor]:
        module = made("batch-norm", torch.float32)
        objective = cv.Objective.of(module, "cross-entropy", batches(torch.float32), mode="train")
        assert objective.check().difference < 1e-4
        v = objective.space.draw(1, seed=1)[0]
        return [
            torch.tensor(objective.value()),
            objective.gradient(),
            cv.hessian(objective) @ v,
            cv.ggn(objective) @ v,
        ]

    expected = measured()
    with around():
        actual = measured()
    for a, e in zip(actual, expected, strict=True):
        assert torch.equal(a, e)


@pytest.mark.parametrize(
    "around",
    [
        torch.no_grad,
        torch.inference_mode,
        pytest.param(
            lambda: torch.autocast("cpu", torch.bfloat16),
            marks=pytest.mark.xfail(strict=True, reason="linalg multiplies its basis in bfloat16 under autocast"),
        ),
    ],
    ids=["no_grad", "inference_mode", "autocast"],
)
def test_the_mode_torch_is_in_changes_no_answer(around):
    H = cv.hessian(cv.Objective.of(made("lstm", torch.float32), "cross-entropy", batches(torch.float32)))

    def answers() -> list[Tensor]:
        return [
            cv.trace(H, products=8).value,
            cv.eigsh(H, 1).values,
            cv.spectral_density(H, probes=2, steps=8).nodes,
        ]

    expected = answers()
    with around():
        for actual, answer in zip(answers(), expected, strict=True):
            assert torch.equal(actual, answer)


def test_tensors_of_inference_mode():
    with torch.inference_mode():
        module, data = made("lstm"), batches()
    objective = cv.Objective.of(module, "cross-entropy", data)
    expected = cv.Objective.of(made("lstm"), "cross-entropy", batches())
    assert torch.equal(cv.hessian(objective).dense(), cv.hessian(expected).dense())


# The model never notices


def worn(module: nn.Module) -> nn.Module:
    """The module as training leaves it: mixed modes, gradients here and there, hooks and marks of others."""
    for i, part in enumerate(module.modules()):
        part.training = i % 2 == 0
    for i, p in enumerate(module.parameters()):
        if i % 2:
            p.grad = torch.randn_like(p)
        if i % 3 == 2:
            p.requires_grad_(False)
    return module


def state_of_randomness() -> None:
    """The generators, somewhere in the middle of their streams."""
    torch.manual_seed(123)
    torch.rand(3), np.random.rand(3)


class Fuse(nn.Module):
    """A model that raises `error` in call number `calls` from now; never, while that is None."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.calls, self.error = inner, None, RuntimeError("burnt")

    def forward(self, *args, **kwargs):
        if self.calls is not None:
            self.calls -= 1
            if self.calls == 0:
                torch.rand(1), np.random.rand(1)
                raise self.error
        return self.inner(*args, **kwargs)


QUESTIONS: dict[str, Callable[[cv.Objective], object]] = {
    "value": lambda objective: objective.value(),
    "gradient": lambda objective: objective.gradient(),
    "hessian": lambda objective: cv.hessian(objective) @ objective.space.draw(1, seed=0)[0],
    "ggn": lambda objective: cv.ggn(objective) @ objective.space.draw(1, seed=0)[0],
    "trace": lambda objective: cv.trace(cv.hessian(objective), products=5),
    "eigsh": lambda objective: cv.eigsh(cv.hessian(objective), 1, max_steps=8),
    "spectrum": lambda objective: cv.spectral_density(cv.hessian(objective), probes=2, steps=3),
    "check": lambda objective: objective.in_mode(objective.mode).check(),
    "fingerprint": lambda objective: objective.at(objective.params).fingerprint,
}


def subjects() -> list:
    """(name, module, objective maker), over the zoo and the models above in both modes."""
    found = []
    for case in zoo():
        third = len(case.inputs) // 3
        sizes = (third, third, len(case.inputs) - 2 * third)
        pairs = list(zip(case.inputs.split(sizes), case.targets.split(sizes), strict=True))
        found.append(pytest.param(case.module, case.loss, pairs, "train", id=case.name))
    for name in MODELS:
        for mode in ("eval", "train"):
            found.append(pytest.param(made(name), "cross-entropy", batches(), mode, id=f"{name}-{mode}"))
    return found


SUBJECT = pytest.mark.parametrize("module, loss, data, mode", subjects())


@SUBJECT
def test_a_model_never_notices(module, loss, data, mode, tmp_path):
    module = worn(module)
    state_of_randomness()
    with untouched(module):
        objective = cv.Objective.of(module, loss, data, mode=mode)
        for ask in QUESTIONS.values():
            ask(objective)
        objective.save(tmp_path / "objective.pt")
        cv.hessian(objective).dense()
    with untouched(module):
        loader = DataLoader([(x[0], y[0]) for x, y in data], batch_size=2, shuffle=True)
        shuffled = cv.Objective.of(module, loss, loader, mode="eval")
        with contextlib.suppress(cv.BadObjective):  # some losses need more than one example
            shuffled.gradient()
        shuffled.fingerprint  # noqa: B018


@SUBJECT
@pytest.mark.parametrize("error", [ValueError("burnt"), KeyboardInterrupt()], ids=["error", "interrupt"])
def test_a_model_never_notices_what_it_raises(module, loss, data, mode, error):
    fuse = worn(Fuse(module))
    objective = cv.Objective.of(fuse, loss, data, mode=mode)
    objective.check()
    fuse.error = error
    state_of_randomness()
    with untouched(fuse):
        for name, ask in QUESTIONS.items():
            if name == "fingerprint":
                continue
            fuse.calls = 3  # in the third batch
            with pytest.raises((cv.BadObjective, KeyboardInterrupt)) as caught:
                ask(objective)
            assert fuse.calls <= 0
            assert isinstance(caught.value, KeyboardInterrupt) == isinstance(error, KeyboardInterrupt)
            fuse.calls = None
    gc.collect()


@pytest.mark.parametrize("name", ["batch-norm", "lstm"])
def test_a_model_never_notices_an_interrupted_display(name):
    module = worn(made(name))
    objective = cv.Objective.of(module, "cross-entropy", batches(), mode="train")

    def stop(progress: cv.Progress) -> None:
        if progress.done >= 2:
            raise KeyboardInterrupt

    run = cv.Run(progress=stop)
    H = cv.hessian(objective)
    with untouched(module):
        for ask in (
            lambda: cv.spectral_density(H, probes=2, steps=6, run=run),
            lambda: cv.eigsh(H, 1, rtol=1e-14, run=run),
            lambda: cv.trace(H, products=18, method="hutchinson", run=run),
        ):
            with pytest.raises(cv.Interrupted) as caught:
                ask()
            assert not caught.value.result.complete


def test_errors_of_a_batch_say_which():
    fuse = Fuse(made("tied"))
    objective = cv.Objective.of(fuse, "cross-entropy", batches())
    for calls in (1, 2, 3):
        fuse.calls = calls
        with pytest.raises(cv.BadObjective, match=f"failed on batch {calls}: RuntimeError: burnt") as caught:
            objective.value()
        assert caught.value.__cause__ is fuse.error


def test_parameters_of_odd_shapes():
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.empty, self.shift = nn.Parameter(torch.zeros(0, 3)), nn.Parameter(torch.randn(3))
            self.inner = nn.Conv2d(4, 3, 1).to(memory_format=torch.channels_last)
            self.temperature = nn.Parameter(torch.tensor(0.7))
            self.turned = nn.Parameter(torch.randn(3, 3).t())

        def logits(self, x: Tensor) -> Tensor:
            return (self.inner(x[:, :, None, None]).flatten(1) @ self.turned) / self.temperature

        def forward(self, x: Tensor) -> Tensor:
            return self.logits(x) + x[:, :0] @ self.empty + self.shift

    module = Odd().double()
    objective = cv.Objective.of(module, "cross-entropy", batches())
    assert objective.space.size == 3 + 15 + 1 + 9
    assert_hessian_equals_differences(objective)
    assert objective.fingerprint == cv.Objective.of(module, "cross-entropy", batches()).fingerprint
    method = cv.Objective.from_loss(module, lambda m, batch: F.cross_entropy(m.logits(batch[0]), batch[1]), batches())
    assert_hessian_equals_differences(method)  # also what is called by another name than forward


def test_passes_are_counted():
    objective = classifier()
    cv.hessian(objective).apply(objective.space.draw(3, seed=0))
    objective.value()
    objective.gradient()
    assert objective.meter.passes == 3


@ZOO
def test_the_average_is_over_terms_not_batches(case: Case):
    whole = case.objective()
    for sizes in ((1, len(case.inputs) - 1), (2, 1, len(case.inputs) - 3)):
        torch.testing.assert_close(case.objective(sizes).value(), whole.value(), rtol=1e-12, atol=0)


def test_it_says_what_it_is_in_a_line():
    objective = cv.Objective.of(nn.Linear(3, 2), nn.CrossEntropyLoss(), (torch.ones(4, 3), torch.tensor([0, 1, 0, 1])))
    shown = "<Objective: CrossEntropy() of Linear, 8 parameters, torch.float32, cpu, eval mode>"
    assert repr(objective) == shown
