"""Every way in which people keep models and data: files made the ordinary way, and the numbers that they hold."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from curvature_cli.load import load_objective
from curvature_cli.options import Misuse, Task
from safetensors.torch import load_file, save_file
from torch import nn

import curvature as cv
from curvature.errors import BadFile
from curvature.io.data import read_data
from curvature.io.models import read_module

PARTS = ("--loss", "cross-entropy", "--data", "train.npz")
LIT = """
import torch
from task import Net

class LitNet(torch.nn.Module):
    def __init__(self, hidden, activation="tanh"):
        super().__init__()
        self.model = Net(hidden, activation)
        self.register_buffer("seen", torch.zeros(3))
    def forward(self, x):
        return self.model(x)
"""


def other(task, **options):
    """A network that is not the one that its code makes."""
    torch.manual_seed(7)
    return task.Net(**options)


def exact(module, task) -> float:
    objective = cv.Objective.of(module, "cross-entropy", task.data())
    return float(cv.trace(cv.hessian(objective), products=objective.space.size).value)


def agrees(said, expected: float) -> list[str]:
    """Whether a command found this trace; what it told on stderr."""
    assert said.code == 0, said
    assert json.loads(said.out)["value"] == pytest.approx(expected, rel=1e-5)
    return said.err.splitlines()


# Checkpoints of trainers


def lightning(task, path, **given) -> nn.Module:
    """What Lightning writes: the layout of a ModelCheckpoint."""
    net = other(task, hidden=5, activation="sin")
    state = {f"model.{name}": tensor for name, tensor in net.state_dict().items()} | {"seen": torch.ones(3)}
    held = {"epoch": 1, "global_step": 9, "pytorch-lightning_version": "2.6.6", "state_dict": state, "loops": {}}
    torch.save({**held, "hyper_parameters": {"hidden": 5, "activation": "sin", "lr": 0.1, **given}}, path)
    return net


def test_a_lightning_checkpoint_makes_its_module_from_its_hyper_parameters(curv, folder, task):
    net = lightning(task, "last.ckpt")
    (folder / "lit.py").write_text(LIT)
    notes = agrees(
        curv("trace", "last.ckpt", "--arch", "./lit.py:LitNet", *PARTS, "--format", "json"), exact(net, task)
    )
    assert notes[0] == "curv: took hidden=5, activation=sin from its hyper_parameters"
    said = curv("trace", "last.ckpt", "--arch", "./lit.py:LitNet", "--arch-arg", "hidden=4", *PARTS)
    assert said.code == 3 and "(file [5, 3], model [4, 3])" in said.err  # what is said goes before what is held


def test_the_model_inside_a_lightning_module_is_enough(curv, task):
    net = lightning(task, "last.ckpt")
    notes = agrees(curv("trace", "last.ckpt", "--arch", "./task.py:Net", *PARTS, "--format", "json"), exact(net, task))
    assert notes[-1] == "curv: took what is under 'model.', left out seen"


def test_a_lightning_checkpoint_with_a_loss_among_its_hyper_parameters_names_it(curv, task):
    net = lightning(task, "last.ckpt", loss=nn.CrossEntropyLoss())
    said = curv("trace", "last.ckpt", "--arch", "./task.py:Net", *PARTS)
    assert said.code == 4 and "uses what could run code: torch.nn.modules.loss.CrossEntropyLoss" in said.err
    allowed = ("--allow-global", "torch.nn.modules.loss.CrossEntropyLoss")
    for way in (allowed, ("--trust",)):
        agrees(
            curv("trace", "last.ckpt", "--arch", "./task.py:Net", *PARTS, *way, "--format", "json"), exact(net, task)
        )


def test_inspect_of_a_lightning_checkpoint_lists_hyper_parameters(curv, task):
    lightning(task, "last.ckpt")
    facts = json.loads(curv("inspect", "last.ckpt", "--format", "json").out)
    assert facts["kind"] == "a Lightning checkpoint" and facts["code"] == []
    assert facts["notes"][0] == "hyper_parameters hidden=5, activation=sin, lr=0.1"
    assert {"model.first.weight", "seen"} <= {tensor["name"] for tensor in facts["tensors"]}


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_a_checkpoint_of_lightnings_own_trainer(curv, folder, task):
    L = pytest.importorskip("lightning.pytorch")
    (folder / "own.py").write_text(
        "import lightning.pytorch as L, torch\n"
        "from task import Net\n"
        "class Own(L.LightningModule):\n"
        "    def __init__(self, hidden, lr):\n"
        "        super().__init__(); self.save_hyperparameters(); self.net = Net(hidden)\n"
        "    def forward(self, x): return self.net(x)\n"
        "    def training_step(self, batch, _): return torch.nn.functional.cross_entropy(self(batch[0]), batch[1])\n"
        "    def configure_optimizers(self): return torch.optim.Adam(self.parameters(), self.hparams.lr)\n"
    )
    sys.path.insert(0, str(folder))
    from own import Own

    module = Own(hidden=5, lr=0.1)
    trainer = L.Trainer(max_steps=2, accelerator="cpu", logger=False, enable_progress_bar=False,
                        enable_model_summary=False, enable_checkpointing=False)  # fmt: skip
    trainer.fit(module, torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*task.data()), batch_size=5))
    trainer.save_checkpoint("own.ckpt")
    for arch, inside in (("./own.py:Own", module), ("./task.py:Net", module.net)):
        more = () if inside is module else ("--arch-arg", "hidden=5")
        agrees(curv("trace", "own.ckpt", "--arch", arch, *more, *PARTS, "--format", "json"), exact(inside, task))


WRAPPED = {
    "torch.compile": lambda net: torch.compile(net, backend="eager").state_dict(),
    "DataParallel": lambda net: nn.DataParallel(net).state_dict(),
    "both": lambda net: torch.compile(nn.DataParallel(net), backend="eager").state_dict(),
    "both, the other way": lambda net: nn.DataParallel(torch.compile(net, backend="eager")).state_dict(),
    "twice": lambda net: {f"module.module.{name}": t for name, t in net.state_dict().items()},
    "averaged": lambda net: torch.optim.swa_utils.AveragedModel(net).state_dict(),
    "with a counter": lambda net: {"model": net.state_dict(), "step": torch.tensor(3)},
    "ema": lambda net: {"ema": net.state_dict(), "config": {"model": "small"}},
    "model is its options": lambda net: {"model": {"width": 3}, "state_dict": net.state_dict()},
    "a name of one's own": lambda net: {"classifier_v2": net.state_dict(), "optimizer": {"state": {}}, "epoch": 3},
    "inside another": lambda net: {f"student.{name}": t for name, t in net.state_dict().items()} | {"t": torch.ones(1)},
}


@pytest.mark.parametrize("wrap", WRAPPED.values(), ids=WRAPPED)
def test_weights_are_found_however_they_are_wrapped(curv, task, wrap):
    net = other(task)
    torch.save(wrap(net), "wrapped.pt")
    notes = agrees(curv("trace", "wrapped.pt", "--arch", "./task.py:Net", *PARTS, "--format", "json"), exact(net, task))
    assert notes and all(note.startswith("curv: ") for note in notes)
    agrees(curv("trace", "wrapped.pt", "--objective", "./task.py:make", "--format", "json"), exact(net, task))


def test_weights_that_fit_in_two_places_are_refused(curv, task):
    states = {f"{part}.{name}": t for part in ("student", "teacher") for name, t in other(task).state_dict().items()}
    torch.save(states, "both.pt")
    said = curv("trace", "both.pt", "--arch", "./task.py:Net", *PARTS)
    assert said.code == 3 and "fit Net in 2 places: student., teacher." in said.err


def test_a_model_pickled_by_a_script_finds_its_class_in_the_script_that_is_named(curv, task, monkeypatch):
    net = other(task)
    with monkeypatch.context() as patched:
        patched.setattr(task.Net, "__module__", "__main__")
        patched.setattr(sys.modules["__main__"], "Net", task.Net, raising=False)
        torch.save(net, "whole.pt")
    running = sys.modules["__main__"]
    said = curv("trace", "whole.pt", *PARTS, "--trust")
    assert said.code == 3 and said.err.splitlines()[-1].startswith("Pass --arch SCRIPT.py:Net, too, or ")
    agrees(
        curv("trace", "whole.pt", "--arch", "./task.py:Net", *PARTS, "--trust", "--format", "json"), exact(net, task)
    )
    assert sys.modules["__main__"] is running


def test_all_that_is_missing_is_told_at_once(curv, task):
    torch.save(task.Net().state_dict(), "weights.pt")
    said = curv("trace", "weights.pt")
    assert said.code == 2 and said.err.splitlines() == [
        "curv: weights.pt says nothing about its architecture, loss and data.",
        "Pass --arch, --loss and --data, or --objective ./file.py:NAME that returns a curvature.Objective.",
    ]


# Weights in several files


def sharded(state, folder: Path, kind: str = "safetensors") -> Path:
    """Two files and their index, as Hugging Face and Diffusers write them."""
    folder.mkdir()
    names, places = list(state), {}
    save = save_file if kind == "safetensors" else torch.save
    for part, chosen in enumerate((names[:1], names[1:]), start=1):
        file = f"model-0000{part}-of-00002.{kind}"
        save({name: state[name] for name in chosen}, folder / file)
        places |= dict.fromkeys(chosen, file)
    index = folder / f"model.{kind}.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))
    return index


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_weights_in_several_files(curv, folder, task, kind):
    net = other(task)
    index = sharded(net.state_dict(), folder / "cut", kind)
    for path in ("cut", index):
        agrees(curv("trace", path, "--arch", "./task.py:Net", *PARTS, "--format", "json"), exact(net, task))
        facts = json.loads(curv("inspect", path, "--format", "json").out)
        assert facts["kind"] == "weights in several files" and facts["parameters"] == 26
    (folder / "cut" / f"model-00002-of-00002.{kind}").unlink()
    said = curv("trace", "cut", "--arch", "./task.py:Net", *PARTS)
    assert (
        said.code == 3
        and f"There is no file cut/model-00002-of-00002.{kind}, which {index.name} names.\nDownload" in said.err
    )


def test_a_tensor_that_the_index_promises_and_no_file_has_is_named(folder, task):
    index = sharded(task.Net().state_dict(), folder / "cut")
    held = json.loads(index.read_text())
    held["weight_map"]["third.weight"] = "model-00001-of-00002.safetensors"
    index.write_text(json.dumps(held))
    with pytest.raises(BadFile, match=r"lack 1 of its tensors: third\.weight\."):
        read_module(index, arch=lambda _: task.Net())


# Hugging Face


@pytest.mark.parametrize("how", ["shards", "bin", "bin shards"])
def test_a_folder_however_its_weights_are_written(make, folder, how):
    model = make("GPT2LMHeadModel")
    state = load_file("model/model.safetensors")
    (folder / "model" / "model.safetensors").unlink()
    if how == "bin":
        torch.save(state, "model/pytorch_model.bin")
    else:
        kind = "safetensors" if how == "shards" else "bin"
        sharded(state, folder / "parts", kind)
        for file in (folder / "parts").iterdir():
            stem = "pytorch_model" if file.name.endswith("bin.index.json") else "model"
            file.rename(folder / "model" / file.name.replace("model.", f"{stem}."))
    loaded, notes = read_module("model")
    assert notes == [] and type(loaded) is type(model)
    assert all(torch.equal(t, loaded.state_dict()[name]) for name, t in model.state_dict().items())


def test_the_weights_of_a_folder_fit_another_architecture(curv, folder, task, tokenizer):
    net = other(task)
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text('{"model_type": "mine"}')
    save_file(net.state_dict(), "model/model.safetensors")
    agrees(curv("trace", "model", "--arch", "./task.py:Net", *PARTS, "--format", "json"), exact(net, task))


# Adapters


@pytest.fixture
def adapter(make):
    """A LoRA adapter of a GPT-2, both saved; the model with the adapter in it."""
    peft = pytest.importorskip("peft")
    model = make("GPT2LMHeadModel", "base")
    options = {"r": 2, "target_modules": ["c_attn"], "task_type": "CAUSAL_LM", "fan_in_fan_out": True}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers' own about what peft asks it
        adapted = peft.get_peft_model(model, peft.LoraConfig(**options))
    adapted.peft_config["default"].base_model_name_or_path = "base"
    for p in adapted.parameters():
        if p.requires_grad:
            nn.init.normal_(p, std=0.3)
    adapted.save_pretrained("adapter")
    return adapted


def test_an_adapter_has_its_own_parameters_alone(curv, folder, adapter):
    objective = load_objective("adapter", Task(data="text.txt", block_size=9))
    assert objective.space.size == sum(p.numel() for p in adapter.parameters() if p.requires_grad) == 2 * (8 + 24)
    own = load_objective("base", Task(data="text.txt", block_size=9)).value()
    batches = list(objective.batches)
    losses = [
        F.cross_entropy(adapter(b["input_ids"]).logits.flatten(0, 1), b["labels"].flatten(), reduction="sum")
        for b in batches
    ]
    assert objective.value() == pytest.approx(sum(losses).item() / 99, rel=1e-5)
    assert abs(objective.value() - own) > 1e-3
    (folder / "base").rename(folder / "moved")
    said = curv("trace", "adapter", "--data", "text.txt", "--block-size", 9)
    assert said.code == 3 and "adapter is an adapter of base, which is no Hugging Face folder here." in said.err
    assert "--base FOLDER" in said.err
    said = curv("trace", "adapter", "--base", "moved", "--data", "text.txt", "--block-size", 9, "--format", "quiet")
    assert said.code == 0 and "curv: adapter is a LORA adapter of moved\n" in said.err


def test_inspect_of_an_adapter(curv, adapter):
    facts = json.loads(curv("inspect", "adapter", "--format", "json").out)
    assert facts["kind"] == "a PEFT adapter folder" and facts["parameters"] == 64 and facts["code"] == []
    assert facts["notes"] == ["base model base"]


def test_a_base_is_for_adapters(task):
    torch.save(task.Net().state_dict(), "weights.pt")
    with pytest.raises(Misuse, match=r"--base is for PEFT adapters, but weights\.pt is a torch\.save file of tensors"):
        load_objective("weights.pt", Task(base=Path("base"), arch="./task.py:Net"))


# Distributed checkpoints, programs, quantised models


@pytest.mark.filterwarnings("ignore")
def test_a_distributed_checkpoint_is_gathered_with_trust(curv, folder, task):
    import torch.distributed.checkpoint as dcp

    net = other(task)
    dcp.save({"model": net.state_dict(), "step": 3}, checkpoint_id="dcp", no_dist=True)
    said = curv("trace", "dcp", "--arch", "./task.py:Net", *PARTS)
    assert said.code == 4 and "--trust" in said.err and "dcp_to_torch" in said.err
    agrees(curv("trace", "dcp", "--arch", "./task.py:Net", *PARTS, "--trust", "--format", "json"), exact(net, task))
    said = curv("trace", "dcp", *PARTS, "--trust")
    assert said.code == 3 and "weights without the model they belong to" in said.err
    facts = json.loads(curv("inspect", "dcp", "--format", "json").out)
    assert facts["code"][0] == "pickled metadata" and any("Metadata" in name for name in facts["code"])


def program(task, path: str, size: int) -> nn.Module:
    """A model exported for batches of that size alone."""
    net = other(task)
    with warnings.catch_warnings(), open(path, "wb") as file:
        warnings.simplefilter("ignore")
        torch.export.save(torch.export.export(net, (torch.ones(size, 3),)), file)
    return net


def test_a_program_for_one_batch_size_is_given_that(curv, task):
    net = program(task, "static.pt2", 4)
    objective = cv.Objective.of(net, "cross-entropy", tuple(t[:8] for t in task.data()))
    expected = float(cv.trace(cv.hessian(objective), products=26).value)
    notes = agrees(curv("trace", "static.pt2", *PARTS, "--trust", "--format", "json"), expected)
    assert notes[1] == "curv: static.pt2 was exported for batches of 4: left out the last 2 of 10 examples"
    program(task, "large.pt2", 11)
    said = curv("trace", "large.pt2", *PARTS, "--trust")
    assert said.code == 5 and "was exported for batches of 11, but the data are 10 examples." in said.err


class Tied(nn.Module):
    """A small language model whose head is its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.block = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids):
        return self.head(self.block(self.embedding(ids)))


