"""Tables of texts as the tokens and labels that Hugging Face models are trained on."""

from __future__ import annotations

import inspect
import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from curvature.errors import BadFile, listing, printable
from curvature.io.tables import Columns, read_table, split_table
from curvature.io.tasks import IGNORED, as_trained, inner

OVERLAP = 3  # neighbouring windows of a long context share one part in so many (BERT's, 128 of 384 tokens)


class Reading(NamedTuple):
    """A file of text, the model that it is for, and how it is read: at most `length` tokens a row, and the column of
    labels."""

    path: Path
    module: nn.Module
    tokenizer: Any
    length: int
    target: str | None

    def tokens(self, *texts: Any, **options: Any) -> Any:
        """What the tokenizer makes of texts, or of pairs of texts, cut and padded to the longest."""
        options = {"truncation": True, "padding": True, "max_length": self.length, "return_tensors": "pt"} | options
        try:
            return self.tokenizer(*texts, **options)
        except ValueError as error:  # a tokenizer without a token for padding, or one that keeps no places
            raise BadFile(
                f"The texts in {self.path} cannot be used with this tokenizer: {printable(error, 160)}",
                "Set what it lacks and save it, or give arrays as the model takes them.",
            ) from error

    def batch(self, encoded: Any, labels: Tensor) -> dict[str, Tensor]:
        """What the model takes of what was encoded (some tokenizers make more), and the labels."""
        taken = inspect.signature(inner(self.module).forward).parameters
        return {**{name: encoded[name] for name in encoded if name in taken}, "labels": labels}

    def bad(self, cause: str, fix: str) -> BadFile:
        """The error that the file is not as it should be."""
        return BadFile(f"{self.path} {cause}.", fix)


def classes(reading: Reading) -> dict[str, Tensor]:
    """The rows of a table, each a text or a pair of texts with its class."""
    texts, cells = split_table(read_table(reading.path), reading.target, reading.path)
    return reading.batch(_one_or_two(reading, texts), torch.tensor(_indices(reading, cells)))


def numbers(reading: Reading) -> dict[str, Tensor]:
    """The rows of a table, each a text or a pair of texts with a number."""
    texts, cells = split_table(read_table(reading.path), reading.target, reading.path)
    labels = torch.tensor([[number] for number in _numbers(reading, cells)])
    return reading.batch(_one_or_two(reading, texts), labels)


def several_labels(reading: Reading) -> dict[str, Tensor]:
    """The rows of a table, each a text or a pair of texts with the labels that hold: a column of 0 and 1 for each label
    of the model, or one column of lists, either of names or of 0 and 1 for all labels."""
    columns = read_table(reading.path)
    names = [str(name) for _, name in sorted(_config(reading).id2label.items())]
    if all(name in columns for name in names):
        texts = {name: cells for name, cells in columns.items() if name not in names}
        rows = list(zip(*(_numbers(reading, columns[name]) for name in names), strict=True))
    else:
        texts, cells = split_table(columns, reading.target, reading.path)
        rows = [_multi_hot(reading, _items(reading, cell), len(names)) for cell in cells]
    return reading.batch(_one_or_two(reading, texts), torch.tensor(rows))


def classes_of_words(reading: Reading) -> dict[str, Tensor]:
    """The rows of a table, each a list of words and one of their classes. The first token of a word has its class and
    the others none (Devlin et al. 2019, arXiv:1810.04805, 5.3)."""
    texts, cells = split_table(read_table(reading.path), reading.target, reading.path)
    words = [_items(reading, cell) for cell in _only(reading, texts, ("tokens", "words"))]
    tags = [_indices(reading, _items(reading, cell)) for cell in cells]
    for row, (said, known) in enumerate(zip(words, tags, strict=True), start=1):
        if len(said) != len(known):
            raise reading.bad(f"has {len(said)} words but {len(known)} classes in row {row}", "Give one for each.")
    encoded = reading.tokens(words, is_split_into_words=True)
    labels = torch.full(encoded["input_ids"].shape, IGNORED)
    for row, known in enumerate(tags):
        for place, (before, word) in enumerate(pairwise([None, *encoded.word_ids(row)])):
            if word is not None and word != before:
                labels[row, place] = known[word]
    return reading.batch(encoded, labels)


def pairs(reading: Reading) -> dict[str, Tensor]:
    """The rows of a table, each a text and the one that the model is to make of it."""
    texts, targets = split_table(read_table(reading.path), reading.target, reading.path)
    encoded = reading.tokens(_only(reading, texts, ("source",)))
    wanted = reading.tokens(text_target=targets)
    labels = wanted["input_ids"].masked_fill(wanted["attention_mask"] == 0, IGNORED)
    return dict(as_trained(reading.batch(encoded, labels), reading.module))


