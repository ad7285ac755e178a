"""Tensors come out of a file right or not at all, and no code of the file runs unless it is trusted."""

from __future__ import annotations

import argparse
import io
import os
import random
import resource
import struct
import sys
import traceback
import types
import warnings
import zipfile
import zlib
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

from curvature.errors import BadFile, CurvatureError, TooLarge, UnsafeFile
from curvature.io.state_dicts import load_into, state_dict_of
from curvature.io.tensors import non_finite_tensors
from curvature.io.weights import load_trusted, read_tensors, read_trusted


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x):
        return self.layer(x)


def weights():
    return {"layer.weight": torch.randn(64, 64), "layer.bias": torch.randn(64), "steps": torch.tensor(7)}


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def zip_of(path, program, **storages):
    """A torch.save file with this pickle program and these storages."""
    with zipfile.ZipFile(path, "w") as records:
        records.writestr("x/data.pkl", program)
        records.writestr("x/version", b"3")
        for key, content in storages.items():
            records.writestr(f"x/data/{key}", content)


def start_of(whole, member):
    """Where the bytes of a member begin."""
    name_length, extra_length = struct.unpack_from("<2H", whole, member.header_offset + 26)
    return member.header_offset + 30 + name_length + extra_length


SAVERS = {
    "zip": torch.save,
    "legacy": lambda obj, path: torch.save(obj, path, _use_new_zipfile_serialization=False),
    "safetensors": safetensors.torch.save_file,
}


@pytest.mark.parametrize("save", SAVERS.values(), ids=SAVERS)
def test_tensors_come_back_bit_for_bit(tmp_path, save):
    saved = weights() | {"half": torch.randn(3, dtype=torch.bfloat16), "none": torch.zeros(0, 3)}
    save(saved, tmp_path / "w")
    assert same(read_tensors(tmp_path / "w"), saved)


def test_plain_objects_come_back_too(tmp_path):
    saved = {"epoch": 3, "lr": [0.1, None], "name": "a", "w": torch.ones(2), "frozen": {1, 2}}
    torch.save(saved, tmp_path / "c")
    loaded = read_tensors(str(tmp_path / "c"))
    assert torch.equal(loaded.pop("w"), saved.pop("w")) and loaded == saved


