"""Texts and tables of texts for Hugging Face folders: the loss is what the model computes from its own labels."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from curvature_cli.load import load_objective, on_test
from curvature_cli.options import Misuse, Task
from hugging_face import WORDS
from safetensors.torch import save_file
from torch import nn

import curvature as cv
from curvature.errors import BadFile
from curvature.io.tasks import task_of


def test_a_causal_model_and_a_text_are_enough(curv, make, tokenizer):
    model = make("GPT2LMHeadModel")
    objective = load_objective("model", Task(data="text.txt", block_size=9))
    ids = torch.tensor(tokenizer("".join(Path("text.txt").read_text()), add_special_tokens=False)["input_ids"])
    rows = torch.stack([ids[i : i + 10] for i in range(0, 99, 9)])  # each begins where the last one ended
    own = model(input_ids=rows, labels=rows).loss  # which shifts by itself
    assert objective.value() == pytest.approx(own.item(), rel=1e-5)
    said = curv("trace", "model", "--data", "text.txt", "--params", "*ln_f*", "--operator", "ggn", "--block-size", 9)
    assert said.code == 0
    assert said.err.splitlines()[:2] == [
        "curv: cut text.txt into 11 rows of 9 tokens",
        "curv: model predicts the next token, so the loss is cross-entropy",
    ]


def test_arrays_for_a_causal_model_are_as_its_own_loss_takes_them(make):
    model = make("GPT2LMHeadModel")
    ids = torch.randint(5, 12, (4, 10))
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    own = model(input_ids=ids, attention_mask=mask, labels=labels).loss.item()
    for held in ({"labels": labels}, {}):
        save_file({"input_ids": ids, "attention_mask": mask, **held}, "ids.safetensors")
        assert load_objective("model", Task(data="ids.safetensors")).value() == pytest.approx(own, rel=1e-5)


def test_a_masked_model_and_a_text(make, tokenizer):
    model = make("BertForMaskedLM")
    objective = load_objective("model", Task(data="text.txt"))
    again = load_objective("model", Task(data="text.txt"))
    assert objective.fingerprint == again.fingerprint
    batch = next(iter(objective.batches))
    seen, labels = batch["input_ids"], batch["labels"]
    hidden = labels != -100
    assert (
        seen.shape == (7, 16)
        and (seen[:, 0] == tokenizer.cls_token_id).all()
        and (seen[:, -1] == tokenizer.sep_token_id).all()
    )
    assert 0.05 < hidden.float().mean() < 0.3 and not hidden[:, [0, -1]].any()
    assert (seen[~hidden] != tokenizer.mask_token_id).all() and (
        seen[hidden] == tokenizer.mask_token_id
    ).float().mean() > 0.5
    truth = torch.tensor(tokenizer(Path("text.txt").read_text(), add_special_tokens=False)["input_ids"])[: 7 * 14]
    assert torch.equal(torch.where(hidden, labels, seen)[:, 1:-1].flatten(), truth)
    assert objective.value() == pytest.approx(model(**batch).loss.item(), rel=1e-5)


@pytest.mark.parametrize("written", ["csv", "jsonl", "pairs"])
def test_a_classifier_and_a_table_of_texts(make, tokenizer, written):
    names = {0: "bad", 1: "good", 2: "both"}
    model = make(
        "BertForSequenceClassification", num_labels=3, id2label=names, label2id={v: k for k, v in names.items()}
    )
    texts, others = ["to be", "or not to be", "that is the question"], ["slings", "and arrows", "of mind"]
    labels = ["good", "bad", "both"]
    rows = {
        "csv": "text,label\n" + "".join(f"{t},{y}\n" for t, y in zip(texts, labels, strict=True)),
        "jsonl": "".join(
            json.dumps({"text": t, "label": names_of}) + "\n" for t, names_of in zip(texts, (1, 0, 2), strict=True)
        ),
        "pairs": "label,first,second\n"
        + "".join(f"{y},{t},{o}\n" for t, o, y in zip(texts, others, labels, strict=True)),
    }
    Path("rows").write_text(rows[written])
    objective = load_objective("model", Task(data="rows", target="label" if written == "pairs" else None))
    pair = (texts, others) if written == "pairs" else (texts,)
    encoded = tokenizer(*pair, padding=True, return_tensors="pt")
    own = model(**encoded, labels=torch.tensor([1, 0, 2])).loss.item()
    assert objective.value() == pytest.approx(own, rel=1e-5)
    Path("rows").write_text("text,label\nto be,great\n")
    with pytest.raises(BadFile, match=r"rows has the label 'great', but the model has bad, good, both\."):
        load_objective("model", Task(data="rows"))


def test_a_regression_and_a_table_of_texts(make, tokenizer):
    model = make("BertForSequenceClassification", num_labels=1)
    Path("rows.csv").write_text("text,score\nto be,0.5\nor not,-1\n")
    encoded = tokenizer(["to be", "or not"], padding=True, return_tensors="pt")
    own = F.mse_loss(model(**encoded).logits.flatten(), torch.tensor([0.5, -1.0])).item()
    assert load_objective("model", Task(data="rows.csv")).value() == pytest.approx(own, rel=1e-5)


@pytest.mark.parametrize("written", ["names", "numbers", "columns", "words"])
def test_several_labels_of_a_text(make, tokenizer, written):
    names = {0: "bad", 1: "long", 2: "old"}
    options = {"num_labels": 3, "id2label": names, "label2id": {v: k for k, v in names.items()}}
    model = make("BertForSequenceClassification", problem_type="multi_label_classification", **options)
    texts, hold = ["to be", "or not to be", "that"], [[1.0, 0.0, 1.0], [0.0, 0.0, 0.0], [0.0, 1.0, 0.0]]
    named = [["bad", "old"], [], ["long"]]
    if written == "columns":
        rows = [
            {"text": text, **dict(zip(names.values(), row, strict=True))} for text, row in zip(texts, hold, strict=True)
        ]
    else:
        labels = {"names": named, "numbers": [list(map(int, row)) for row in hold], "words": map(" ".join, named)}[
            written
        ]
        rows = [{"text": text, "labels": label} for text, label in zip(texts, labels, strict=True)]
    Path("rows").write_text("\n".join(map(json.dumps, rows)))
    own = model(**tokenizer(texts, padding=True, return_tensors="pt"), labels=torch.tensor(hold)).loss.item()
    assert load_objective("model", Task(data="rows")).value() == pytest.approx(own, rel=1e-5)


@pytest.mark.parametrize("name", ["T5ForConditionalGeneration", "BartForConditionalGeneration"])
@pytest.mark.parametrize("written", ["tsv", "jsonl"])
def test_a_text_and_the_one_that_follows_from_it(curv, make, tokenizer, name, written):
    model = make(name)
    sources, targets = ["to be or not", "that is the question", "tis nobler"], ["slings", "and arrows of mind", "be"]
    rows = list(zip(sources, targets, strict=True))
    table = "source\ttarget\n" + "\n".join(map("\t".join, rows))
    lines = "\n".join(json.dumps({"target": t, "source": s, "id": i}) for i, (s, t) in enumerate(rows))
    Path("rows").write_text(table if written == "tsv" else lines)
    given = Task(data="rows", target="target", batch_size=2)
    labels = tokenizer(targets, padding=True, return_tensors="pt")
    labels = labels["input_ids"].masked_fill(labels["attention_mask"] == 0, -100)
    encoded = tokenizer(sources, padding=True, return_tensors="pt")
    inputs = {key: encoded[key] for key in ("input_ids", "attention_mask")}
    own = model(**inputs, labels=labels).loss.item()
    assert load_objective("model", given).value() == pytest.approx(own, rel=1e-5)
    save_file({**inputs, "labels": labels}, "rows.safetensors")
    said = curv("trace", "model", "--data", "rows.safetensors", "--params", "*norm*", "--format", "quiet")
    assert said.code == 0 and "predicts the next token of the target, so the loss is cross-entropy" in said.err
    assert load_objective("model", Task(data="rows.safetensors")).value() == pytest.approx(own, rel=1e-5)


def test_where_answers_begin_and_end(curv, make, tokenizer):
    model = make("BertForQuestionAnswering")
    question, context = "whether tis nobler", "to be or not to be"
    rows = [{"id": "a", "question": question, "context": context, "answers": {"text": ["or not"], "answer_start": [6]}},
            {"id": "b", "question": "to be", "context": "in mind", "answers": {"text": [], "answer_start": []}}]  # fmt: skip
    Path("rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    encoded = tokenizer([question, "to be"], [context, "in mind"], padding=True, return_tensors="pt")
    places = {
        "start_positions": torch.tensor([7, 0]),
        "end_positions": torch.tensor([8, 0]),
    }  # after 3 words, 2 marks, 2 words
    own = model(**encoded, **places).loss.item()
    objective = load_objective("model", Task(data="rows.jsonl"))
    assert objective.value() == pytest.approx(own, rel=1e-5)
    save_file({**encoded, **places}, "rows.safetensors")
    assert load_objective("model", Task(data="rows.safetensors")).value() == pytest.approx(own, rel=1e-5)
    windows = load_objective(
        "model", Task(data="rows.jsonl", block_size=9)
    )  # 3 words of context at a time, 1 of them again
    labels = torch.cat([batch["labels"] for batch in windows.batches])
    assert labels.tolist() == [[0, 0], [5, 6], [0, 0], [0, 0]]
    said = curv(
        "trace", "model", "--data", "rows.jsonl", "--params", "qa_outputs", "--operator", "ggn", "--format", "quiet"
    )
    assert said.code == 0 and "predicts where the answer begins and ends, so the loss is cross-entropy" in said.err


@pytest.mark.parametrize("written", ["json", "words"])
def test_classes_of_words(make, tokenizer, written):
    names = {0: "O", 1: "NAME"}
    model = make("BertForTokenClassification", num_labels=2, id2label=names, label2id={v: k for k, v in names.items()})
    words, tags = [["to", "be"], ["that", "is", "mind"]], [["O", "NAME"], ["NAME", "O", "O"]]
    rows = [{"id": i, "tokens": w, "ner_tags": t} for i, (w, t) in enumerate(zip(words, tags, strict=True))]
    lines = "words,tags\n" + "\n".join(f"{' '.join(w)},{' '.join(t)}" for w, t in zip(words, tags, strict=True))
    Path("rows").write_text(lines if written == "words" else "\n".join(map(json.dumps, rows)))
    encoded = tokenizer(words, is_split_into_words=True, padding=True, return_tensors="pt")
    own = model(**encoded, labels=torch.tensor([[-100, 0, 1, -100, -100], [-100, 1, 0, 0, -100]])).loss.item()
    assert load_objective("model", Task(data="rows")).value() == pytest.approx(own, rel=1e-5)


def test_numbers_in_arrays_are_regressed_on(make):
    model = make("BertForSequenceClassification", num_labels=1)
    ids, labels = torch.randint(5, 12, (4, 6)), torch.randn(4)
    save_file({"input_ids": ids, "labels": labels}, "ids.safetensors")
    own = model(input_ids=ids, labels=labels).loss.item()
    assert load_objective("model", Task(data="ids.safetensors")).value() == pytest.approx(own, rel=1e-5)


@pytest.mark.parametrize(
    "model, text, words",
    [
        ("T5ForConditionalGeneration", "a,b,target\nto,be,or\n", r"has 2 columns beside the target: a, b\."),
        ("BertForSequenceClassification", "text,score\nto be,good\n", r"has a label that is no number .*'good'"),
        ("BertForQuestionAnswering", "question,context\nto,be\n", r"has no column answers, but question, context\."),
        ("BertForQuestionAnswering", "question,context,answers\nto,be,or\n", r"has the answers or\."),
        ("BertForQuestionAnswering", f"question,context,answers\n{'to ' * 13},be,or\n", r"has a question of 13 tokens, which leaves no room for its context in 16\."),
        ("BertForTokenClassification", "tokens,tags\nto be,0\n", r"has 2 words but 1 classes in row 1\."),
        ("BertForTokenClassification", "tokens,tags\nto be,[0\n", r"has \[0 where a list would be\."),
        ("BertForTokenClassification", "tokens,tags\nto,5\n", r"has the label '5', but the model has LABEL_0\."),
        ("BertForMultipleChoice", "a\n1\n", r"how BertForMultipleChoice is trained on one is not known here"),
    ],
)  # fmt: skip
def test_a_table_of_texts_that_does_not_suffice(make, model, text, words):
    make(model, num_labels=1)
    Path("rows").write_text(text)
    with pytest.raises(BadFile, match=words) as error:
        load_objective("model", Task(data="rows"))
    assert error.value.fix


def test_other_texts_are_read_as_the_data_are(curv, make):
    make("GPT2LMHeadModel")
    Path("other.txt").write_text(" ".join((WORDS[::-1] * 3)[:40]))
    options = ("--block-size", 9, "--params", "*ln_f*", "--points", 3, "--axes", 1, "--out", "run", "--format", "quiet")
    said = curv("landscape", "model", "--data", "text.txt", "--held-out", "other.txt", *options)
    assert said.code == 0 and "curv: cut other.txt into 4 rows of 9 tokens" in said.err
    found = cv.Landscape.load("run")
    alone = load_objective("model", Task(data="other.txt", block_size=9)).value()
    assert float(found.held_out_loss[1]) == pytest.approx(alone, rel=1e-6) != pytest.approx(float(found.loss[1]))
    task = Task(data="text.txt", block_size=9, batch_size=3, l2=0.1)
    objective = load_objective("model", task)
    rows = {"input_ids": torch.randint(5, 12, (4, 10))}
    save_file(rows, "other.safetensors")
    arrays = load_objective("model", Task(data="other.safetensors")).value()
    asked = on_test(objective, "other.safetensors", "model", task)
    assert asked.value() == pytest.approx(arrays, rel=1e-6) and [len(b["labels"]) for b in asked.batches] == [3, 1]


def test_held_out_tables_have_the_same_target(curv, make, task):
    Path("t.csv").write_text("y,a,b,c\n1,1,2,3\n0,4,5,6\n1,7,8,8\n")
    options = (
        "--loss",
        "cross-entropy",
        "--target",
        "y",
        "--points",
        3,
        "--axes",
        1,
        "--out",
        "run",
        "--format",
        "quiet",
    )
    assert curv("landscape", "./task.py:stock", "--data", "t.csv", "--held-out", "t.csv", *options).code == 0
    found = cv.Landscape.load("run")
    assert torch.equal(found.held_out_loss, found.loss)
    said = curv("landscape", "./task.py:stock", "--data", "t.csv", "--held-out", "train.npz", *options, "--overwrite")
    assert said.code == 0


def test_what_a_folder_does_not_say_is_asked_for(make, folder):
    make("BertModel")
    with pytest.raises(Misuse, match=r"model says nothing about data\."):
        load_objective("model", Task())
    save_file({"input_ids": torch.ones(2, 3).long(), "labels": torch.ones(2)}, "ids.safetensors")
    with pytest.raises(Misuse, match=r"does not tell what its BertModel is trained for\."):
        load_objective("model", Task(data="ids.safetensors"))
    with pytest.raises(BadFile, match=r"how BertModel is trained on one is not known here"):
        load_objective("model", Task(data="text.txt"))
    make("GPT2LMHeadModel", "other")
    (folder / "other" / "tokenizer_config.json").unlink()
    with pytest.raises(BadFile, match=r"other has no tokenizer, so that it cannot read a text\."):
        load_objective("other", Task(data="text.txt"))
    with pytest.raises(ValueError, match=r"takes at most 16 tokens at a time, but a block of 17"):
        make("GPT2LMHeadModel", "third") and load_objective("third", Task(data="text.txt", block_size=17))
    (folder / "short.txt").write_text("to")
    with pytest.raises(BadFile, match=r"short\.txt has 1 tokens, too few to predict one\."):
        load_objective("third", Task(data="short.txt"))


def test_the_task_of_a_module_that_has_none():
    assert task_of(nn.Linear(2, 2)) is None
