"""Data that is read many times: what it may be, how it is cut, and that every pass gives the same."""

from __future__ import annotations

import random
from collections import OrderedDict, UserDict, namedtuple
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import curvature as cv
from curvature.objective.batches import Batches, digest, leading, mapped, moved, split

CPU = torch.device("cpu")
Pair = namedtuple("Pair", ["x", "y"])


@dataclass
class Sample:
    x: Tensor
    y: Tensor
    name: str = "sample"


class Encoding(UserDict):
    """A mapping that is no dict, as Hugging Face's BatchEncoding."""


def data(n: int = 10) -> tuple[Tensor, Tensor]:
    return torch.arange(3.0 * n).view(n, 3), torch.arange(n)


def shuffled(**options) -> DataLoader:
    return DataLoader(TensorDataset(*data()), batch_size=4, shuffle=True, **options)


def seen(batches: Batches) -> list[int]:
    return [int(label) for _, y in batches for label in y]


# What data may be


@pytest.mark.parametrize("size, lengths", [(None, [10]), (4, [4, 4, 2]), (5, [5, 5]), (100, [10])])
def test_tensors_are_cut_along_the_first_axis(size, lengths):
    for whole in (data(), dict(zip("xy", data(), strict=True)), data()[0]):
        batches = Batches.of(whole, batch_size=size)
        assert [leading(batch) for batch in batches] == lengths
        assert batches.fixed
    x, y = data()
    parts = list(Batches.of((x, y), batch_size=4))
    assert torch.equal(torch.cat([part[0] for part in parts]), x)
    assert torch.equal(torch.cat([part[1] for part in parts]), y)


def test_what_has_several_lengths_is_one_batch():
    x, _ = data()
    assert len(list(Batches.of((x, torch.zeros(3)), batch_size=4))) == 1
    assert len(list(Batches.of((x, torch.tensor(3)), batch_size=4))) == 1


@pytest.mark.parametrize("size", [0, -3])
def test_batches_have_examples(size):
    with pytest.raises(ValueError, match=f"A batch has at least one example, but got batch_size={size}"):
        Batches.of(data(), batch_size=size)


def test_no_examples_are_no_batches():
    assert list(Batches.of((torch.zeros(0, 3), torch.zeros(0)), batch_size=4)) == []


def test_lists_loaders_and_batches_are_taken_as_they_are():
    x, y = data()
    pairs = [(x[:3], y[:3]), (x[3:], y[3:])]
    assert list(Batches.of(pairs)) == pairs
    batches = Batches.of(pairs)
    assert Batches.of(batches) is batches
    assert seen(Batches.of(DataLoader(TensorDataset(x, y), batch_size=4))) == list(range(10))


@pytest.mark.parametrize("once", [(n for n in [1]), iter([1]), map(abs, [1]), zip([1], [2], strict=True)])
def test_what_can_be_read_only_once_is_refused(once):
    with pytest.raises(cv.BadObjective, match=f"The data \\({type(once).__name__}\\) can be read only once. .*list"):
        Batches.of(once)


@pytest.mark.parametrize("nothing", [3, None, "train.npz", TensorDataset(torch.zeros(3)), nn.Linear(1, 1)])
def test_what_cannot_be_iterated_is_refused(nothing):
    with pytest.raises(cv.BadObjective, match=f"Data of type {type(nothing).__name__} cannot be iterated"):
        Batches.of(nothing)


def test_a_data_set_that_raises_is_said_to():
    class Rows(Dataset):
        def __len__(self):
            return 10

        def __getitem__(self, index):
            if index == 7:
                raise OSError("no such image")
            return index

    with pytest.raises(cv.BadObjective, match="Reading batch 2 of the data failed: OSError: no such image"):
        list(Batches.of(DataLoader(Rows(), batch_size=4)))


# Every pass is the same


def test_a_shuffling_loader_repeats_its_order():
    batches = Batches.of(shuffled())
    order = seen(batches)
    assert order == seen(batches) and sorted(order) == list(range(10)) and order != list(range(10))
    torch.manual_seed(99)
    assert seen(batches) == order
    assert seen(Batches.of(shuffled())) == order
    assert seen(Batches(shuffled(), seed=7)) != order


class Noisy(Dataset):
    """Augments with torch's, Python's and NumPy's global generators."""

    def __len__(self):
        return 6

    def __getitem__(self, index):
        return torch.randn(2) + random.random() + np.random.rand(), index


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_random_augmentation_repeats_its_draws(workers):
    batches = Batches.of(DataLoader(Noisy(), batch_size=2, shuffle=True, num_workers=workers))
    assert batches.digested() == batches.digested()


def test_reading_leaves_the_generators_alone():
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    batches = Batches.of(DataLoader(Noisy(), batch_size=2, shuffle=True))
    list(batches)
    next(iter(batches))
    list(batches.first(3))
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert (np.random.get_state()[1] == states[2]).all()


