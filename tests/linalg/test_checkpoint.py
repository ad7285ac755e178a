"""Work that was stopped at any moment and started again: the same bits as if it had never stopped."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from matrices import Stopping, free, linspace, rotated

import curvature as cv
from curvature.linalg.measurement import Measurement

N = 60
MATRIX = rotated(torch.cat([linspace(-1, 2, N - 2), torch.tensor([5.0, 9.0], dtype=torch.float64)]))
COPIES = rotated(torch.cat([linspace(-1, 2, N - 9), torch.full((9,), 5.0, dtype=torch.float64)]))
BLOCKS = {"a": slice(0, 20), "b": torch.arange(20, N)}
QUESTIONS = {
    "density": lambda A, run: cv.spectral_density(A, probes=3, steps=10, run=run),
    "eigsh": lambda A, run: cv.eigsh(A, 5, which="smallest", rtol=1e-10, run=run),
    "eigsh of many copies": lambda A, run: cv.eigsh(A, 12, block=1, run=run),
    "krylov": lambda A, run: cv.trace(A, run=run),
    "adaptive": lambda A, run: cv.trace(A, atol=1.0, run=run),
    "hutchinson": lambda A, run: cv.trace(A, method="hutchinson", products=50, run=run),
    "hutch++": lambda A, run: cv.trace(A, method="hutch++", products=50, run=run),
    "xtrace": lambda A, run: cv.trace(A, method="xtrace", products=50, run=run),
    "sum": lambda A, run: cv.trace(A, products=N, run=run),
    "diagonal": lambda A, run: cv.diagonal(A, run=run),
    "diagonal, hutchinson": lambda A, run: cv.diagonal(A, method="hutchinson", products=59, run=run),
    "moments": lambda A, run: cv.spectral_moments(A, products=50, run=run),
    "log-determinant": lambda A, run: cv.logdet(A, damping=3.0, products=59, run=run),
    "block traces": lambda A, run: cv.block_traces(A, BLOCKS, method="hutchinson", products=40, run=run),
}


class Killed(BaseException):
    """What nothing in the library catches."""


def killed_after(products: int, matrix: torch.Tensor) -> cv.MatrixFree:
    left = products

    def product(rows):
        nonlocal left
        left -= 1
        if left < 0:
            raise Killed
        return rows @ matrix

    return cv.MatrixFree(product, cv.Space(N, torch.float64), symmetric=True)


def bits(result: cv.Result) -> dict[str, bytes]:
    return {name: tensor.contiguous().numpy().tobytes() for name, tensor in result.arrays().items()}


@pytest.mark.parametrize("name", QUESTIONS)
def test_a_question_that_was_killed_at_every_product_gives_the_same_bits(name, tmp_path):
    question, run = QUESTIONS[name], cv.Run(checkpoint=tmp_path / "checkpoint")
    matrix = COPIES if "copies" in name else MATRIX
    whole = question(free(matrix), cv.Run())
    for _ in range(200):
        try:
            result = question(killed_after(2, matrix), run)  # one of them is spent on the first product, again
        except Killed:
            continue
        break
    assert bits(result) == bits(whole)
    assert result.cost.products == whole.cost.products
    again = question(killed_after(1, matrix), run)  # all is there
    assert bits(again) == bits(whole)


@pytest.mark.parametrize("name", ["density", "eigsh", "adaptive", "xtrace"])
def test_an_interrupt_leaves_a_checkpoint_to_go_on_from(name, tmp_path):
    question, path = QUESTIONS[name], tmp_path / "checkpoint"
    with pytest.raises(KeyboardInterrupt):
        question(free(MATRIX), cv.Run(progress=Stopping(1), checkpoint=path))
    assert bits(question(free(MATRIX), cv.Run(checkpoint=path))) == bits(question(free(MATRIX), cv.Run()))


def test_the_cost_is_that_of_all_processes(tmp_path):
    def slow(rows):
        time.sleep(0.05)
        return rows @ MATRIX

    A, run = cv.MatrixFree(slow, cv.Space(N, torch.float64), symmetric=True), cv.Run(checkpoint=tmp_path / "c")
    first = cv.spectral_density(A, probes=2, steps=6, run=run).cost
    second = cv.spectral_density(A, probes=2, steps=6, run=run).cost
    assert first.products == second.products == 12 and 0.3 <= first.seconds <= second.seconds + 0.2


def test_the_checkpoint_of_restarted_eigenpairs_does_not_grow_without_end(tmp_path):
    run = cv.Run(checkpoint=tmp_path / "c")
    A = free(rotated(linspace(1, 2, 400)))
    pairs = cv.eigsh(A, 3, which="smallest", rtol=1e-8, run=run)
    assert pairs.cost.products > 200
    assert (tmp_path / "c").stat().st_size < 120 * 400 * 8


def test_a_checkpoint_of_other_options_or_another_matrix_is_refused(tmp_path):
    run = cv.Run(checkpoint=tmp_path / "c")
    cv.trace(free(MATRIX), products=20, run=run)
    before = (tmp_path / "c").read_bytes()
    with pytest.raises(cv.BadFile, match=r"its options\.products is 20, not 21"):
        cv.trace(free(MATRIX), products=21, run=run)
    with pytest.raises(cv.BadFile, match='its question is "trace", not "diagonal"'):
        cv.diagonal(free(MATRIX), products=20, run=run)
    with pytest.raises(cv.BadFile, match="are not those of <symmetric MatrixFree"):
        cv.trace(free(MATRIX + 0.1), products=20, run=run)
    assert (tmp_path / "c").read_bytes() == before


def test_what_a_kept_state_was_made_of_is_told_apart(tmp_path):
    A, twice = free(MATRIX), free(2 * MATRIX)
    for name, ask in {
        "diagonal": lambda A, run: cv.diagonal(A, method="hutchinson", products=59, run=run),
        "eigsh": lambda A, run: cv.eigsh(A, 5, which="smallest", rtol=1e-10, run=run),
        "functional": lambda A, run: cv.trace_of(torch.exp, A, products=59, run=run),
    }.items():
        run = cv.Run(checkpoint=tmp_path / name)
        ask(A, run)
        with pytest.raises(cv.BadFile, match="are not those of"):
            ask(twice, run)
    with pytest.raises(cv.BadFile, match=r"its options\.function is"):
        cv.trace_of(torch.cos, A, products=59, run=cv.Run(checkpoint=tmp_path / "functional"))
    run = cv.Run(checkpoint=tmp_path / "blocks")
    cv.block_traces(A, BLOCKS, products=20, run=run)
    with pytest.raises(cv.BadFile, match=r"its options\.blocks\.a is"):
        cv.block_traces(A, {"a": BLOCKS["b"], "b": BLOCKS["a"]}, products=20, run=run)


def test_products_with_other_vectors_are_not_taken(tmp_path):
    """As of a question whose name does not tell its options."""
    run = cv.Run(checkpoint=tmp_path / "c")
    first, second = (Measurement(free(MATRIX), "test", options={}, run=run) for _ in range(2))
    first.apply(torch.eye(N, dtype=torch.float64)[:2])
    first.apply(torch.eye(N, dtype=torch.float64)[2:4])
    second.apply(torch.eye(N, dtype=torch.float64)[:2])
    with pytest.raises(cv.BadFile, match="are with other vectors than asked"):
        second.apply(torch.full((2, N), 0.5, dtype=torch.float64))


WORK = """
import sys, time, torch
import curvature as cv
sys.path.insert(0, {tests!r})
from matrices import linspace, rotated
torch.set_num_threads(1)
matrix = rotated(torch.cat([linspace(-1, 2, 298), torch.tensor([5.0, 9.0], dtype=torch.float64)]))
def product(rows):
    time.sleep({pause})
    return rows @ matrix
