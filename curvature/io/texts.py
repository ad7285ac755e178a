"""What Hugging Face models are trained for, and texts as the batches of tokens that they are trained on.

The task of a model is told by its class. Labels are those that a loss compares with the logits at the same place: for
causal models they are shifted here, as the models shift them inside when they compute their loss themselves.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from curvature.errors import BadFile, listing, printable
from curvature.io.tables import read_table, split_table

BLOCK = 128  # tokens at a time, where the model can take as many
MASKED, KEPT, DRAWN = 0.15, 0.1, 0.1  # share of tokens to predict, and of these those kept and drawn (BERT's)
IGNORED = -100


class Task(NamedTuple):
    """What a model predicts, and the loss that it was trained with, by name."""

    predicts: str
    loss: str

    @property
    def causal(self) -> bool:
        """Whether the labels come one place before the tokens that they are."""
        return self.predicts == _NEXT


_NEXT, _MASKED, _CLASS, _NUMBER = "the next token", "masked tokens", "the class", "a number"
_SUFFIXES = {
    "ForCausalLM": Task(_NEXT, "cross-entropy"),
    "LMHeadModel": Task(_NEXT, "cross-entropy"),
    "ForMaskedLM": Task(_MASKED, "cross-entropy"),
    "ForSequenceClassification": Task(_CLASS, "cross-entropy"),
    "ForTokenClassification": Task("the class of every token", "cross-entropy"),
    "ForImageClassification": Task("the class of the image", "cross-entropy"),
}
_PROBLEMS = {"regression": Task(_NUMBER, "mse"), "multi_label_classification": Task("several labels", "bce")}


def task_of(module: nn.Module) -> Task | None:
    """The task of a Hugging Face model, also below a PEFT adapter; None when its class does not tell."""
    name = type(_inner(module)).__name__
    task = next((task for suffix, task in _SUFFIXES.items() if name.endswith(suffix)), None)
    config = getattr(module, "config", None)
    if task is None or task.predicts != _CLASS:
        return task
    problem = getattr(config, "problem_type", None) or ("regression" if getattr(config, "num_labels", 2) == 1 else "")
    return _PROBLEMS.get(problem, task)


def shifted(data: Any) -> Any:
    """A dict of tensors with input_ids, its labels (by default the tokens themselves) put where they are predicted.

    As in Hugging Face's causal models the label of a position is the token after it; the last position has none.
    """
    if not isinstance(data, Mapping) or not isinstance(ids := data.get("input_ids"), Tensor) or ids.ndim != 2:
        return data
    mask = data.get("attention_mask")
    own = ids if mask is None else ids.masked_fill(mask == 0, IGNORED)
    labels = data.get("labels", own)
    inputs = {key: value[:, :-1] if value.shape[:2] == ids.shape else value for key, value in data.items()}
    return {**inputs, "labels": labels[:, 1:]}


def read_text(
    path: Path, module: nn.Module, tokenizer: Any, *, block: int | None = None, target: str | None = None
) -> dict[str, Tensor]:
    """The text at `path` as the model takes it, cut into blocks of so many tokens, with labels for its task.

    For a classifier it is a table of one or two columns of text and one of labels. Which tokens are masked is the same
    every time. BadFile when the text or the tokenizer does not suffice.
    """
    task = task_of(module)
    limits = (getattr(module.config, "max_position_embeddings", None), tokenizer.model_max_length)
    longest = min(limit for limit in limits if isinstance(limit, int))
    if block is not None and block > longest:
        raise ValueError(f"The model takes at most {longest} tokens at a time, but a block of {block} was asked for.")
    length = min(block or BLOCK, longest)
    if task is None or task.predicts not in (_NEXT, _MASKED, _CLASS, _NUMBER):
        raise BadFile(
            f"{path} is a text, and how {type(_inner(module)).__name__} is trained on one is not known here.",
            "Give arrays as the model takes them, with labels, and --loss.",
        )
    if task.predicts == _NEXT:
        return _next_tokens(_tokens(path, tokenizer), length, path)
    if task.predicts == _MASKED:
        return _masked_tokens(_tokens(path, tokenizer), length, tokenizer, path)
    return _classified(path, module, tokenizer, length, target)


def _inner(module: nn.Module) -> nn.Module:
    """The model below a PEFT adapter, else itself."""
    below: Any = getattr(module, "get_base_model", None)
    return module if below is None else below()


def _tokens(path: Path, tokenizer: Any) -> Tensor:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise BadFile(f"{path} is no UTF-8 text: {error.reason}.", "Convert it with iconv.") from error
    return torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.long)


def _next_tokens(tokens: Tensor, length: int, path: Path) -> dict[str, Tensor]:
    """Blocks one after the other, each label the token after."""
    length = min(length, len(tokens) - 1)
    if length < 1:
        raise BadFile(f"{path} has {len(tokens)} tokens, too few to predict one.", "Give a longer text.")
    rows = (len(tokens) - 1) // length
    return {
        "input_ids": tokens[: rows * length].view(rows, length),
        "labels": tokens[1 : rows * length + 1].view(rows, length),
    }


def _masked_tokens(tokens: Tensor, length: int, tokenizer: Any, path: Path) -> dict[str, Tensor]:
    """Blocks between the tokenizer's marks, some of their tokens hidden (Devlin et al. 2019, arXiv:1810.04805, 3.1)."""
    if tokenizer.mask_token_id is None:
        raise BadFile(f"The tokenizer for {path} has no token for masks.", "Give arrays called input_ids and labels.")
    before, after = ([] if mark is None else [mark] for mark in (tokenizer.cls_token_id, tokenizer.sep_token_id))
    length = min(length - len(before) - len(after), len(tokens))
    if length < 1:
        raise BadFile(f"{path} has {len(tokens)} tokens, too few to mask one.", "Give a longer text.")
    rows = len(tokens) // length
    ids = tokens[: rows * length].view(rows, length)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.rand(ids.shape, generator=generator) < MASKED
    hidden[0, 0] |= not hidden.any()  # of a short text, at least one
    how = torch.rand(ids.shape, generator=generator)
    words = torch.randint(len(tokenizer), ids.shape, generator=generator)
    seen = torch.where(hidden & (how < DRAWN), words, ids)
    seen = seen.masked_fill(hidden & (how >= DRAWN + KEPT), tokenizer.mask_token_id)
    labels = ids.masked_fill(~hidden, IGNORED)

    def between(middle: Tensor, first: list[int], last: list[int]) -> Tensor:
        return torch.cat([torch.tensor([first] * rows), middle, torch.tensor([last] * rows)], 1).long()

    none = [[IGNORED] * len(mark) for mark in (before, after)]
    return {"input_ids": between(seen, before, after), "labels": between(labels, *none)}