def test_a_rezipped_file_is_still_read(tmp_path):
    saved = weights()
    torch.save(saved, tmp_path / "w")
    with (
        zipfile.ZipFile(tmp_path / "w") as old,
        zipfile.ZipFile(tmp_path / "z", "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for name in old.namelist():
            new.writestr(name, old.read(name))
    assert same(read_tensors(tmp_path / "z"), saved)


# Damage


def test_every_flip_in_a_tensor_is_told_with_its_member(tmp_path):
    torch.save(weights(), tmp_path / "w.pt")
    whole = (tmp_path / "w.pt").read_bytes()
    with zipfile.ZipFile(tmp_path / "w.pt") as records:
        member = records.getinfo("w/data/0")
    start = start_of(whole, member)
    draw = random.Random(0)
    for width in (1, 64):
        for _ in range(50):
            offset = start + draw.randrange(member.file_size - width)
            mask = 0xFF if width > 1 else 1 << draw.randrange(8)
            flipped = bytes(byte ^ mask for byte in whole[offset : offset + width])
            (tmp_path / "w.pt").write_bytes(whole[:offset] + flipped + whole[offset + width :])
            with pytest.raises(BadFile, match=r"damaged: its member w/data/0 does not match its checksum"):
                read_tensors(tmp_path / "w.pt")


def test_a_flip_anywhere_never_gives_other_tensors(tmp_path):
    saved = {"w": torch.randn(40), "b": torch.randn(3, dtype=torch.float64)}
    torch.save(saved, tmp_path / "w.pt")
    whole = (tmp_path / "w.pt").read_bytes()
    draw = random.Random(1)
    for _ in range(300):
        offset = draw.randrange(len(whole))
        (tmp_path / "f.pt").write_bytes(
            whole[:offset] + bytes([whole[offset] ^ 1 << draw.randrange(8)]) + whole[offset + 1 :]
        )
        try:
            loaded = read_tensors(tmp_path / "f.pt")
        except CurvatureError:
            continue
        assert same(loaded, saved)  # in padding, which nothing reads


@pytest.mark.parametrize("kind", ["legacy", "safetensors"])
def test_damage_that_can_be_seen_without_checksums_is_told(tmp_path, kind):
    SAVERS[kind]({"w": torch.randn(40), "b": torch.randn(3)}, tmp_path / "w")
    whole = (tmp_path / "w").read_bytes()
    for length in range(1, len(whole)):
        (tmp_path / "cut").write_bytes(whole[:length])
        with pytest.raises(CurvatureError):
            read_tensors(tmp_path / "cut")
    draw = random.Random(2)
    for _ in range(300):
        offset = draw.randrange(len(whole))
        (tmp_path / "f").write_bytes(whole[:offset] + bytes([draw.randrange(256)]) + whole[offset + 1 :])
        try:
            read_tensors(tmp_path / "f")
        except CurvatureError as error:
            assert "weights_only" not in str(error)


@pytest.mark.parametrize(
    "header",
    [
        b'{"w":{"dtype":"F32","shape":[9],"data_offsets":[0,4]}}',
        b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}',
        b'{"w":{"dtype":"Q9","shape":[1],"data_offsets":[0,4]}}',
        b'{"w":',
        b"{} trailing",
    ],
)
def test_a_wrong_safetensors_header_is_told(tmp_path, header):
    (tmp_path / "w").write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    with pytest.raises(BadFile, match=r"is damaged: SafetensorError: .*\. Download or copy it again"):
        read_tensors(tmp_path / "w")


@pytest.fixture
def little_memory():
    """Whoever asks for 64 MiB more than what is in use fails."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20), before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def test_the_memory_limit_of_these_tests_works(little_memory):
    with pytest.raises(MemoryError):
        bytes(1 << 30)  # far more than anything could have freed meanwhile


def test_a_bomb_is_refused_before_it_is_unpacked(tmp_path, little_memory):
    with zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as records:
        records.writestr("x/data.pkl", b"\x80\x02}.")
        with records.open("x/data/0", "w", force_zip64=False) as record:
            for _ in range(1 << 10):
                record.write(bytes(1 << 20))
    with pytest.raises(BadFile, match=r"would unpack from [\d,]+ to 1,073,741,\d+ bytes: .*If you made it"):
        read_tensors(tmp_path / "bomb.pt")


@pytest.fixture
def packed():
    """256 MiB of zeros, deflated without a header."""
    return zlib.compress(bytes(1 << 28), 1)[2:-4]


def test_a_bomb_that_hides_its_size_is_not_unpacked_beyond_it(tmp_path, packed, little_memory):
    told = len(packed) * 50
    zip_of(tmp_path / "b.pt", b"\x80\x02}.", **{"0": packed})
    whole = bytearray((tmp_path / "b.pt").read_bytes())
    local, central = whole.rindex(b"PK\x03\x04"), whole.rindex(b"PK\x01\x02")
    struct.pack_into("<H", whole, local + 8, 8)
    struct.pack_into("<L", whole, local + 22, told)
    struct.pack_into("<H", whole, central + 10, 8)
    struct.pack_into("<L", whole, central + 24, told)
    (tmp_path / "b.pt").write_bytes(whole)
    with pytest.raises(BadFile, match=r"member x/data/0 does not match its checksum"):
        read_tensors(tmp_path / "b.pt")


def test_a_storage_smaller_than_its_pickle_claims_is_told(tmp_path):
    torch.save({"w": torch.zeros(10)}, tmp_path / "w.pt")
    with zipfile.ZipFile(tmp_path / "w.pt") as records:
        program = records.read("w/data.pkl").replace(b"K\nt", b"K\xfft", 1)
    zip_of(tmp_path / "x.pt", program, **{"0": bytes(40)})
    with pytest.raises(BadFile, match=r"x\.pt is damaged: \w+Error: .*\. Download or copy it again"):
        read_tensors(tmp_path / "x.pt")


def test_a_claim_on_more_memory_than_there_is_is_told(tmp_path):
    program = b"\x80\x02cbuiltins\nbytearray\n\x8a\x08" + struct.pack("<q", 2**62) + b"\x85R."
    zip_of(tmp_path / "x.pt", program)
    with pytest.raises(TooLarge, match=r"x\.pt needs more memory than there is\. Use a larger machine"):
        read_tensors(tmp_path / "x.pt")


def test_a_list_within_itself_a_billion_times_is_walked_once(tmp_path):
    nested = [torch.ones(1)]
    for _ in range(60):
        nested = [nested, nested]
    nested.append(nested)
    torch.save(nested, tmp_path / "x.pt")
    assert len(read_tensors(tmp_path / "x.pt")) == 3


# Tensors that are no weights


def quantised():
    return torch._empty_affine_quantized([3], scale=1.0, zero_point=0, dtype=torch.qint8).fill_(1.0)


class Hooked:
    """Pickles as a tensor with a backward hook, which torch.save itself would not write."""

    def __reduce__(self):
        hooks = OrderedDict({0: "not even a function"})
        return torch._utils._rebuild_tensor_v2, (torch.ones(2)._typed_storage(), 0, (2,), (1,), True, hooks)


def with_method(name):
    tensor = nn.Parameter(torch.ones(2))
    setattr(tensor, name, 3)
    return tensor


STRANGE = {
    "stride 0": (
        lambda: torch.zeros(1).expand(1_048_576, 16_384),
        r"has shape \[1048576, 16384\] but 4 bytes are stored\. Save tensor\.clone\(\)",
    ),
    "overlapping": (lambda: torch.arange(9.0).unfold(0, 5, 1), r"has shape \[5, 5\] but 36 bytes are stored"),
    "sparse": (
        lambda: torch.eye(3).to_sparse(),
        r"is sparse \(torch\.sparse_coo\)\. Save tensor\.to_dense\(\)",
    ),
    "quantised": (quantised, r"is quantised and has no derivatives\. Give the float model"),
    "meta": (
        lambda: torch.empty(3, device="meta"),
        r"is a meta tensor, which holds no numbers\. Save the model after",
    ),
    "hooked": (Hooked, r"carries hooks or replaces methods of tensors\. Save tensor\.detach"),
    "method replaced": (lambda: with_method("detach"), r"carries hooks or replaces methods"),
}


@pytest.mark.parametrize("name", STRANGE)
@pytest.mark.parametrize("place", ["layer.weight", "nested"])
def test_tensors_that_are_no_weights_are_refused_by_name(tmp_path, name, place):
    make, message = STRANGE[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tensor = make()
        torch.save({place: tensor} if place != "nested" else {"a": [{"b": (tensor,)}]}, tmp_path / "w.pt")
        where = "layer.weight" if place != "nested" else "a.0.b.0"
        with pytest.raises(BadFile, match=rf"In .*w\.pt, {where} {message}"):
            read_tensors(tmp_path / "w.pt")


def test_a_parameter_with_a_note_on_it_is_read(tmp_path):
    torch.save({"w": with_method("_is_initialised")}, tmp_path / "w.pt")
    assert read_tensors(tmp_path / "w.pt")["w"].tolist() == [1, 1]


# Code


class Payload:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


SYSTEM = f"{os.system.__module__}.system"


@pytest.mark.parametrize("save", [SAVERS["zip"], SAVERS["legacy"]], ids=["zip", "legacy"])
@pytest.mark.parametrize(
    "wrap",
    [
        lambda p: p,
        lambda p: [p],
        lambda p: OrderedDict(w=torch.ones(2), p=p),
        lambda p: {"state_dict": {"w": p}},
        lambda p: {p: 1},
    ],
    ids=["alone", "list", "state_dict", "nested", "key"],
)
def test_a_payload_never_runs(tmp_path, save, wrap):
    save(wrap(Payload(tmp_path / "ran")), tmp_path / "evil.pt")
    with pytest.raises(
        UnsafeFile, match=rf"evil\.pt uses what could run code: {SYSTEM}\. No model needs that"
    ) as caught:
        read_tensors(tmp_path / "evil.pt")
    assert "safetensors" in caught.value.fix and "--" not in caught.value.fix
    assert "weights_only" not in str(caught.value) and caught.value.__cause__ is None
    assert not (tmp_path / "ran").exists()


PROGRAMS = {
    "STACK_GLOBAL": b"\x80\x04\x8c\x02os\x8c\x06system\x93Vtouch %s\n\x85R.",
    "INST": b"(S'touch %s'\nios\nsystem\n.",
    "OBJ": b"(cos\nsystem\nS'touch %s'\no.",
    "computed name": b"\x80\x04\x8c\x02os]\x93.",
    "newline in a name": b"\x80\x04\x8c\x04os\nx\x8c\x06system\x93.",
    "extension": b"\x80\x02\x82\x07.",
    "eval": b'cbuiltins\neval\n(S\'open("%s","w")\'\ntR.',
    "getattr": b"cbuiltins\ngetattr\n(ctorch\nTensor\nX\x05\x00\x00\x00numpytR.",
    "torch.load": b"ctorch.serialization\nload\n(S'%s'\ntR.",
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_hand_written_payload_never_runs(tmp_path, name):
    zip_of(tmp_path / "evil.pt", PROGRAMS[name].replace(b"%s", str(tmp_path / "ran").encode()))
    with pytest.raises(UnsafeFile, match="uses what could run code"):
        read_tensors(tmp_path / "evil.pt")
    assert not (tmp_path / "ran").exists()


def test_names_of_a_hostile_file_are_shown_harmlessly(tmp_path):
    zip_of(tmp_path / "evil.pt", b"ca\x1b[31mb\n" + b"x" * 500 + b"\n.")
    with pytest.raises(UnsafeFile) as caught:
        read_tensors(tmp_path / "evil.pt")
    told = str(caught.value)
    assert "a\\x1b[31mb.xxx" in told and "\x1b" not in told and len(told) < 600


def test_long_lists_of_names_are_cut(tmp_path):
    zip_of(tmp_path / "evil.pt", b"".join(b"cevil\nf%d\n" % n for n in range(1000)) + b".")
    with pytest.raises(UnsafeFile, match=r"run code: evil\.f0, evil\.f1, .*, \.\.\.\. If") as caught:
        read_tensors(tmp_path / "evil.pt")
    assert len(str(caught.value)) < 600


def test_an_environment_variable_cannot_make_it_trust(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    torch.save([Payload(tmp_path / "ran")], tmp_path / "evil.pt")
    with pytest.raises(UnsafeFile):
        read_tensors(tmp_path / "evil.pt")
    assert not (tmp_path / "ran").exists()


def test_allowed_names_let_a_checkpoint_load(tmp_path):
    torch.save({"w": torch.ones(2), "args": argparse.Namespace(lr=0.1)}, tmp_path / "c.pt")
    ways = r"If these are harmless pass --allow-global argparse\.Namespace, or save .* as safetensors; .* pass --trust"
    with pytest.raises(UnsafeFile, match=rf"run code: argparse\.Namespace\. {ways}"):
        read_tensors(tmp_path / "c.pt")
    assert read_tensors(tmp_path / "c.pt", allow=["argparse.Namespace"])["args"].lr == 0.1


def test_what_the_program_allows_stays_allowed(tmp_path):
    torch.save({"args": argparse.Namespace(lr=0.1)}, tmp_path / "c.pt")
    before = set(torch.serialization.get_safe_globals())
    with torch.serialization.safe_globals([argparse.Namespace]):
        for allow in ([], ["argparse.Namespace"]):
            assert read_tensors(tmp_path / "c.pt", allow=allow)["args"].lr == 0.1
            assert argparse.Namespace in torch.serialization.get_safe_globals()
    assert set(torch.serialization.get_safe_globals()) == before


def test_the_message_leads_to_a_numpy_number_step_by_step(tmp_path):
    torch.save({"best": np.float64(0.5)}, tmp_path / "c.pt")
    allowed, steps = [], 0
    while True:
        try:
            loaded = read_tensors(tmp_path / "c.pt", allow=allowed)
            break
        except UnsafeFile as refused:
            allowed += refused.cause.partition("run code: ")[2].rstrip(".").split(", ")
            steps += 1
    assert loaded["best"] == 0.5 and steps == 2  # numpy's dtype class is met only while loading


def test_what_torch_blocks_cannot_be_allowed(tmp_path):
    torch.save([Payload(tmp_path / "ran")], tmp_path / "evil.pt")
    with pytest.raises(UnsafeFile):
        read_tensors(tmp_path / "evil.pt", allow=[SYSTEM])
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["no.such.thing", "torch.nothing", "a b", ""])
def test_an_allowed_name_that_does_not_exist_is_an_argument_error(tmp_path, name):
    torch.save({}, tmp_path / "c.pt")
    with pytest.raises(ValueError, match=r"--allow-global .*cannot be imported: \w+Error: "):
        read_tensors(tmp_path / "c.pt", allow=[name])


def test_another_protocol_is_told(tmp_path):
    torch.save(weights(), tmp_path / "w.pt", pickle_protocol=4)
    with pytest.raises(
        BadFile, match=r"pickle protocol that cannot be read safely\. Save it again with torch\.save and"
    ) as caught:
        read_tensors(tmp_path / "w.pt")
    assert "Re-running" not in "".join(traceback.format_exception(caught.value))  # torch's advice


def test_a_call_of_something_harmless_in_a_harmful_way_is_refused(tmp_path):
    zip_of(tmp_path / "x.pt", b"\x80\x02ccollections\nOrderedDict\n)R)R.")  # calls the dict
    with pytest.raises(UnsafeFile, match=r"does more than a file of tensors needs\. Pass --trust") as caught:
        read_tensors(tmp_path / "x.pt")
    assert "weights_only" not in str(caught.value)


# Kinds that need trust


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    """TorchScript and exported files of the same module, and the module."""
    folder = tmp_path_factory.mktemp("programs")
    torch.manual_seed(0)
    model = Net()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated
        torch.jit.script(model).save(folder / "script.pt")
        torch.export.save(torch.export.export(model, (torch.zeros(5, 3),)), folder / "exported.pt2")
    torch.save(model, folder / "module.pt")
    torch.save({"epoch": 3, "model": model}, folder / "wrapped.pt")
    torch.save(model, folder / "legacy.pt", _use_new_zipfile_serialization=False)
    return folder, model


FILES = ["script.pt", "exported.pt2", "module.pt", "wrapped.pt", "legacy.pt"]


@pytest.mark.parametrize("name", FILES)
def test_code_needs_trust(programs, name):
    with pytest.raises(UnsafeFile, match=r"can run code|could run code") as caught:
        read_tensors(programs[0] / name)
    assert "--trust" in caught.value.fix


@pytest.mark.parametrize("name", FILES)
def test_a_trusted_module_computes_what_the_saved_one_did(programs, name):
    folder, model = programs
    loaded = load_trusted(folder / name)
    x = torch.randn(5, 3)
    assert isinstance(loaded, nn.Module)
    torch.testing.assert_close(loaded(x), model(x))
    assert sum(p.numel() for p in loaded.parameters()) == 8


class Shared(nn.Module):
    """A layer under two names, whose weight is another's, too; and parameters that only lie where it does."""

    def __init__(self):
        super().__init__()
        self.first, self.other = nn.Linear(3, 3), nn.Linear(3, 3)
        self.other.weight, self.again = self.first.weight, self.first
        self.place, self.turned = nn.Parameter(self.first.weight.data), nn.Parameter(self.first.weight.data.T)
        self.unused = nn.Parameter(torch.ones(3))

    def forward(self, x):
        return self.again(self.other(self.first(x))) @ self.place @ self.turned


def test_tied_parameters_of_an_exported_program_are_one_as_they_were(tmp_path):
    model = Shared()
    torch.export.save(torch.export.export(model, (torch.zeros(5, 3),)), tmp_path / "shared.pt2")
    loaded = load_trusted(tmp_path / "shared.pt2")
    assert [name for name, _ in loaded.named_parameters()] == [name for name, _ in model.named_parameters()]
    assert same(loaded.state_dict(), model.state_dict())
    x = torch.randn(5, 3)
    torch.testing.assert_close(loaded(x), model(x))


class Branching(nn.Module):
    """A model whose exported program is right for batches of more than three alone."""

    def forward(self, x):
        return x.cos() if x.shape[0] > 3 else x


@pytest.mark.parametrize("strict", [False, True])
def test_an_example_that_was_a_view_does_not_bind_other_inputs(tmp_path, strict):
    shapes, example = ({0: torch.export.Dim.AUTO},), torch.randn(6, 6)[:, :-1]
    program = torch.export.export(Branching(), (example,), dynamic_shapes=shapes, strict=strict)
    torch.export.save(program, tmp_path / "view.pt2")
    loaded, x = load_trusted(tmp_path / "view.pt2"), torch.randn(4, 5)
    assert torch.equal(loaded(x), x.cos())
    for wrong in (x[:3], x[:, :4]):  # the guards of sizes stay
        with pytest.raises(AssertionError, match="Guard failed"):
            loaded(wrong)


@pytest.mark.parametrize("name", [name for name in FILES if name != "legacy.pt"])
def test_trust_does_not_cover_damage(programs, tmp_path, name):
    whole = bytearray((programs[0] / name).read_bytes())
    with zipfile.ZipFile(programs[0] / name) as records:
        largest = max(records.infolist(), key=lambda info: info.file_size)
    whole[start_of(whole, largest) + 40] ^= 1
    (tmp_path / name).write_bytes(whole)
    with pytest.raises(BadFile, match="damaged"):
        load_trusted(tmp_path / name)


def test_a_planted_pickle_in_an_exported_program_runs_only_with_trust(programs, tmp_path):
    evil = io.BytesIO()
    torch.save(Payload(tmp_path / "ran"), evil)
    with (
        zipfile.ZipFile(programs[0] / "exported.pt2") as old,
        zipfile.ZipFile(tmp_path / "evil.pt2", "w") as new,
    ):
        for name in old.namelist():
            new.writestr(name, evil.getvalue() if "sample_inputs" in name else old.read(name))
    with pytest.raises(
        UnsafeFile,
        match=r"is an exported program \(\.pt2\), which can run code when it is loaded\. Pass --trust",
    ):
        read_tensors(tmp_path / "evil.pt2")
    assert not (tmp_path / "ran").exists()


def test_a_distributed_checkpoint_needs_trust(tmp_path):
    (tmp_path / ".metadata").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    with pytest.raises(
        UnsafeFile, match=r"whose index is a pickle that can run code\. Pass --trust .*dcp_to_torch FOLDER"
    ):
        read_tensors(tmp_path)


def test_a_hugging_face_folder_is_not_one_file(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(BadFile, match=r"not one file of weights\. Give the model\.safetensors in it"):
        read_tensors(tmp_path)


def test_a_trusted_file_of_tensors_holds_no_module(tmp_path):
    torch.save({"w": torch.ones(2), "args": argparse.Namespace(lr=1)}, tmp_path / "w.pt")
    with pytest.raises(BadFile, match=r"w\.pt holds a dict without a module\. .*--arch FILE\.py:NAME"):
        load_trusted(tmp_path / "w.pt")
    assert read_trusted(tmp_path / "w.pt")["args"].lr == 1


def save_as(monkeypatch, module, path):
    """Save a Net whose class lives in a Python module of that name, which then loses it."""
    monkeypatch.setattr(Net, "__module__", module.__name__)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    module.Net = Net
    torch.save(Net(), path)
    del module.Net


def test_a_class_of_the_saving_script_is_told(tmp_path, monkeypatch):
    save_as(monkeypatch, sys.modules["__main__"], tmp_path / "m.pt")
    with pytest.raises(UnsafeFile, match=r"run code: __main__\.Net, torch"):
        read_tensors(tmp_path / "m.pt")
    with pytest.raises(
        BadFile,
        match=r"m\.pt needs the class Net of the script that saved it\. Pass --arch SCRIPT\.py:Net, too, or use torch",
    ):
        load_trusted(tmp_path / "m.pt")


def test_a_class_that_its_module_lost_is_told(tmp_path, monkeypatch):
    save_as(monkeypatch, types.ModuleType("changed"), tmp_path / "m.pt")
    with pytest.raises(BadFile, match=r"needs changed\.Net, which the installed changed lacks\. Install"):
        load_trusted(tmp_path / "m.pt")


def test_a_python_module_that_is_not_here_is_told(tmp_path, monkeypatch):
    save_as(monkeypatch, types.ModuleType("absent_package"), tmp_path / "m.pt")
    monkeypatch.delitem(sys.modules, "absent_package")
    with pytest.raises(BadFile, match=r"needs the Python module absent_package, which .*\. Install it"):
        load_trusted(tmp_path / "m.pt")


class Raises(nn.Module):
    def __setstate__(self, state):
        raise RuntimeError("no GPU here\nand a long story")


def test_code_that_fails_is_told_in_one_line(tmp_path):
    torch.save(Raises(), tmp_path / "m.pt")
    with pytest.raises(
        BadFile, match=r"failed while it was loaded: RuntimeError: no GPU here\. Load it where it was saved"
    ) as caught:
        load_trusted(tmp_path / "m.pt")
    assert "\n" not in str(caught.value)


# State dicts


STATE = {"layer.weight": torch.ones(2, 3), "layer.bias": torch.ones(2)}


@pytest.mark.parametrize(
    "loaded, notes",
    [
        (STATE, []),
        ({"state_dict": STATE}, ["took 'state_dict'"]),
        ({"model": STATE, "epoch": 3, "optimizer": {}}, ["took 'model', left out epoch, optimizer"]),
        ({"model_state_dict": STATE, "loss": 0.1}, ["took 'model_state_dict', left out loss"]),
        ({"model": {"module": STATE}}, ["took 'model'", "took 'module'"]),
        (
            {"pytorch-lightning_version": "2.6", "state_dict": STATE, "hyper_parameters": {}},
            ["took 'state_dict', left out pytorch-lightning_version, hyper_parameters"],
        ),
        (STATE | {"note": "x", "_extra_state": None}, ["left out what is not a tensor: note, _extra_state"]),
        (
            {f"module._orig_mod.{name}": tensor for name, tensor in STATE.items()},
            [
                "stripped '_orig_mod.' (torch.compile) from names",
                "stripped 'module.' (DistributedDataParallel) from names",
            ],
        ),
        (
            {name.replace("layer", "layer._orig_mod"): tensor for name, tensor in STATE.items()},
            ["stripped '_orig_mod.' (torch.compile) from names"],
        ),
    ],
)
def test_state_dicts_are_found_in_their_wrappings(loaded, notes):
    found, told = state_dict_of(loaded)
    assert same(found, STATE) and told == notes


def test_a_wrapping_of_itself_ends():
    endless = {}
    endless["model"] = endless
    with pytest.raises(BadFile, match="holds no tensors by name, only model"):
        state_dict_of(endless)


def test_state_dicts_that_are_several_are_told():
    networks = {"generator": {"weight": torch.ones(1)}, "critic": {"weight": torch.ones(2)}, "epoch": 3}
    with pytest.raises(BadFile, match=r"holds tensors in 2 places: generator, critic\. Save the state_dict of the one"):
        state_dict_of(networks)


def test_names_that_only_look_wrapped_are_kept():
    loaded = {"module.weight": torch.ones(1), "other.weight": torch.ones(1), "model": torch.ones(1)}
    assert state_dict_of(loaded) == (loaded, [])


@pytest.mark.parametrize(
    "loaded, held",
    [
        ({"epoch": 3, "lr": 0.1}, r"epoch, lr"),
        ({}, "an empty dict"),
        ([torch.ones(1)], "a list"),
        (torch.ones(1), "a Tensor"),
        ({"model": {}}, "an empty dict"),
    ],
)
def test_what_holds_no_state_dict_is_told(loaded, held):
    with pytest.raises(BadFile, match=rf"holds no tensors by name, only {held}\. To save the weights of a model use"):
        state_dict_of(loaded)


def test_non_finite_tensors_are_named():
    inf, nan = torch.tensor([1.0, float("inf")]), torch.tensor([float("nan")])
    state = {
        "good": torch.ones(2),
        "inf": inf,
        "count": torch.tensor(3),
        "nan": nan.bfloat16(),
        "complex": 1j * inf,
    }
    state |= {
        "tiny": nan.to(torch.float8_e4m3fn),
        "fine": torch.ones(1).to(torch.float8_e5m2),
        "none": torch.ones(0),
    }
    assert non_finite_tensors(state) == ["inf", "nan", "complex", "tiny"]


def test_loading_copies_every_tensor():
    module, state = Net(), {"layer.weight": torch.randn(2, 3), "layer.bias": torch.randn(2)}
    load_into(module, state)
    assert same(module.state_dict(), state)
    assert module.layer.weight.data_ptr() != state["layer.weight"].data_ptr()


def test_a_meta_module_takes_the_tensors_themselves():
    module = Net().to("meta")
    state = {"layer.weight": torch.randn(2, 3, dtype=torch.float64), "layer.bias": torch.randn(2)}
    load_into(module, state)
    assert module.layer.weight.data_ptr() == state["layer.weight"].data_ptr()


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(3, 2), nn.Linear(2, 3, bias=False)
        self.head.weight = self.embedding.weight


@pytest.mark.parametrize("name", ["embedding.weight", "head.weight"])
def test_one_of_tied_names_is_enough(name):
    module, weight = Tied(), torch.randn(3, 2)
    load_into(module, {name: weight})
    assert torch.equal(module.head.weight, weight) and module.head.weight is module.embedding.weight


class Stateful(nn.Linear):
    def get_extra_state(self):
        return {"step": 3}

    def set_extra_state(self, state):
        self.step = state


def test_extra_state_is_asked_for_by_name():
    with pytest.raises(BadFile, match=r"1 missing: _extra_state\."):
        load_into(Stateful(1, 1), {"weight": torch.ones(1, 1), "bias": torch.ones(1)})


def test_a_lazy_module_takes_its_shapes_from_the_file():
    module = nn.LazyLinear(2)
    load_into(module, {"weight": torch.ones(2, 5), "bias": torch.ones(2)})
    assert module.weight.shape == (2, 5)


@pytest.mark.parametrize(
    "dropped, added, message",
    [
        ("bias", {}, r"1 missing: layer\.bias\."),
        (
            "",
            dict.fromkeys("abcd", torch.ones(1)),
            r"4 unexpected: a, b, c, \.\.\.\. Check that --arch builds",
        ),
        (
            "",
            {"layer.weight": torch.ones(3, 2)},
            r"1 different: layer\.weight \(file \[3, 2\], model \[2, 3\]\)\.",
        ),
        (
            "",
            {"layer.weight": torch.ones(2, 3) * 1j},
            r"weight \(file torch\.complex64, model torch\.float32\)",
        ),
        ("", {"layer.bias": torch.ones(2).long()}, r"bias \(file torch\.int64, model torch\.float32\)"),
        ("bias", {"x\x1b": torch.ones(1)}, r"do not fit Net: 1 missing: layer\.bias; 1 unexpected: x\\x1b\."),
    ],
)
def test_a_mismatch_is_told_before_anything_changed(dropped, added, message):
    module = Net()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    state = {"layer.weight": torch.zeros(2, 3), "layer.bias": torch.zeros(2)} | added
    if dropped:
        del state[f"layer.{dropped}"]
    with pytest.raises(BadFile, match=message):
        load_into(module, state)
    assert same(module.state_dict(), before)


def global_state():
    return (
        torch.get_num_threads(),
        torch.get_default_dtype(),
        torch.is_grad_enabled(),
        torch.get_rng_state().tolist(),
        set(torch.serialization.get_safe_globals()),
    )


def test_reading_changes_no_global_setting(tmp_path):
    torch.save(weights(), tmp_path / "w.pt")
    before = global_state()
    read_tensors(tmp_path / "w.pt")
    assert global_state() == before