def answers(reading: Reading) -> dict[str, Tensor]:
    """The rows of a table with the columns question, context and answers, which holds the texts and where they begin,
    as in SQuAD. A long context gives several rows; of those without the answer the first token is the label (Devlin
    et al. 2019, arXiv:1810.04805, 4.3)."""
    columns = read_table(reading.path)
    names = ("question", "context", reading.target or "answers")
    if lacking := [name for name in names if name not in columns]:
        raise reading.bad(
            f"has no column {listing(lacking)}, but {listing(list(columns))}",
            'Write lines of {"question": ..., "context": ..., "answers": {"text": [...], "answer_start": [...]}}.',
        )
    question, context, cells = (columns[name] for name in names)
    asked = [len(ids) for ids in reading.tokenizer(question, add_special_tokens=False)["input_ids"]]
    room = reading.length - max(asked) - reading.tokenizer.num_special_tokens_to_add(pair=True)
    if room < 1:
        raise reading.bad(
            f"has a question of {max(asked)} tokens, which leaves no room for its context in {reading.length}",
            "Pass a larger --block-size, or leave it out.",
        )
    windows = {"truncation": "only_second", "stride": room // OVERLAP, "return_overflowing_tokens": True}
    encoded = reading.tokens(question, context, **windows)
    spans = [_span(reading, cell) for cell in cells]
    labels = []
    for row, example in enumerate(encoded["overflow_to_sample_mapping"].tolist()):
        places = [encoded.char_to_token(row, place, sequence_index=1) for place in spans[example]]
        labels.append(places if places and None not in places else [0, 0])
    return reading.batch(encoded, torch.tensor(labels))


def _span(reading: Reading, cell: str) -> list[int]:
    """Where the first and last character of an answer are; nothing for a question that has none."""
    try:
        held = json.loads(cell)
        texts, starts = held["text"], held["answer_start"]
        if not texts:
            return []
        return [int(starts[0]), int(starts[0]) + len(str(texts[0])) - 1]
    except (ValueError, TypeError, KeyError, IndexError) as error:
        raise reading.bad(
            f"has the answers {printable(cell, 80)}", 'Write them as {"text": [...], "answer_start": [...]}.'
        ) from error


def _one_or_two(reading: Reading, texts: Columns) -> Any:
    if len(texts) not in (1, 2):
        raise reading.bad(
            f"has {len(texts)} columns beside the label: {listing(list(texts))}", "Keep one or two columns of text."
        )
    return reading.tokens(*texts.values())


def _only(reading: Reading, texts: Columns, usual: Sequence[str]) -> list[str]:
    """The column with one of the usual names, or the only one."""
    named = next((texts[name] for name in usual if name in texts), None)
    if named is not None:
        return named
    if len(texts) != 1:
        raise reading.bad(
            f"has {len(texts)} columns beside the target: {listing(list(texts))}",
            f"Keep one, or call it {' or '.join(usual)}.",
        )
    return next(iter(texts.values()))


def _items(reading: Reading, cell: str) -> list[str]:
    """The entries of a list in JSON, or between spaces."""
    if not cell.lstrip().startswith("["):
        return cell.split()
    try:
        return [str(item) for item in json.loads(cell)]
    except ValueError as error:
        raise reading.bad(f"has {printable(cell, 80)} where a list would be", "Write it as JSON.") from error


def _config(reading: Reading) -> Any:
    return reading.module.config


def _indices(reading: Reading, cells: list[str]) -> list[int]:
    """The classes, by their names in the model's config or by number."""
    config = _config(reading)
    known = {**{str(index): index for index in range(config.num_labels)}, **(config.label2id or {})}
    if unknown := [cell for cell in cells if cell not in known]:
        names = listing(list(config.id2label.values()))
        raise reading.bad(
            f"has the label {printable(unknown[0])!r}, but the model has {names}",
            "Name the column of labels with --target, or write labels as the model's config has them.",
        )
    return [known[cell] for cell in cells]


def _multi_hot(reading: Reading, items: list[str], count: int) -> list[float]:
    """1 for each label that is named, 0 for the others; a list of 0 and 1 for all of them is that already."""
    if len(items) == count and set(items) <= {"0", "1"}:
        return list(map(float, items))
    row = [0.0] * count
    for index in _indices(reading, items):
        row[index] = 1.0
    return row


def _numbers(reading: Reading, cells: list[str]) -> list[float]:
    try:
        return list(map(float, cells))
    except ValueError as error:
        raise reading.bad(
            f"has a label that is no number ({error})", "Name the column of labels with --target."
        ) from error