def _classified(path: Path, module: nn.Module, tokenizer: Any, length: int, target: str | None) -> dict[str, Tensor]:
    """The rows of a table, each a text or a pair of texts with its label, padded to the longest."""
    texts, labels = split_table(read_table(path), target, path)
    if len(texts) > 2:
        raise BadFile(
            f"{path} has {len(texts)} columns beside the label: {listing(list(texts))}.",
            "Keep one or two columns of text.",
        )
    options: dict[str, Any] = {"padding": True, "truncation": True, "max_length": length, "return_tensors": "pt"}
    try:
        encoded = dict(tokenizer(*texts.values(), **options))
    except ValueError as error:  # a tokenizer without a token for padding
        raise BadFile(
            f"The texts in {path} cannot be padded: {printable(error, 160)}", "Set it and save it."
        ) from error
    return {**encoded, "labels": _labels(labels, module, path)}


def _labels(cells: list[str], module: nn.Module, path: Path) -> Tensor:
    """Numbers for a regression, else the classes, by their names in the model's config or by number."""
    config: Any = module.config
    if task_of(module) == _PROBLEMS["regression"]:
        return torch.tensor([[float(cell)] for cell in cells])
    known = {**{str(index): index for index in range(config.num_labels)}, **(config.label2id or {})}
    if unknown := [cell for cell in cells if cell not in known]:
        names = listing(list(config.id2label.values()))
        raise BadFile(
            f"{path} has the label {printable(unknown[0])!r}, but the model has {names}.",
            "Name the column of labels with --target, or write labels as the model's config has them.",
        )
    return torch.tensor([known[cell] for cell in cells])
