"""An objective as one file: what comes back is what went in, bit for bit, and nothing in it is run unasked."""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
import sys
from collections import namedtuple
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from objectives import zoo
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from untouched import untouched

import curvature as cv
from curvature.objective import storage

STOCK = [case for case in zoo() if type(case.module) is nn.Sequential]


class Net(nn.Module):
    """A class of one's own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.sin(self.first(x)))


class Wide(Net):
    """One that cannot be made without arguments."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width


def mean_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


class Losses:
    """Where losses are, that no path leads to."""

    def bound(self, model, batch):
        return mean_loss(model, batch)

    @staticmethod
    def static(model, batch):
        return mean_loss(model, batch)


def data(n: int = 10) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(n, 3, generator=generator), torch.arange(n) % 2


def stock() -> nn.Sequential:
    torch.manual_seed(4)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.2), nn.Tanh(), nn.Linear(4, 2))


def same(a: cv.Objective, b: cv.Objective) -> None:
    """The same function to the last bit, and the same in all that is said of it."""
    assert a.space == b.space
    assert (a.mode, a.seed, a.l2, a.function.name) == (b.mode, b.seed, b.l2, b.function.name)
    for kind in ("params", "frozen", "buffers"):
        one, other = getattr(a, kind), getattr(b, kind)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) and one[name].dtype == other[name].dtype for name in one)
    assert a.batches.digests == b.batches.digests
    assert a.fingerprint == b.fingerprint
    assert a.value() == b.value()
    assert torch.equal(a.gradient(), b.gradient())
    v = a.space.draw(1, seed=0)[0]
    assert torch.equal(cv.hessian(a) @ v, cv.hessian(b) @ v)


def there_and_back(objective: cv.Objective, folder: Path, **options) -> cv.Objective:
    return cv.Objective.load(objective.save(folder / "objective.pt"), **options)


# There and back


@pytest.mark.parametrize("case", STOCK, ids=str)
def test_stock_models_come_back(case, tmp_path):
    objective = case.objective((3, len(case.inputs) - 3))
    same(there_and_back(objective, tmp_path), objective)


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("select", [None, "4.*", ["0.bias", "1.*"]])
def test_options_come_back(select, mode, dtype, tmp_path):
    objective = cv.Objective.of(
        stock(), "cross-entropy", data(), select=select, mode=mode, dtype=dtype, seed=11, l2=0.1
    )
    same(there_and_back(objective, tmp_path), objective)


def test_whatever_state_it_is_in_comes_back(tmp_path):
    module = stock()
    module[0].weight.requires_grad_(False)
    module(data()[0])  # moves the running statistics
    objective = cv.Objective.of(module, cv.CrossEntropy(class_weights=(1.0, 3.0), label_smoothing=0.1), data())
    elsewhere = objective.at(torch.randn(objective.space.size)).narrowed("4.*").in_mode("train").first(7)
    back = there_and_back(elsewhere, tmp_path)
    same(back, elsewhere)
    assert back.frozen.keys() == elsewhere.frozen.keys()
    assert not dict(back.function.module.named_parameters())["0.weight"].requires_grad


def test_loaded_saves_again(tmp_path):
    objective = cv.Objective.of(stock(), "cross-entropy", data())
    once = there_and_back(objective, tmp_path)
    same(there_and_back(once, tmp_path), objective)


def test_the_file_is_data_alone(tmp_path):
    path = cv.Objective.of(stock(), "cross-entropy", data()).save(tmp_path / "objective.pt")
    torch.load(path, weights_only=True)
    assert torch.serialization.get_unsafe_globals_in_checkpoint(path) == []


