"""What other libraries, and code without one, need for the answers of `solves.py`: its questions about them.

curvlinops  its conjugate gradients and Neumann series, for one and several right-hand sides, and its inverse of
            K-FAC, against ours of the same matrix. For the first, each library gets the loosest of a few tolerances
            after which all residuals, in float64, are small enough. Making the operator is in the time. `difference`
            is that from our answer: on few data in float64 it says whether both mean the same. Its CG makes no step
            where p.A p < 1e-10, for |b| = 1, which comes before small residuals do: here it gets eps=1e-30
egn         the direction (G + damping I)^-1 g of a batch from `egn`, with as much memory as there is or little, and
            from the whole Jacobian, in processes of their own: `MiB` beyond what a gradient left,
                which like the check of the objective has been before
influence   the scores of all training digits for held-out ones, and Spearman's correlation, in the mean over these,
            with the scores by CG and the GGN, and by MINRES and the Hessian, with one damping for all. CG and the
            sketch of pyDVL are for the Hessian; what it calls Gauss-Newton is the empirical Fisher matrix
"""

from __future__ import annotations

import copy
import json
import math
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
import torch.nn.functional as F
from measure import Clock, peak_since
from operators import failure
from problems import Batch, Loader, Problem, problem_of
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap

import curvature as cv
from curvature.assets import data
from curvature.assets.make import TRAINING_DIGITS

CPU = torch.device("cpu")
SHARE = 1e-3  # damping of the systems, over the largest eigenvalue
TOLERANCES = (1.0, 0.5, 0.25, 0.125)  # times the residual that is wanted
TERMS = 50  # of a Neumann series
DAMPING = 0.1  # of directions
DAMPED = 1e-2  # of influence, over the largest eigenvalue: the Hessian is positive definite with it
RANK = 64  # of pyDVL's sketch
LITTLE = 32 << 20  # bytes
Rows = list[dict[str, Any]]


def timed(call: Callable[[], Any]) -> tuple[Any, float]:
    """What a call returns, and its seconds."""
    answers: list[Any] = []
    seconds = Clock(CPU).once(lambda: answers.append(call()))[0]
    return answers[0], seconds


def interleaved(contenders: dict[str, Callable[[], Any]], rounds: int) -> dict[str, tuple[Any, list[float]]]:
    """What each returns, and its seconds in every round, in random order; in place of an answer what it fails with."""
    found: dict[str, tuple[Any, list[float]]] = {name: (None, []) for name in contenders}
    for seed in range(rounds):
        order = list(contenders)
        random.Random(seed).shuffle(order)
        for name in order:
            answer, seconds = found[name]
            if isinstance(answer, Exception):
                continue
            try:
                answer, taken = timed(contenders[name])
                seconds.append(taken)
            except Exception as error:  # what a library fails with is a finding
                answer = error
            found[name] = answer, seconds
    return found


def attempted(G: cv.LinearOperator, b: Tensor, **options: Any) -> cv.Solution:
    """The solution, or how far it came."""
    try:
        return cv.solve(G, b, **options)
    except cv.NotConverged as error:
        return error.solution


def summary(seconds: list[float], ours: list[float]) -> dict[str, Any]:
    """The median time, and of its ratios to ours in the same round; all of them."""
    of_ours = [theirs / own for theirs, own in zip(seconds, ours, strict=True)]
    return {"seconds": median(seconds), "of ours": median(of_ours), "rounds": seconds}


# --- curvlinops


@dataclass(frozen=True)
class Task:
    """Systems with the damped GGN of a network, of which every residual should be small."""

    name: str
    problem: Problem
    b: Tensor  # (n,) or (n, k)
    damping: float
    largest: float
    small: float

    @property
    def objective(self) -> cv.Objective:
        pair = self.problem.inputs, self.problem.targets
        module, half = self.problem.copied(), math.ceil(len(pair[0]) / 2)
        return cv.Objective.of(module, cv.CrossEntropy(), pair, dtype=self.b.dtype, batch_size=half)

    @property
    def loader(self) -> Loader:
        halves = [t.chunk(2) for t in (self.problem.inputs.to(self.b.dtype), self.problem.targets)]
        return Loader(list(zip(*halves, strict=True)))

    @property
    def sides(self) -> int:
        return 1 if self.b.ndim == 1 else self.b.shape[1]

    def residual(self, x: Tensor) -> float:
        """The largest, relative, in float64."""
        G, x, b = cv.ggn(self.objective.to(dtype=torch.float64)), x.double(), self.b.double()
        return float(((b - G @ x - self.damping * x).norm(dim=0) / b.norm(dim=0)).max())


Answer = tuple[Tensor, int]  # x, and the products


def _our_cg(task: Task, tolerance: float) -> Answer:
    solution = attempted(cv.ggn(task.objective), task.b, damping=task.damping, rtol=tolerance)
    return solution.x, solution.cost.products


