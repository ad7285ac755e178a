"""Texts as the batches of tokens that Hugging Face models are trained on, by what the model predicts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from curvature.errors import BadFile
from curvature.io.tasks import ANSWER, CLASS, IGNORED, LABELS, MASKED, NEXT, NUMBER, OTHER, TOKENS, Task, inner, task_of
from curvature.io.text_tables import (
    Reading,
    answers,
    classes,
    classes_of_words,
    numbers,
    pairs,
    several_labels,
)

BLOCK = 128  # tokens at a time, where the model can take as many
HIDDEN, KEPT, DRAWN = 0.15, 0.1, 0.1  # share of tokens to predict, and of these those kept and drawn (BERT's)


def read_text(
    path: Path, module: nn.Module, tokenizer: Any, *, block: int | None = None, target: str | None = None
) -> dict[str, Tensor]:
    """The text at `path` as the model takes it, in rows of at most so many tokens, with labels for its task.

    Language models read a running text, cut into blocks; which tokens are masked is the same every time. Others read a
    table, `target` the column that is predicted (by default the last): one or two columns of text and a class, a number
    or a list of labels; a text and the one that follows from it; words and their classes; question, context and answers
    as in SQuAD. BadFile when the text or the tokenizer does not suffice.
    """
    limits = (getattr(module.config, "max_position_embeddings", None), tokenizer.model_max_length)
    longest = min(limit for limit in limits if isinstance(limit, int))
    if block is not None and block > longest:
        raise ValueError(f"The model takes at most {longest} tokens at a time, but a block of {block} was asked for.")
    task = task_of(module)
    if task is None or task not in _READERS:
        raise BadFile(
            f"{path} is a text, and how {type(inner(module)).__name__} is trained on one is not known here.",
            "Pass --loss and --data with arrays as the model takes them, with labels, or --objective ./file.py:NAME "
            "that returns a curvature.Objective.",
        )
    return _READERS[task](Reading(path, module, tokenizer, min(block or BLOCK, longest), target))


def _tokens(reading: Reading) -> Tensor:
    try:
        text = reading.path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise BadFile(f"{reading.path} is no UTF-8 text: {error.reason}.", "Convert it with iconv.") from error
    ids = reading.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.long)


def _next_tokens(reading: Reading) -> dict[str, Tensor]:
    """Blocks one after the other, each label the token after."""
    tokens = _tokens(reading)
    length = min(reading.length, len(tokens) - 1)
    if length < 1:
        raise BadFile(f"{reading.path} has {len(tokens)} tokens, too few to predict one.", "Give a longer text.")
    rows = (len(tokens) - 1) // length
    return {
        "input_ids": tokens[: rows * length].view(rows, length),
        "labels": tokens[1 : rows * length + 1].view(rows, length),
    }


def _masked_tokens(reading: Reading) -> dict[str, Tensor]:
    """Blocks between the tokenizer's marks, some of their tokens hidden (Devlin et al. 2019, arXiv:1810.04805, 3.1)."""
    tokens, path, tokenizer = _tokens(reading), reading.path, reading.tokenizer
    if tokenizer.mask_token_id is None:
        raise BadFile(f"The tokenizer for {path} has no token for masks.", "Give arrays called input_ids and labels.")
    before, after = ([] if mark is None else [mark] for mark in (tokenizer.cls_token_id, tokenizer.sep_token_id))
    length = min(reading.length - len(before) - len(after), len(tokens))
    if length < 1:
        raise BadFile(f"{path} has {len(tokens)} tokens, too few to mask one.", "Give a longer text.")
    rows = len(tokens) // length
    ids = tokens[: rows * length].view(rows, length)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.rand(ids.shape, generator=generator) < HIDDEN
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


_READERS: dict[Task, Callable[[Reading], dict[str, Tensor]]] = {
    NEXT: _next_tokens,
    MASKED: _masked_tokens,
    OTHER: pairs,
    CLASS: classes,
    LABELS: several_labels,
    NUMBER: numbers,
    TOKENS: classes_of_words,
    ANSWER: answers,
}