def test_saving_and_loading_touch_nothing(tmp_path):
    module = stock()
    objective = cv.Objective.of(module, "cross-entropy", data())
    with untouched(module):
        there_and_back(objective, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["objective.pt"]


def test_half_precision_weights_come_back_as_they_were_computed_with(tmp_path):
    objective = cv.Objective.of(stock().bfloat16(), "cross-entropy", data())
    same(there_and_back(objective, tmp_path), objective)


# Models and losses of one's own


def test_an_own_class_needs_trust_or_an_architecture(tmp_path):
    torch.manual_seed(5)
    objective = cv.Objective.of(Net(), "cross-entropy", data())
    path = objective.save(tmp_path / "objective.pt")
    with pytest.raises(cv.UnsafeFile, match=rf"objective.pt needs the code at {__name__}:Net\..*--arch"):
        cv.Objective.load(path)
    same(cv.Objective.load(path, trust=True), objective)
    same(cv.Objective.load(path, arch=Net), objective)


def test_nothing_is_imported_without_trust(tmp_path, monkeypatch):
    (tmp_path / "evil.py").write_text("import pathlib\npathlib.Path('PWNED').touch()\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    cv.Objective.of(Net(), "cross-entropy", data()).save("objective.pt")
    held = torch.load("objective.pt", weights_only=True)
    for key in ("architecture", "loss"):
        torch.save({**held, key: {"path": "evil:thing"}}, "objective.pt")
        with pytest.raises(cv.UnsafeFile, match="needs the code at"):
            cv.Objective.load("objective.pt")
        with pytest.raises(cv.UnsafeFile, match="needs the code at"):
            cv.Objective.load("objective.pt", arch=Net) if key == "loss" else cv.Objective.load("objective.pt")
    assert not Path("PWNED").exists() and "evil" not in sys.modules


def test_classes_that_take_arguments_need_an_architecture(tmp_path):
    objective = cv.Objective.of(Wide(3), "cross-entropy", data())
    path = objective.save(tmp_path / "objective.pt")
    with pytest.raises(cv.BadFile, match=r"Wide, which cannot be made without arguments: TypeError.*--arch"):
        cv.Objective.load(path, trust=True)
    same(cv.Objective.load(path, arch=lambda: Wide(3)), objective)


def test_classes_that_no_path_leads_to_need_an_architecture(tmp_path):
    class Local(Net):
        pass

    objective = cv.Objective.of(Local(), "cross-entropy", data())
    path = objective.save(tmp_path / "objective.pt")
    with pytest.raises(cv.BadFile, match=r"<locals>.Local, which cannot be imported.*--arch"):
        cv.Objective.load(path, trust=True)
    same(cv.Objective.load(path, arch=Local), objective)


def test_tied_and_mixed_stacks_need_an_architecture(tmp_path):
    def tied() -> nn.Module:
        layers = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3))
        layers[2].weight = layers[0].weight
        return layers

    for make in (tied, lambda: nn.Sequential(nn.Linear(3, 3), Net())):
        objective = cv.Objective.of(make(), "cross-entropy", (data()[0], data()[1]))
        path = objective.save(tmp_path / "objective.pt")
        with pytest.raises(cv.UnsafeFile):
            cv.Objective.load(path)
        same(cv.Objective.load(path, arch=make), objective)


@pytest.mark.parametrize("arch", [lambda: nn.Linear(3, 2), lambda: nn.Sequential(stock(), nn.Linear(2, 2)), lambda: 3])
def test_another_architecture_is_refused(arch, tmp_path):
    path = cv.Objective.of(stock(), "cross-entropy", data()).save(tmp_path / "objective.pt")
    with pytest.raises(cv.BadFile):
        cv.Objective.load(path, arch=arch)


def test_a_scalar_loss_is_stored_by_its_path(tmp_path):
    for loss in (mean_loss, Losses.static):
        objective = cv.Objective.from_loss(stock(), loss, data())
        path = objective.save(tmp_path / "objective.pt")
        with pytest.raises(cv.UnsafeFile, match=f"needs the code at {__name__}:{loss.__qualname__}.*--objective"):
            cv.Objective.load(path)
        same(cv.Objective.load(path, trust=True), objective)


