"""The optimizers in other people's loops, as the README shows it: Hugging Face's Trainer, and Lightning.

With schedulers, gradients that are accumulated and clipped, and a run that goes on from a checkpoint bit for bit.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import curvature as cv

pytestmark = [
    pytest.mark.slow,  # the imports alone take seconds
    pytest.mark.filterwarnings("default"),  # of other people's packages
]
README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
RULES = ("SOAP", "Muon", "PSGD", "MFAC", "KFAC", "EGN", "SophiaG", "AdaHessian", "NewtonCG")
ALONE = ("SOAP", "Muon", "PSGD", "MFAC")  # that take gradients alone
STEPS, SAVED = 8, 4


def readme(library: str, rule: str, scope: dict[str, Any]) -> dict[str, Any]:
    """What the README's example for a library defines, with another rule in the place of its own."""
    (block,) = re.findall(rf"```python\n(import {library}\n.*?)```", README, re.DOTALL)
    lines = [line for line in block.splitlines() if rule not in ALONE or "observe" not in line]
    scope |= {"cv": cv, "torch": torch}
    exec("\n".join(lines).replace("cv.optim.KFAC", f"cv.optim.{rule}"), scope)
    return scope


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


class TestTransformers:
    @pytest.fixture
    def scope(self, tmp_path) -> dict[str, Any]:
        pytest.importorskip("accelerate")
        transformers = pytest.importorskip("transformers")
        transformers.utils.logging.disable_progress_bar()
        return {
            "model": self.model(),
            "dataset": self.dataset(),
            "args": transformers.TrainingArguments(
                output_dir=str(tmp_path),
                per_device_train_batch_size=8,
                gradient_accumulation_steps=2,
                max_grad_norm=1.0,
                lr_scheduler_type="cosine",
                warmup_steps=2,
                max_steps=STEPS,
                save_steps=SAVED,
                logging_steps=1,
                report_to=[],
                use_cpu=True,
                disable_tqdm=True,
            ),
        }

    def model(self) -> Any:
        from transformers import BertConfig, BertForSequenceClassification

        torch.manual_seed(0)
        sizes = dict(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
        return BertForSequenceClassification(BertConfig(**sizes, max_position_embeddings=16, num_labels=3))

    def dataset(self) -> list[dict[str, Any]]:
        tokens = torch.randint(0, 50, (64, 6), generator=torch.Generator().manual_seed(0))
        return [{"input_ids": x, "labels": x.sum() % 3} for x in tokens]

    @pytest.mark.parametrize("rule", RULES)
    def test_a_run_goes_on_from_a_checkpoint_bit_for_bit(self, rule, scope, tmp_path):
        start = self.model()
        scope = readme("transformers", rule, scope)
        rates = [entry["learning_rate"] for entry in scope["trainer"].state.log_history if "learning_rate" in entry]
        assert len(rates) == STEPS and rates[0] == 0 and max(rates) == scope["optimizer"].defaults["lr"]
        assert not same(scope["model"], start)
        model = self.model()
        optimizer = type(scope["optimizer"])(model.named_parameters(), lr=1e-3)
        scope["optimizer"] = optimizer  # which the class of the README looks up
        trainer = scope["Trainer"](model, scope["args"], train_dataset=scope["dataset"], optimizers=(optimizer, None))
        trainer.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{SAVED}"))
        assert optimizer.param_groups[0]["taken"] == STEPS
        assert same(model, scope["model"])

    def test_it_may_make_the_optimizer_of_a_class(self, scope):
        """Then there are groups without names: two, one without weight decay."""
        from transformers import Trainer

        kind = (cv.optim.SOAP, {"lr": 1e-3})
        trainer = Trainer(scope["model"], scope["args"], train_dataset=scope["dataset"], optimizer_cls_and_kwargs=kind)
        trainer.train()
        assert [group["taken"] for group in trainer.optimizer.param_groups] == [STEPS, STEPS]
        assert not same(scope["model"], self.model())

    def test_a_language_model_has_the_loss_that_it_returns(self, scope):
        """It shifts labels itself, so that its objective is a scalar: enough for rules that ask for the Hessian."""
        from transformers import GPT2Config, GPT2LMHeadModel, Trainer

        torch.manual_seed(0)
        model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=8, n_embd=16, n_layer=1, n_head=2))
        optimizer = cv.optim.SophiaH(model.named_parameters(), lr=1e-3)

        class LanguageTrainer(Trainer):
            def training_step(self, model, inputs, *rest):
                optimizer.observe(cv.Objective.from_loss(model, lambda model, batch: model(**batch).loss, [inputs]))
                return super().training_step(model, inputs, *rest)

        tokens = [row["input_ids"] for row in scope["dataset"]]
        rows = [{"input_ids": x, "labels": x} for x in tokens]
        before = [p.detach().clone() for p in model.parameters()]
        LanguageTrainer(model, scope["args"], train_dataset=rows, optimizers=(optimizer, None)).train()
        moved = [(p - q).abs().max() for p, q in zip(model.parameters(), before, strict=True)]
        assert all(0 < m <= STEPS * 1e-3 * 1.01 for m in moved)  # an entry moves by lr at most, and decays a bit

    def test_a_rule_that_was_shown_nothing_says_so(self, scope):
        from transformers import Trainer

        optimizer = cv.optim.SophiaG(scope["model"].named_parameters(), lr=1e-3)
        trainer = Trainer(scope["model"], scope["args"], train_dataset=scope["dataset"], optimizers=(optimizer, None))
        with pytest.raises(cv.NeedsEvidence, match=r"SophiaG needs the mini-batch .* observe\(...\) before step"):
            trainer.train()


