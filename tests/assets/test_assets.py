"""The embedded models and data are what `curvature/assets/README.md` says they are."""

from __future__ import annotations

import re
import sys
from importlib.resources import files

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load, load_file
from torch import nn

from curvature.assets import make
from curvature.assets.data import digits, hamlet, hamlet_vocabulary
from curvature.assets.models import CharGPT, char_gpt, digits_cnn, digits_mlp

FOLDER = files("curvature.assets")
BUILDERS = {"digits_mlp": digits_mlp, "digits_cnn": digits_cnn, "hamlet_gpt": lambda: char_gpt(65)}


@pytest.fixture(autouse=True)
def single_precision():
    """The stored weights and data are float32, whatever the rest of the tests prefer."""
    previous = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    yield
    torch.set_default_dtype(previous)


def stored(name: str) -> nn.Module:
    """The model of checkpoint `name`, loaded strictly."""
    model = BUILDERS[name]()
    model.load_state_dict(load(FOLDER.joinpath(f"{name}.safetensors").read_bytes()), strict=True)
    return model


def stated(name: str) -> list[float]:
    """Bytes, parameters, training loss, held-out loss and accuracy in percent, from the README's table."""
    readme = FOLDER.joinpath("README.md").read_text(encoding="utf-8")
    row = next(line for line in readme.splitlines() if line.startswith(f"| `{name}.safetensors`"))
    return [float(figure.replace(",", "")) for figure in re.findall(r"\| ([\d.,]+)", row)]


