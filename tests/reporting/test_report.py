"""Reports: their answers are those of the questions asked one by one, and the page is safe and stands by itself."""

from __future__ import annotations

from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from objectives import zoo
from pages import Page

import curvature as cv
from curvature.reporting.report import QUESTIONS

CASE = next(case for case in zoo() if case.name == "classifier")
SMALL: Any = {"k": 3, "probes": 2, "steps": 8, "products": 8, "points": 3}
CHEAP = tuple(name for name in QUESTIONS if name != "sharpness")


@pytest.fixture(scope="module")
def whole() -> cv.Report:
    return cv.report(CASE.objective((4, 5)), questions=CHEAP, **SMALL)


def test_the_answers_are_those_of_each_question(whole):
    objective = CASE.objective((4, 5))
    H = cv.hessian(objective)
    pairs = cv.eigsh(H, 3, rtol=1e-3)
    assert whole.names == CHEAP and whole.left_out == () and whole.loss == float(objective.value())
    assert torch.equal(whole["spectrum"].nodes, cv.spectral_density(H, probes=2, steps=8).nodes)
    assert torch.equal(whole["eigenvalues"].values, pairs.values)
    assert torch.equal(whole["gradient"].value, cv.gradient_share(objective, pairs).value)
    assert torch.equal(whole["rates"].value, cv.stable_learning_rates(objective).value)
    assert torch.equal(whole["traces"]["0"].value, cv.by_layer(cv.trace, H, products=8)["0"].value)
    assert float(whole["layers"]["0"].values) == float(cv.by_layer(cv.eigsh, H, k=1, rtol=1e-3, block=1)["0"].values)
    ends = cv.eigsh(H, 2, which="both", rtol=1e-3, block=1)
    assert torch.equal(whole["landscape"].loss, cv.plane(objective, ends, points=3).loss)
    assert whole.quantities()["eigenvalues.lambda_max"].value == float(pairs.values[0])


def test_what_is_found_once_is_counted_once(whole):
    pairs, landscape = whole["eigenvalues"].cost.products, whole["landscape"].cost.products
    alone = cv.report(CASE.objective((4, 5)), questions=("gradient",), **SMALL)
    assert pairs == alone["gradient"].cost.products > 0 and whole["gradient"].cost.products == 0
    assert landscape > 0 and alone["gradient"].cost.passes > whole["gradient"].cost.passes
    assert whole.cost.products == sum(result.cost.products for result in whole.results)


def test_a_page_is_well_formed_and_loads_nothing(whole):
    page = Page(whole.page(made_by="curv report model.pt --out run"))
    assert "script" not in page.tags and "default-src 'none'" in page.policy
    assert all(link.startswith("#") for link in page.links)
    assert len(set(page.ids)) == len(page.ids)
    assert {link[1:] for link in page.links} <= set(page.ids)
    assert page.tags.count("section") == len(CHEAP) + 1
    assert page.tags.count("svg") == len(CHEAP) - 1  # of health there is no picture
    assert "curv report model.pt --out run" in whole.page(made_by="curv report model.pt --out run")


def test_the_same_report_makes_the_same_page(whole):
    assert whole.page() == whole.page()


def test_pictures_are_drawn_as_xml(whole):
    page = whole.page()
    for piece in page.split("<svg")[1:]:
        ElementTree.fromstring("<svg" + piece[: piece.index("</svg>") + 6])


def test_a_saved_report_comes_back_with_its_page(whole, tmp_path):
    again = cv.Report.load(whole.save(tmp_path / "run"))
    assert again.names == whole.names and torch.equal(again["landscape"].loss, whole["landscape"].loss)
    assert again.page() == whole.save_page(tmp_path / "report.html").read_text()


def test_names_of_layers_are_text_and_no_markup():
    class Hostile(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.add_module("<script>alert(1)</script>", torch.nn.Linear(4, 3).double())

        def forward(self, x):
            return next(iter(self.children()))(x)

    Hostile.__name__ = "<img src=x onerror=alert(1)>\x1b[31m"
    objective = cv.Objective.of(Hostile(), "cross-entropy", (CASE.inputs, CASE.targets))
    page = Page(text := cv.report(objective, questions=("layers", "traces"), **SMALL).page())
    assert "script" not in page.tags and "img" not in page.tags and "\x1b" not in text


def test_what_has_no_answer_is_left_out_with_the_reason(monkeypatch):
    def fails(setting, run):
        raise cv.NotConverged("It went on and on.")

    monkeypatch.setitem(QUESTIONS, "rates", fails)
    found = cv.report(CASE.objective(), questions=("rates", "eigenvalues"), **SMALL)
    assert found.names == ("eigenvalues",) and found.left_out == ("rates: It went on and on.",)
    assert "It went on and on" in found.page() and "It went on and on" in found.summary()["left out"]


def test_what_cannot_be_analysed_is_refused_at_once():
    with pytest.raises(cv.NonFinite):
        cv.report(CASE.objective().at(CASE.flat * torch.nan), **SMALL)


def test_what_the_doctor_warns_of_is_on_top():
    net = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.BatchNorm1d(5), torch.nn.Linear(5, 3)).double()
    objective = cv.Objective.of(net, "cross-entropy", (CASE.inputs, CASE.targets), mode="train")
    found = cv.report(objective, questions=("health",), **SMALL)
    (warning, *_) = found["health"].warnings
    top = found.page().partition("<section")[0]
    assert "class='warn'" in top and warning.name in top


def test_an_interrupt_keeps_what_there_is():
    def stop(progress: cv.Progress) -> None:
        if progress.note.startswith("traces"):
            raise KeyboardInterrupt

    with pytest.raises(cv.Interrupted) as caught:
        cv.report(CASE.objective(), questions=("eigenvalues", "traces"), run=cv.Run(progress=stop), **SMALL)
    found = caught.value.result
    assert not found.complete and "eigenvalues" in found.names and "Interrupted" in found.page()


@pytest.mark.parametrize("question", ["gradient", "landscape"])
def test_eigenpairs_on_the_way_are_no_answer(question, tmp_path):
    def stop(progress: cv.Progress) -> None:
        raise KeyboardInterrupt

    run = cv.Run(progress=stop, checkpoint=tmp_path / "kept")
    with pytest.raises(cv.Interrupted) as caught:
        cv.report(CASE.objective(), questions=(question,), run=run, **SMALL)
    assert caught.value.result.names == () and (tmp_path / f"kept.{question}.pairs").exists()
    again = cv.report(CASE.objective(), questions=(question,), run=cv.Run(checkpoint=tmp_path / "kept"), **SMALL)
    once = cv.report(CASE.objective(), questions=(question,), **SMALL)
    assert again.quantities() == once.quantities() and again.cost.products == once.cost.products


def test_a_checkpoint_gives_the_same_bits(whole, tmp_path):
    objective = CASE.objective((4, 5))
    for _ in range(2):
        run = cv.Run(checkpoint=tmp_path / "kept")
        found = cv.report(objective, questions=("spectrum", "landscape"), run=run, **SMALL)
        assert torch.equal(found["spectrum"].nodes, whole["spectrum"].nodes)
        assert torch.equal(found["landscape"].loss, whole["landscape"].loss)
    assert (tmp_path / "kept.spectrum").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [({"questions": ("spektrum",)}, "but got spektrum"), ({"points": 4}, "odd"), ({"k": 0}, "positive")],
)
def test_what_makes_no_sense_is_refused(options, words):
    with pytest.raises(ValueError, match=words):
        cv.report(CASE.objective(), **options)