class TestLightning:
    @pytest.fixture(autouse=True)
    def quiet(self):
        pytest.importorskip("lightning")
        logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

    def fitted(self, rule: str, folder: Path, epochs: int, checkpoint: Path | None = None) -> tuple[Any, Any]:
        """The model of the README after so many epochs of four steps each, and its trainer."""
        from lightning import Trainer

        kind = readme("lightning", rule, {})["Classifier"]

        class Scheduled(kind):
            def configure_optimizers(self):
                optimizer = super().configure_optimizers()
                rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=STEPS)
                return {"optimizer": optimizer, "lr_scheduler": {"scheduler": rates, "interval": "step"}}

        torch.manual_seed(0)
        model = Scheduled(nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)))
        x = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
        data = torch.utils.data.TensorDataset(x, (x.sum(1) > 0).long())
        trainer = Trainer(
            max_epochs=epochs,
            accumulate_grad_batches=2,
            gradient_clip_val=1.0,
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
            default_root_dir=folder,
        )
        loader = torch.utils.data.DataLoader(data, 8)
        trainer.fit(model, loader, ckpt_path=checkpoint, weights_only=True)
        return model, trainer

    @pytest.mark.parametrize("rule", RULES)
    def test_a_run_goes_on_from_a_checkpoint_bit_for_bit(self, rule, tmp_path):
        whole, _ = self.fitted(rule, tmp_path, 2)
        first, trainer = self.fitted(rule, tmp_path, 1)
        trainer.save_checkpoint(tmp_path / "first.ckpt")
        assert not same(first, whole)
        again, trainer = self.fitted(rule, tmp_path, 2, tmp_path / "first.ckpt")
        assert trainer.optimizers[0].param_groups[0]["taken"] == STEPS
        assert same(again, whole)

    @pytest.mark.parametrize("rule", ("SOAP", "KFAC"))
    def test_the_wrapper_shows_the_same_matrix(self, rule, tmp_path):
        model, trainer = self.fitted(rule, tmp_path, 1)
        assert torch.equal(model.optimizers().operator().dense(), trainer.optimizers[0].operator().dense())
        assert str(model.optimizers().routing) == str(trainer.optimizers[0].routing)