@pytest.mark.parametrize(
    "loss",
    [lambda model, batch: mean_loss(model, batch), functools.partial(mean_loss), Losses().bound],
    ids=["lambda", "partial", "bound"],
)
def test_losses_that_no_path_leads_to_are_not_written(loss, tmp_path):
    objective = cv.Objective.from_loss(stock(), loss, data())
    with pytest.raises(cv.BadObjective, match="is no function of a module, cannot be written"):
        objective.save(tmp_path / "objective.pt")
    counted = cv.Objective.from_loss(stock(), mean_loss, data(), terms=lambda batch: len(batch[1]))
    with pytest.raises(cv.BadObjective, match="A loss with `terms`"):
        counted.save(tmp_path / "objective.pt")
    assert list(tmp_path.iterdir()) == []


def test_a_loss_of_ones_own_is_not_written(tmp_path):
    class Own(cv.SquaredError):
        pass

    objective = cv.Objective.of(nn.Linear(3, 2), Own(), (data()[0], torch.zeros(10, 2)))
    with pytest.raises(cv.BadObjective, match="The loss Own is your own"):
        objective.save(tmp_path / "objective.pt")


# Data


def test_loaders_are_stored_as_their_batches(tmp_path):
    loader = DataLoader(TensorDataset(*data()), batch_size=4, shuffle=True)
    objective = cv.Objective.of(stock(), "cross-entropy", loader, seed=2)
    back = there_and_back(objective, tmp_path)
    assert back.batches.fixed
    same(back, objective)


def test_dicts_and_arrays_come_back(tmp_path):
    class Keywords(Net):
        def forward(self, x, scale=1.0):
            return super().forward(x) * scale

    x, y = data()
    for batches in (
        [{"x": x[:4], "labels": y[:4], "scale": 2.0}, {"x": x[4:], "labels": y[4:], "scale": 1.0}],
        [(x.numpy(), y.numpy())],
    ):
        objective = cv.Objective.of(Keywords(), "cross-entropy", batches)
        back = there_and_back(objective, tmp_path, arch=Keywords)
        assert back.value() == objective.value()
        assert torch.equal(back.gradient(), objective.gradient())


Pair = namedtuple("Pair", ["x", "y"])


@dataclass
class Sample:
    x: Tensor
    y: Tensor


@pytest.mark.parametrize("kind", [Pair, Sample])
def test_batches_of_ones_own_class_are_not_written(kind, tmp_path):
    objective = cv.Objective.of(stock(), "cross-entropy", [kind(*data())])
    with pytest.raises(cv.BadObjective, match=rf"hold objects of {__name__}.{kind.__name__}, which is code"):
        objective.save(tmp_path / "objective.pt")
    assert list(tmp_path.iterdir()) == []


def test_slices_are_stored_without_the_rest(tmp_path):
    x, y = data(100_000)
    path = cv.Objective.of(stock(), "cross-entropy", (x, y)).first(5).save(tmp_path / "objective.pt")
    assert path.stat().st_size < 50_000


def test_too_much_data_asks_for_a_file(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "STORED", 100)
    objective = cv.Objective.of(stock(), "cross-entropy", data())
    with pytest.raises(cv.TooLarge, match=r"The data take 0 MiB.*data=FILE"):
        objective.save(tmp_path / "objective.pt")


def data_file(folder: Path, kind: str) -> Path:
    x, y = data()
    path = folder / f"train.{kind}"
    if kind == "npz":
        np.savez(path, x=x.numpy(), y=y.numpy())
    elif kind == "safetensors":
        save_file({"inputs": x, "targets": y}, path)
    else:
        torch.save([(x[:4], y[:4]), (x[4:8], y[4:8]), (x[8:], y[8:])], path)
    return path


@pytest.mark.parametrize("kind", ["npz", "safetensors", "pt"])
@pytest.mark.parametrize("batch_size", [4, 256])
def test_data_stays_in_its_file(kind, batch_size, tmp_path):
    if (kind, batch_size) == ("pt", 256):
        pytest.skip("a list of batches is cut already")
    file = data_file(tmp_path, kind)
    objective = cv.Objective.of(stock(), "cross-entropy", data(), batch_size=batch_size, mode="train")
    path = objective.save(tmp_path / "objective.pt", data=file)
    assert "batches" not in torch.load(path, weights_only=True)["data"]
    same(cv.Objective.load(path), objective)  # cut as it was: in train mode the batches matter