def test_what_the_reader_draws_does_not_change_the_data():
    batches = Batches.of(DataLoader(Noisy(), batch_size=2))
    quiet = batches.digested()
    loud = []
    for batch in batches:
        torch.randn(3), random.random(), np.random.rand()
        loud.append(digest(batch))
    assert loud == quiet


# The front of the data


@pytest.mark.parametrize("count, lengths", [(1, [1]), (4, [4]), (5, [4, 1]), (10, [4, 4, 2]), (99, [4, 4, 2])])
def test_first_cuts_the_last_batch(count, lengths):
    for source in (Batches.of(data(), batch_size=4), Batches.of(shuffled())):
        first = source.first(count)
        assert [leading(batch) for batch in first] == lengths
        assert seen(first) == seen(source)[:count]
        assert first.digested() == first.digested()


def test_first_of_arrays_dicts_and_scalars():
    x, y = data()
    batch = {"x": x, "n": y.numpy(), "scale": torch.tensor(2.0), "classes": torch.ones(4), "name": "front"}
    (front,) = Batches.of([batch]).first(3)
    assert torch.equal(front["x"], x[:3]) and front["n"].tolist() == [0, 1, 2]
    assert front["scale"] == 2 and front["classes"].shape == (4,) and front["name"] == "front"


# What a batch is


def test_targets_are_the_last_or_have_a_usual_name():
    x, y = data()
    assert split((x, y)) == (x, y)
    assert split([x, x, y]) == ((x, x), y)
    for name in ("labels", "label", "targets", "target", "y"):
        assert split({"x": x, name: y}) == ({"x": x}, y)
    assert split(Encoding(x=x, labels=y)) == ({"x": x}, y)


@pytest.mark.parametrize(
    "batch, words",
    [
        (torch.zeros(3), r"A batch is \(inputs, targets\), but a Tensor came"),
        ((torch.zeros(3),), "but a tuple came"),
        ({"x": 1, "z": 2}, "A dict batch has no targets: its keys are x, z"),
        ("text", "but a str came"),
    ],
)
def test_batches_without_targets(batch, words):
    with pytest.raises(cv.BadObjective, match=words):
        split(batch)


BATCH = {
    "tuple": lambda x, y: (x, y),
    "list": lambda x, y: [x, y],
    "dict": lambda x, y: {"x": x, "y": [y, {"deep": x}]},
    "ordered": lambda x, y: OrderedDict(x=x, y=y),
    "encoding": lambda x, y: Encoding(x=x, y=y),
    "namedtuple": Pair,
    "dataclass": Sample,
}


@pytest.mark.parametrize("kind", BATCH)
def test_mapped_keeps_the_kind(kind):
    batch = BATCH[kind](*data())
    doubled = mapped(lambda leaf: leaf * 2 if isinstance(leaf, Tensor) else leaf, batch)
    assert type(doubled) is type(batch)
    assert digest(mapped(lambda leaf: leaf, batch)) == digest(batch) != digest(doubled)
    assert leading(batch) == 10


@pytest.mark.parametrize("kind", BATCH)
def test_moved_changes_floats_only(kind):
    x, y = data()
    floats: list[torch.dtype] = []
    mapped(
        lambda leaf: floats.append(leaf.dtype) if isinstance(leaf, Tensor) else None,
        moved(BATCH[kind](x, y), CPU, torch.float64),
    )
    assert set(floats) == {torch.float64, torch.int64}


def test_moved_takes_arrays_and_leaves_the_rest():
    batch = (np.ones(2, np.float32), np.ones(2, np.int32), np.ones(2, bool), np.array(["a"]), "text", 3)
    floats, ints, flags, *rest = moved(batch, CPU, torch.float64)
    assert (floats.dtype, ints.dtype, flags.dtype) == (torch.float64, torch.int32, torch.bool)
    assert rest[0] is batch[3] and rest[1:] == ["text", 3]


def test_moved_makes_inference_tensors_fit_for_autograd():
    with torch.inference_mode():
        x = torch.ones(3)
        inside = moved(x, CPU, torch.float32)
    for tensor in (inside, moved(x, CPU, torch.float32), moved(x, CPU, torch.float64)):
        assert not tensor.is_inference()
    assert moved(torch.ones(3).bfloat16(), CPU, torch.float32).dtype == torch.float32


def test_digests_tell_values_dtypes_shapes_and_nesting_apart():
    x = torch.arange(4.0)
    kinds = [
        x,
        x + 1,
        x.double(),
        x.view(2, 2),
        x.bfloat16(),
        [x],
        [x, x],
        {"a": x},
        {"b": x},
        "a",
        1,
        1.0,
        True,
        None,
        b"a",
        x.numpy(),
        x.numpy().astype(np.float64),
        torch.tensor(1.0),
        torch.zeros(0),
    ]
    assert len({digest(kind) for kind in kinds}) == len(kinds)
    assert digest(x.t().clone()) == digest(x)
    assert digest(torch.ones(2, 3).t()) == digest(torch.ones(3, 2))