def examples(name: str, split: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets of the model `name` in `split`."""
    if name == "hamlet_gpt":
        return hamlet(split)
    pixels, labels = digits()
    rows = {"train": slice(1500), "held-out": slice(1500, None)}[split]
    return pixels[rows], labels[rows]


@torch.no_grad()
def figures(name: str, split: str) -> tuple[float, float]:
    """Mean cross-entropy and accuracy in percent of the stored model `name` on `split`."""
    inputs, targets = examples(name, split)
    logits = stored(name)(inputs)
    loss = F.cross_entropy(logits.flatten(0, -2), targets.flatten())
    return loss.item(), 100 * (logits.argmax(-1) == targets).double().mean().item()


def test_digits_are_pixels_in_unit_range_with_labels():
    pixels, labels = digits()
    assert (pixels.shape, pixels.dtype) == ((1797, 64), torch.float32)
    assert (labels.shape, labels.dtype) == ((1797,), torch.int64)
    assert pixels.aminmax() == (0, 1)
    assert labels.unique().tolist() == list(range(10))


def test_digits_equal_those_of_scikit_learn():
    sklearn = pytest.importorskip("sklearn.datasets")
    pixels, labels = digits()
    source = sklearn.load_digits()
    assert (pixels * 16).double().numpy().tolist() == source.data.tolist()
    assert labels.tolist() == source.target.tolist()


@pytest.mark.parametrize(("split", "windows"), [("train", 2446), ("held-out", 271)])
def test_hamlet_targets_are_the_next_characters(split, windows):
    ids, targets = hamlet(split)
    assert ids.shape == targets.shape == (windows, 64)
    assert ids.dtype == targets.dtype == torch.int64
    assert torch.equal(ids.flatten()[1:], targets.flatten()[:-1])


def test_hamlet_ids_spell_the_text():
    text, vocabulary = FOLDER.joinpath("hamlet.txt").read_text(encoding="ascii"), hamlet_vocabulary()
    assert vocabulary == "".join(sorted(set(text)))
    assert len(vocabulary) == 65
    for split, start in (("train", 0), ("held-out", len(text) * 9 // 10)):
        ids = hamlet(split)[0].flatten().tolist()
        assert "".join(vocabulary[id] for id in ids) == text[start : start + len(ids)]


def test_hamlet_rejects_an_unknown_split():
    with pytest.raises(ValueError, match='splits "train" and "held-out", got \'test\''):
        hamlet("test")


@pytest.mark.parametrize("word", ["gutenberg", "etext", "e-text", "ebook", "copyright", "http", "www."])
def test_hamlet_is_the_play_alone(word):
    text = FOLDER.joinpath("hamlet.txt").read_text(encoding="ascii")
    assert text.startswith("HAMLET, PRINCE OF DENMARK\n\nby William Shakespeare\n")
    assert text.endswith("ordnance is shot off.]\n")
    assert word not in text.lower()


@pytest.mark.parametrize("name", BUILDERS)
def test_models_have_the_stated_number_of_parameters(name):
    assert sum(p.numel() for p in BUILDERS[name]().parameters()) == stated(name)[1]


@pytest.mark.parametrize("build", [digits_mlp, digits_cnn])
def test_digits_models_map_flat_pixels_to_ten_logits(build):
    assert build()(digits()[0][:3]).shape == (3, 10)


@pytest.mark.parametrize("length", [1, 10, 64])
def test_char_gpt_gives_logits_for_every_character(length):
    ids = hamlet()[0][:2, :length]
    assert char_gpt(65)(ids).shape == (2, length, 65)


def test_char_gpt_keywords_set_its_size():
    model = CharGPT(7, context=5, width=6, heads=3, layers=1)
    assert model(torch.zeros(2, 5, dtype=torch.int64)).shape == (2, 5, 7)
    assert len(model.blocks) == 1


def test_char_gpt_rejects_more_than_its_context():
    with pytest.raises(ValueError, match="at most 64 characters, got 65"):
        char_gpt(65)(torch.zeros(1, 65, dtype=torch.int64))


def test_char_gpt_is_causal():
    model, ids = stored("hamlet_gpt"), hamlet()[0][:4]
    changed = ids.clone()
    changed[:, 40:] = 0
    torch.testing.assert_close(model(changed)[:, :40], model(ids)[:, :40])
    assert (model(changed)[:, 40:] - model(ids)[:, 40:]).abs().max() > 1


def test_output_head_is_the_token_embedding():
    model = stored("hamlet_gpt")
    seen = []
    model.norm.register_forward_hook(lambda module, arguments, output: seen.append(output))
    logits = model(hamlet()[0][:2])
    torch.testing.assert_close(logits, seen[0] @ model.tokens.weight.T)
    assert [name for name, p in model.named_parameters() if p.shape == (65, 48)] == ["tokens.weight"]


@pytest.mark.parametrize("name", BUILDERS)
def test_stored_weights_are_finite_float32(name):
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in stored(name).parameters())


@pytest.mark.parametrize("name", BUILDERS)
def test_stored_weights_have_the_stated_loss_and_accuracy(name):
    _, _, training_loss, held_out_loss, held_out_accuracy = stated(name)
    loss, accuracy = figures(name, "held-out")
    assert figures(name, "train")[0] == pytest.approx(training_loss, abs=1e-4)
    assert loss == pytest.approx(held_out_loss, abs=1e-4)
    assert accuracy == pytest.approx(held_out_accuracy, abs=0.4)  # one digit of 297 may fall on a tie


def test_files_have_the_stated_sizes_and_fit_in_the_wheel():
    sizes = {file.name: len(file.read_bytes()) for file in FOLDER.iterdir() if file.is_file()}
    assert all(sizes[f"{name}.safetensors"] == stated(name)[0] for name in BUILDERS)
    assert sum(sizes.values()) < 900_000


def test_shifted_digits_keep_the_middle_copy():
    pixels = digits()[0][:5]
    copies = make.shifted(pixels).view(9, 5, 8, 8)
    torch.testing.assert_close(copies[4].flatten(1), pixels)
    torch.testing.assert_close(copies[0][:, 1:, 1:], pixels.view(-1, 8, 8)[:, :-1, :-1])
    assert copies[0][:, 0].count_nonzero() == 0


def test_initial_leaves_the_global_generator_alone():
    state = torch.get_rng_state()
    first, second = (make.initial(digits_mlp, seed=3)[0].weight for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.slow
def test_make_writes_the_same_bytes_twice(tmp_path, monkeypatch, capsys):
    for run in ("first", "second"):
        monkeypatch.setattr(sys, "argv", ["make", "--out", str(tmp_path / run)])
        make.main()
    assert len(capsys.readouterr().out.splitlines()) == 6
    for name in BUILDERS:
        first, second = (tmp_path / run / f"{name}.safetensors" for run in ("first", "second"))
        assert first.read_bytes() == second.read_bytes()
        assert load_file(first).keys() == stored(name).state_dict().keys()