def _our_neumann(task: Task, tolerance: float) -> Answer:
    options = {"damping": task.damping, "method": "neumann", "rtol": 0.0, "max_steps": TERMS}
    solution = cv.solve(cv.ggn(task.objective), task.b, **options)
    return solution.x, solution.cost.products


def _our_kfac(task: Task, tolerance: float) -> Answer:
    return cv.inverse(cv.kfac(task.objective, fisher="type-2"), damping=task.damping) @ task.b, 0


def _damped(task: Task) -> tuple[Any, Loader]:
    import curvlinops
    from curvlinops.examples import IdentityLinearOperator

    module, loader = task.problem.copied().to(task.b.dtype), task.loader
    params = list(module.parameters())
    G = curvlinops.GGNLinearOperator(module, nn.CrossEntropyLoss(), params, loader, check_deterministic=False)
    identity = IdentityLinearOperator([tuple(p.shape) for p in params], CPU, task.b.dtype)
    return G + task.damping * identity, loader


def _their_cg(task: Task, tolerance: float) -> Answer:
    import curvlinops

    A, loader = _damped(task)
    x = curvlinops.CGInverseLinearOperator(A, tolerance=tolerance, eps=1e-30, max_iter=1000) @ task.b
    return x, round(loader.passes) * task.sides


def _their_neumann(task: Task, tolerance: float) -> Answer:
    import curvlinops

    A, loader = _damped(task)
    scale = 1 / (task.largest + task.damping)
    x = curvlinops.NeumannInverseLinearOperator(A, num_terms=TERMS - 1, scale=scale) @ task.b  # one term is b
    return x, round(loader.passes) * task.sides


def _their_kfac(task: Task, tolerance: float) -> Answer:
    import curvlinops

    module = task.problem.copied().to(task.b.dtype)
    options = {"fisher_type": "type-2", "separate_weight_and_bias": False, "check_deterministic": False}
    params = list(module.parameters())
    K = curvlinops.KFACLinearOperator(module, nn.CrossEntropyLoss(), params, task.loader, **options)
    inverse = curvlinops.KFACInverseLinearOperator(K, damping=task.damping, use_exact_damping=True)
    return inverse @ task.b, 0


METHODS: dict[str, tuple[Callable[[Task, float], Answer], Callable[[Task, float], Answer]]] = {
    "CG": (_our_cg, _their_cg),
    f"Neumann, {TERMS} terms": (_our_neumann, _their_neumann),
    "K-FAC, made and inverted": (_our_kfac, _their_kfac),
}