def test_a_scalar_loss_gets_its_data_uncut(tmp_path):
    x, y = data(600)
    np.savez(tmp_path / "train.npz", x=x.numpy(), y=y.numpy())
    objective = cv.Objective.from_loss(stock(), mean_loss, (x, y), mode="train")
    same(
        cv.Objective.load(objective.save(tmp_path / "objective.pt", data=tmp_path / "train.npz"), trust=True), objective
    )
    stored = cv.Objective.load(objective.save(tmp_path / "objective.pt"), trust=True, data=(x, y))
    assert len(list(stored.batches)) == 1


def test_the_path_is_relative_to_the_file(tmp_path, monkeypatch):
    (tmp_path / "here" / "data").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    file = data_file(Path("here/data"), "npz")
    objective = cv.Objective.of(stock(), "cross-entropy", data())
    objective.save("here/objective.pt", data=file)
    shutil.move("here", "there")
    same(cv.Objective.load("there/objective.pt"), objective)


def test_another_file_is_not_taken_for_the_data(tmp_path):
    x, y = data()
    np.savez(tmp_path / "other.npz", x=x.numpy() + 1, y=y.numpy())
    file = data_file(tmp_path, "npz")
    objective = cv.Objective.of(stock(), "cross-entropy", (x, y))
    for wrong, of in ((tmp_path / "other.npz", objective), (file, objective.first(5))):
        with pytest.raises(cv.BadObjective, match="does not hold the data of this objective, batch for batch"):
            of.save(tmp_path / "objective.pt", data=wrong)
    with pytest.raises(cv.BadFile, match="There is no file"):
        objective.save(tmp_path / "objective.pt", data=tmp_path / "none.npz")
    assert not (tmp_path / "objective.pt").exists()


def test_changed_and_missing_data_are_refused(tmp_path):
    file = data_file(tmp_path, "npz")
    objective = cv.Objective.of(stock(), "cross-entropy", data())
    path = objective.save(tmp_path / "objective.pt", data=file)
    x, y = data()
    np.savez(file, x=x.numpy(), y=1 - y.numpy())
    with pytest.raises(cv.BadFile, match=r"The data of .*objective.pt have changed since: .*train.npz\. Restore"):
        cv.Objective.load(path)
    file.unlink()
    with pytest.raises(cv.BadFile, match=r"The data of .*objective.pt are missing: .*train.npz\. Put the file back"):
        cv.Objective.load(path)
    same(cv.Objective.load(path, data=(x, y)), objective)


def test_other_data_on_loading(tmp_path):
    objective = cv.Objective.of(stock(), "cross-entropy", data())
    path = objective.save(tmp_path / "objective.pt")
    other = data(7)
    same(cv.Objective.load(path, data=other), objective.on(other))
    assert len(list(cv.Objective.load(path, data=other, batch_size=3).batches)) == 3


# Files


def test_saving_replaces_whole_files_only(tmp_path, monkeypatch):
    objective = cv.Objective.of(stock(), "cross-entropy", data())
    path = objective.save(tmp_path / "objective.pt")
    before = hashlib.sha256(path.read_bytes()).hexdigest()

    def fails(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(cv.TooLarge):
        objective.first(3).save(path)
    assert hashlib.sha256(path.read_bytes()).hexdigest() == before
    assert [file.name for file in tmp_path.iterdir()] == ["objective.pt"]


def test_one_damaged_byte_is_seen(tmp_path):
    path = cv.Objective.of(stock(), "cross-entropy", data()).save(tmp_path / "objective.pt")
    content = bytearray(path.read_bytes())
    place = content.index(np.float32(data()[0][0, 0]).tobytes())
    content[place] ^= 1
    path.write_bytes(content)
    with pytest.raises(cv.BadFile, match="does not match its checksum"):
        cv.Objective.load(path)


@pytest.mark.parametrize("nothing", ["missing.pt", ".", "tensors.pt"])
def test_what_is_no_objective(nothing, tmp_path):
    torch.save(stock().state_dict(), tmp_path / "tensors.pt")
    with pytest.raises(cv.BadFile):
        cv.Objective.load(tmp_path / nothing)
