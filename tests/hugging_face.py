"""Hugging Face folders of tiny models and a tokenizer for them, made here: nothing is downloaded."""

from __future__ import annotations

import pytest
import torch

WORDS = [
    "to",
    "be",
    "or",
    "not",
    "that",
    "is",
    "the",
    "question",
    "whether",
    "tis",
    "nobler",
    "in",
    "mind",
    "suffer",
    "slings",
    "and",
    "arrows",
    "of",
]
SIZES = {
    "GPT2": {"n_positions": 16, "n_embd": 8, "n_layer": 1, "n_head": 2, "bos_token_id": 0, "eos_token_id": 0},
    "Bert": {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8,
             "max_position_embeddings": 16},
    "T5": {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2, "pad_token_id": 1, "eos_token_id": 4,
           "decoder_start_token_id": 1},
    "Bart": {"d_model": 8, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
             "decoder_attention_heads": 2, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8, "max_position_embeddings": 16,
             "pad_token_id": 1, "bos_token_id": 3, "eos_token_id": 4, "decoder_start_token_id": 4},
}  # fmt: skip


@pytest.fixture
def tokenizer():
    """Words separated by spaces, and the marks that BERT wants; made here, without the hub."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    marks = {
        "unk_token": "[UNK]",
        "pad_token": "[PAD]",
        "mask_token": "[MASK]",
        "cls_token": "[CLS]",
        "sep_token": "[SEP]",
    }
    vocabulary = {word: index for index, word in enumerate([*marks.values(), *WORDS])}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    ends = ((marks[name], vocabulary[marks[name]]) for name in ("sep_token", "cls_token"))
    inner.post_processor = tokenizers.processors.BertProcessing(*ends)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, **marks)


@pytest.fixture
def make(folder, tokenizer):
    """A tiny model of a class of transformers, saved as a folder with its tokenizer; what was saved is returned."""
    import transformers

    def saved(name: str, path: str = "model", **options):
        kind = next(kind for kind in SIZES if name.startswith(kind))
        torch.manual_seed(0)
        config = getattr(transformers, f"{kind}Config")(vocab_size=len(tokenizer), **SIZES[kind], **options)
        model = getattr(transformers, name)(config).eval()
        transformers.utils.logging.disable_progress_bar()
        model.save_pretrained(path)
        tokenizer.save_pretrained(path)
        return model

    (folder / "text.txt").write_text(" ".join((WORDS * 7)[:100]))
    return saved
