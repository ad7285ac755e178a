"""What Hugging Face models are trained for, and arrays as the loss of that takes them.

The task of a model is told by its class. Labels are those that a loss compares with the logits at the same place: what
the models themselves do with theirs, when they compute their loss inside, is done here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

IGNORED = -100  # the label of a place that has none


class Task(NamedTuple):
    """What a model predicts, and the loss that it was trained with, by name."""

    predicts: str
    loss: str = "cross-entropy"


NEXT, MASKED, OTHER = Task("the next token"), Task("masked tokens"), Task("the next token of the target")
CLASS, LABELS, NUMBER = Task("the class"), Task("several labels", "bce"), Task("a number", "mse")
TOKENS, ANSWER = Task("the class of every token"), Task("where the answer begins and ends")
_SUFFIXES = {
    "ForCausalLM": NEXT,
    "LMHeadModel": NEXT,
    "ForMaskedLM": MASKED,
    "ForConditionalGeneration": OTHER,
    "MTModel": OTHER,
    "EncoderDecoderModel": OTHER,
    "ForSequenceClassification": CLASS,
    "ForTokenClassification": TOKENS,
    "ForQuestionAnswering": ANSWER,
    "ForImageClassification": Task("the class of the image"),
}
_PROBLEMS = {"regression": NUMBER, "multi_label_classification": LABELS}


def task_of(module: nn.Module) -> Task | None:
    """The task of a Hugging Face model, also below a PEFT adapter; None when its class does not tell."""
    name = type(inner(module)).__name__
    task = next((task for suffix, task in _SUFFIXES.items() if name.endswith(suffix)), None)
    config = getattr(module, "config", None)
    if task is OTHER and not getattr(config, "is_encoder_decoder", False):
        return None  # of pictures and a text, say
    if task is not CLASS:
        return task
    problem = getattr(config, "problem_type", None) or ("regression" if getattr(config, "num_labels", 2) == 1 else "")
    return _PROBLEMS.get(problem, task)


def inner(module: nn.Module) -> Any:
    """The model below a PEFT adapter, else itself."""
    below: Any = getattr(module, "get_base_model", None)
    return module if below is None else below()


def as_trained(data: Any, module: nn.Module) -> Any:
    """A dict of the tensors that the model's own loss takes, with its labels where the task's loss looks for them;
    other data as they are."""
    arrange = _ARRANGED.get(task_of(module))
    return arrange(data, module) if arrange is not None and isinstance(data, Mapping) else data


def _shifted(data: Mapping[str, Tensor], module: nn.Module) -> Mapping[str, Tensor]:
    """With the labels, by default the tokens themselves, put where they are predicted.

    As in Hugging Face's causal models the label of a position is the token after it; the last position has none.
    """
    ids = data.get("input_ids")
    if ids is None or ids.ndim != 2:
        return data
    mask = data.get("attention_mask")
    own = ids if mask is None else ids.masked_fill(mask == 0, IGNORED)
    labels = data.get("labels", own)
    inputs = {key: value[:, :-1] if value.shape[:2] == ids.shape else value for key, value in data.items()}
    return {**inputs, "labels": labels[:, 1:]}


def _with_decoder(data: Mapping[str, Tensor], module: nn.Module) -> Mapping[str, Tensor]:
    """With what the decoder reads: the labels, one place later."""
    if "labels" not in data or "decoder_input_ids" in data:
        return data
    return {**data, "decoder_input_ids": inner(module).prepare_decoder_input_ids_from_labels(data["labels"])}


def _spans(data: Mapping[str, Tensor], module: nn.Module) -> Mapping[str, Tensor]:
    """With labels (n, 2): the first and the last token of the answer."""
    names = ("start_positions", "end_positions")
    if not all(name in data for name in names):
        return data
    rest = {key: value for key, value in data.items() if key not in names}
    return {**rest, "labels": torch.stack([data[name] for name in names], -1)}


def _column(data: Mapping[str, Tensor], module: nn.Module) -> Mapping[str, Tensor]:
    """With one number an example as a column, as the model returns it."""
    labels = data.get("labels")
    return data if labels is None or labels.ndim != 1 else {**data, "labels": labels[:, None].float()}


_ARRANGED: dict[Task | None, Callable[[Mapping[str, Tensor], nn.Module], Mapping[str, Tensor]]] = {
    NEXT: _shifted,
    OTHER: _with_decoder,
    ANSWER: _spans,
    NUMBER: _column,
}