def tasks(quick: bool) -> Iterator[Task]:
    """In float64 on few data, and in float32 on both networks."""
    pixels, labels = data.digits()
    sides = 2 if quick else 16
    cases = (
        ("digits", 100, 1, 1e-9, torch.float64),
        ("digits", 100 if quick else TRAINING_DIGITS, 1, 1e-3, torch.float32),
        ("digits", 100 if quick else TRAINING_DIGITS, sides, 1e-3, torch.float32),
        ("digits-cnn", TRAINING_DIGITS // 5, 1, 1e-3, torch.float32),
        ("digits-cnn", TRAINING_DIGITS // 5, sides, 1e-3, torch.float32),
    )
    for name, examples, count, small, dtype in cases[:3] if quick else cases:
        problem = Problem(cv.demo(name).function.module.eval(), pixels[:examples], labels[:examples])
        task = Task(f"{name}, {examples} digits", problem, torch.empty(0, dtype=dtype), 0.0, 0.0, small)
        objective = task.objective
        some = slice(TRAINING_DIGITS, TRAINING_DIGITS + count)
        rows = cv.example_gradients(objective.on((pixels[some].to(dtype), labels[some])))
        b = rows.T.contiguous() if count > 1 else objective.gradient()
        largest = float(cv.eigsh(cv.ggn(objective), 1).values[0])
        yield Task(task.name, problem, b, SHARE * largest, largest, small)


def tolerated(task: Task, answer: Callable[[Task, float], Answer]) -> Callable[[], Answer]:
    """With the loosest tolerance after which the residuals are small enough, or the tightest there is."""
    for share in TOLERANCES:
        if task.residual(answer(task, share * task.small)[0]) <= task.small:
            break
    return partial(answer, task, share * task.small)


def curvlinops(quick: bool, rounds: int) -> Iterator[tuple[str, Rows]]:
    """Both libraries, method by method."""
    for task in tasks(quick):
        rows: Rows = []
        for method, pair in METHODS.items():
            made = {}
            for name, answer in zip(("curvature", "curvlinops"), pair, strict=True):
                if find_spec(name) is None:
                    continue
                made[name] = tolerated(task, answer) if method == "CG" else partial(answer, task, task.small)
            found = interleaved(made, (rounds + 1) // 2 if "cnn" in task.name else rounds)
            (ours, _), own = found["curvature"]
            for name, ((x, products), seconds) in found.items():
                rows.append(
                    {
                        "problem": task.name,
                        "dtype": str(x.dtype).removeprefix("torch."),
                        "sides": task.sides,
                        "method": method,
                        "contender": name,
                        "products": products,
                        **summary(seconds, own),
                        "residual": math.nan if method.startswith("K-FAC") else task.residual(x),
                        "difference": float((x - ours).norm() / ours.norm()),
                    }
                )
        yield f"against curvlinops, {task.name}, damping {SHARE:g}", rows


# --- exact Gauss-Newton directions


def _from_jacobian(problem: Problem, objective: cv.Objective, g: Tensor) -> Tensor:
    """(g - K^T (K K^T + T damping I)^-1 K g) / damping for K = R^T J, R R^T the Hessian of each of T losses."""
    params = {name: p.detach() for name, p in problem.module.named_parameters()}

    def logits(params: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(problem.module, params, (x[None],))[0]

    jacobians = vmap(jacrev(logits), (None, 0))(params, problem.inputs)
    J = torch.cat([part.flatten(2) for part in jacobians.values()], dim=2)  # (T, c, n)
    with torch.no_grad():
        p = problem.module(problem.inputs).softmax(1)
    R = torch.diag_embed(p.sqrt()) - p[:, :, None] * p.sqrt()[:, None, :]
    K = (R.mT @ J).flatten(0, 1)
    gram = K @ K.T + len(p) * DAMPING * torch.eye(len(K))
    return (g - K.T @ torch.linalg.solve(gram, K @ g)) / DAMPING


def _by_egn(memory: Any, problem: Problem, objective: cv.Objective, g: Tensor) -> Tensor:
    return cv.inverse(cv.egn(objective, memory=memory), damping=DAMPING) @ g


DIRECTIONS: dict[str, Callable[[Problem, cv.Objective, Tensor], Tensor]] = {
    "whole Jacobian": _from_jacobian,
    "egn": partial(_by_egn, "auto"),
    f"egn, {LITTLE >> 20} MiB": partial(_by_egn, LITTLE),
}


def alone(name: str, quick: bool, file: str) -> dict[str, float]:
    """Seconds and MiB of one way to a direction, which is saved."""
    problem = problem_of("resnet", "quick" if quick else "cpu", CPU)
    pair = problem.inputs, problem.targets
    objective = cv.Objective.of(problem.module, cv.CrossEntropy(), pair, batch_size=len(pair[0]))
    objective.check()
    g = objective.gradient()
    used = peak_since(CPU)
    x, seconds = timed(lambda: DIRECTIONS[name](problem, objective, g))
    memory = used()
    torch.save(x, file)
    return {"seconds": seconds, "MiB": memory}


def egn(quick: bool, rounds: int) -> Iterator[tuple[str, Rows]]:
    """All ways, in processes of their own."""
    returning = {
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TRIM_THRESHOLD_": "65536",
    }  # of what is freed, to the system
    main, options = Path(__file__).with_name("solves.py"), ["--threads", str(torch.get_num_threads())]
    with tempfile.TemporaryDirectory() as folder:

        def measure(name: str) -> dict[str, float]:
            command = [sys.executable, str(main), "--one", name, str(Path(folder, name)), *options]
            command += ["--quick"] if quick else []
            done = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, **returning})
            return json.loads(done.stdout.splitlines()[-1])

        found = {name: [] for name in DIRECTIONS}
        for _ in range((rounds + 1) // 2):
            for name, taken in found.items():
                taken.append(measure(name))
        directions = {name: torch.load(Path(folder, name)).double() for name in DIRECTIONS}
    first = next(iter(DIRECTIONS))
    rows = []
    for name, taken in found.items():
        seconds, memory = ([t[key] for t in taken] for key in ("seconds", "MiB"))
        least = [t["MiB"] for t in found[first]]
        rows.append(
            {
                "way": name,
                "seconds": median(seconds),
                "MiB": median(memory),
                "of its memory": median(memory) / median(least),
                "difference": float((directions[name] - directions[first]).norm() / directions[first].norm()),
                "rounds": seconds,
                "memory rounds": memory,
            }
        )
    yield "exact Gauss-Newton direction, ResNet-20", rows


# --- influence


@dataclass(frozen=True)
class Question:
    """Which training digits the held-out ones rest on, in the embedded perceptron."""

    training: Batch
    tests: Batch
    train: cv.Objective
    damping: float


def _ours(inverse: Callable[[cv.Objective, float], cv.LinearOperator], question: Question) -> Tensor:
    test = question.train.on(question.tests)
    return cv.influence(question.train, test, inverse(question.train, question.damping)).scores


def _solved(matrix: Callable[[cv.Objective], cv.LinearOperator], train: cv.Objective, damping: float) -> Any:
    return cv.inverse(matrix(train), damping=damping, rtol=1e-4)


def _preconditioned(train: cv.Objective, damping: float) -> cv.LinearOperator:
    G = cv.ggn(train)
    preconditioner = cv.inverse(cv.nystrom(G, damping=damping), damping=damping)
    return cv.inverse(G, damping=damping, preconditioner=preconditioner, rtol=1e-4)


def _factored(make: Callable[..., cv.LinearOperator], train: cv.Objective, damping: float) -> cv.LinearOperator:
    return cv.inverse(make(train, fisher="type-2"), damping=damping)


def _windowed(size: int, share: float, train: cv.Objective, damping: float) -> cv.LinearOperator:
    return cv.inverse(cv.gradient_window(train, size).fisher, damping=share * damping)


def _pydvl(name: str, options: dict[str, Any], question: Question) -> Tensor:
    import pydvl.influence.torch as pydvl
    from torch.utils.data import DataLoader, TensorDataset

    inputs, targets = question.training
    damped = {"hessian_regularization" if "Ekfac" in name else "regularization": question.damping}
    loss = [] if "Ekfac" in name else [F.cross_entropy]
    module = copy.deepcopy(question.train.function.module).eval()
    model = getattr(pydvl, name)(module, *loss, **damped, **options)
    model.fit(DataLoader(TensorDataset(inputs, targets), batch_size=math.ceil(len(inputs) / 2)))
    return model.influences(*question.tests, inputs, targets).T.detach()


GGN, HESSIAN = "CG, GGN", "MINRES, Hessian"
INVERSES: dict[str, Callable[[Question], Tensor]] = {
    GGN: partial(_ours, partial(_solved, cv.ggn)),
    "CG, GGN, Nystrom": partial(_ours, _preconditioned),
    HESSIAN: partial(_ours, partial(_solved, cv.hessian)),
    "K-FAC": partial(_ours, partial(_factored, cv.kfac)),
    "EKFAC": partial(_ours, partial(_factored, cv.ekfac)),
    "M-FAC, 256 examples": partial(_ours, partial(_windowed, 256, 1.0)),
    "M-FAC, all examples": partial(_ours, partial(_windowed, TRAINING_DIGITS, 1.0)),
    "M-FAC, a hundredth of the damping": partial(_ours, partial(_windowed, TRAINING_DIGITS, 0.01)),
    "none": partial(_ours, lambda train, damping: cv.identity(train.space)),
    "pyDVL, CG, one by one": partial(_pydvl, "CgInfluence", {"rtol": 1e-4, "maxiter": 500}),
    "pyDVL, CG, together": partial(_pydvl, "CgInfluence", {"rtol": 1e-4, "maxiter": 500, "solve_simultaneously": True}),
    f"pyDVL, Nystrom sketch of rank {RANK}": partial(_pydvl, "NystroemSketchInfluence", {"rank": RANK}),
    "pyDVL, EK-FAC": partial(_pydvl, "EkfacInfluence", {"update_diagonal": True}),
}


def influence(quick: bool, rounds: int) -> Iterator[tuple[str, Rows]]:
    """The scores by all inverses."""
    pixels, labels = data.digits()
    tests = 2 if quick else 16
    held_out = slice(TRAINING_DIGITS, TRAINING_DIGITS + tests)
    training, train = (pixels[:TRAINING_DIGITS], labels[:TRAINING_DIGITS]), cv.demo("digits")
    damping = DAMPED * float(cv.eigsh(cv.ggn(train), 1).values[0])
    question = Question(training, (pixels[held_out], labels[held_out]), train, damping)
    found = interleaved({name: partial(scores, question) for name, scores in INVERSES.items()}, (rounds + 1) // 2)
    known = {name: pair for name, pair in found.items() if isinstance(pair[0], Tensor)}
    failed = [{"inverse": name, "note": failure(pair[0])} for name, pair in found.items() if name not in known]
    rows: Rows = []
    for name, (scores, seconds) in known.items():
        alike = {f"correlation with {other}": correlation(scores, found[other][0]) for other in (GGN, HESSIAN)}
        rows.append({"inverse": name, **summary(seconds, found[GGN][1]), **alike, "note": ""})
    yield f"influence of {TRAINING_DIGITS} digits on {tests}, damping {DAMPED:g}", rows + failed


def correlation(scores: Tensor, others: Tensor) -> float:
    """Spearman's, in the mean over the tests."""
    pairs = zip(scores.T, others.T, strict=True)
    return fmean(float(spearmanr(a, b).statistic) for a, b in pairs)  # pyright: ignore[reportAttributeAccessIssue]