A = cv.MatrixFree(product, cv.Space(300, torch.float64), symmetric=True)
run = cv.Run(checkpoint={path!r})
result = {question}
result.save({out!r})
"""
LONG = {
    "density": "cv.spectral_density(A, probes=4, steps=40, run=run)",
    "eigsh": "cv.eigsh(A, 5, which='smallest', rtol=1e-6, run=run)",
}


def killed_often(name: str, times: int, folder: Path, seed: int) -> int:
    """Runs the question, killing it at random moments; returns how often that came before its end."""
    places = {"tests": str(Path(__file__).parents[1]), "path": str(folder / "c"), "question": LONG[name]}
    chance, done = random.Random(seed), 0
    for _ in range(times):
        # a pause so that all takes about as long as the kills do
        code = WORK.format(**places, out=str(folder / "resumed"), pause=0.02)
        process = subprocess.Popen([sys.executable, "-c", code])
        try:
            process.wait(chance.uniform(0.5, 3.5))
        except subprocess.TimeoutExpired:
            process.kill()
            done += 1
        process.wait()
        leftovers = {path.name for path in folder.iterdir()} - {"c", "resumed", "whole"}
        assert all(name.startswith(".tmp-") for name in leftovers)
    subprocess.run([sys.executable, "-c", WORK.format(**places, out=str(folder / "resumed"), pause=0)], check=True)
    places["path"] = str(folder / "another")
    subprocess.run([sys.executable, "-c", WORK.format(**places, out=str(folder / "whole"), pause=0)], check=True)
    names = [folder / which / "arrays.safetensors" for which in ("resumed", "whole")]
    assert names[0].read_bytes() == names[1].read_bytes()
    return done


@pytest.mark.parametrize("name", LONG)
def test_killed_at_random_moments_gives_the_same_bits(name, tmp_path):
    assert killed_often(name, 3, tmp_path, seed=1) >= 1


@pytest.mark.slow
@pytest.mark.parametrize("name", LONG)
def test_killed_thirty_times_gives_the_same_bits(name, tmp_path):
    assert killed_often(name, 30, tmp_path, seed=2) >= 15