class Recurrent(nn.Module):
    """Rows through an LSTM."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.lstm, self.head = nn.Embedding(7, 4), nn.LSTM(4, 3, batch_first=True), nn.Linear(3, 7)

    def forward(self, ids):
        return self.head(self.lstm(self.embedding(ids))[0])


class Normed(nn.Module):
    """Batch norm with statistics of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.norm, self.head = nn.Embedding(7, 4), nn.BatchNorm1d(5), nn.Linear(4, 7)
        self.norm.running_mean, self.norm.running_var = torch.randn(5), torch.rand(5) + 0.5

    def forward(self, ids):
        return self.head(self.norm(self.embedding(ids)).tanh())


def language() -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and the next ones: views of one tensor."""
    tokens = torch.randint(7, (6, 6), generator=torch.Generator().manual_seed(0))
    return tokens[:, :-1], tokens[:, 1:]


def by_name(matrix, params):
    """Its rows and columns in the order of the names of the parameters: strict programs have one of their own."""
    sizes = [p.numel() for p in params.values()]
    places = dict(zip(params, torch.arange(sum(sizes)).split(sizes), strict=True))
    order = torch.cat([places[name] for name in sorted(params)])
    return matrix[order][:, order]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("strict", [False, True], ids=["", "strict"])
@pytest.mark.parametrize("dynamic", [False, True], ids=["", "dynamic"])
@pytest.mark.parametrize("make", [Tied, Recurrent, Normed])
def test_a_program_has_the_curvature_of_its_model(curv, make, dynamic, strict):
    torch.manual_seed(7)
    net, (ids, targets) = make().eval().double(), language()
    shapes = ({0: torch.export.Dim.AUTO},) if dynamic else None
    torch.export.save(torch.export.export(net, (ids,), dynamic_shapes=shapes, strict=strict), "program.pt2")
    read = read_module("program.pt2", trust=True)[0]
    mine, its = (cv.Objective.of(module, "cross-entropy", (ids, targets)) for module in (net, read))
    assert its.params.keys() == mine.params.keys()  # tied ones once
    for operator in (cv.hessian, cv.ggn):
        actual, expected = (by_name(operator(o).dense(), o.params) for o in (its, mine))
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)

    np.savez("tokens.npz", x=ids.numpy(), y=targets.numpy())
    said = curv(
        *("trace", "program.pt2", "--loss", "cross-entropy", "--data", "tokens.npz", "--trust"),
        *("--products", mine.space.size, "--format", "json"),
    )
    notes = agrees(said, float(cv.hessian(mine).dense().trace()))
    assert notes == ["curv: ran code of program.pt2, as --trust allows"]


@pytest.mark.parametrize("engine", ["retained", "batched", "recomputed", "linearized", "forward"])
@pytest.mark.parametrize(
    "write", [torch.jit.script, lambda net: torch.jit.trace(net, torch.ones(5, 3))], ids=["script", "trace"]
)
@pytest.mark.filterwarnings("ignore")
def test_every_engine_is_right_about_torchscript(curv, task, write, engine):
    torch.jit.save(write(task.stock()), "model.pt")
    said = curv("trace", "model.pt", *PARTS, "--trust", "--engine", engine, "--format", "json")
    agrees(said, exact(task.stock(), task))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("held", ["module", "state_dict", "scripted"])
def test_quantised_models_are_refused_in_words(curv, task, held):
    net = torch.ao.quantization.quantize_dynamic(task.stock(), {nn.Linear}, dtype=torch.qint8)
    if held == "scripted":
        torch.jit.save(torch.jit.script(net), "q.pt")
    else:
        torch.save(net if held == "module" else net.state_dict(), "q.pt")
    for options in (("--arch", "./task.py:stock"), ("--trust",)):
        said = curv("trace", "q.pt", *PARTS, *options)
        if held == "scripted" and options == ("--arch", "./task.py:stock"):
            assert said.code == 4  # what is in it cannot be known
        else:
            assert said.code in (3, 5) and ("quantised" in said.err or "model they belong to" in said.err), said


# Tables


TABLES = {
    "header": "a,b,c,y\n{rows}",
    "no header": "{rows}",
    "tabs": "a\tb\tc\ty\n{tabs}",
    "semicolons": "a;b;c;y\n{semicolons}",
    "words": "a,b,c,kind\n{words}",
    "first": "y,a,b,c\n{first}",
    "JSON lines": "{json}",
}


@pytest.mark.parametrize("name", TABLES)
def test_a_table_of_numbers_is_data(curv, task, name):
    x, y = task.data()
    rows = [[f"{v:.9g}" for v in row.tolist()] + [str(label)] for row, label in zip(x, y.tolist(), strict=True)]
    text = TABLES[name].format(
        rows="\n".join(map(",".join, rows)),
        tabs="\n".join(map("\t".join, rows)),
        semicolons="\n".join(map(";".join, rows)) + "\n\n",
        words="\n".join(",".join([*row[:3], "cat" if row[3] == "0" else "dog"]) for row in rows),
        first="\n".join(",".join([row[3], *row[:3]]) for row in rows),
        json="\n".join(
            json.dumps(dict(zip("abcy", map(float, row[:3]), strict=False)) | {"y": int(row[3])}) for row in rows
        ),
    )
    Path("train.csv").write_text(text)
    options = ("--target", "y") if name == "first" else ()
    said = curv(
        "trace", "./task.py:stock", "--loss", "cross-entropy", "--data", "train.csv", *options, "--format", "json"
    )
    assert agrees(said, exact(task.stock(), task)) == []


def test_targets_that_are_no_whole_numbers_are_regressed_on(task):
    Path("train.csv").write_text("a,b,y\n1,2,3.5\n4,5,6\n")
    inputs, targets = read_data("train.csv")
    assert inputs.tolist() == [[1, 2], [4, 5]] and targets.tolist() == [[3.5], [6]]


@pytest.mark.parametrize(
    "text, words",
    [
        ("a,y\n1,2\n3\n", r"Line 3 of bad\.csv has 1 cells, not 2\."),
        ("a,a\n1,2\n", r"two columns of one name"),
        ("a,y\nx1,2\n", r"has 'x1' in column a, which is no number\."),
        ("a,y\n,2\n", r"has '' in column a, which is no number\."),
        ("y\n1\n", r"has 1 columns, of which one would be the target"),
        ("a,y\n", r"has a header, a, y, and nothing below it"),
        ('a,y\n"1,2\n', r"is no table: unexpected end of data"),
        ('{"a": 1, "y": 2}\n{"a": 1}\n', r"is no table: line 2 has other keys than the first"),
        ('{"a": 1,\n', r"is no table: "),
    ],
)
def test_a_table_that_is_none_says_where(folder, text, words):
    Path("bad.csv").write_text(text)
    with pytest.raises(BadFile, match=words):
        read_data("bad.csv")


def test_a_column_that_is_not_there_is_misuse(curv, task):
    Path("t.csv").write_text("a,b,c,y\n1,2,3,1\n")
    said = curv("trace", "./task.py:stock", "--loss", "cross-entropy", "--data", "t.csv", "--target", "z")
    assert said.code == 2 and "t.csv has no column 'z', but a, b, c, y." in said.err
    said = curv("trace", "./task.py:stock", *PARTS, "--target", "y")
    assert said.code == 2 and "A target is a column of a table in text, which train.npz is not." in said.err
