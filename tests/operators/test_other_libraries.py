"""Facts that hold here and were found broken elsewhere: each is a failure of another library that was reproduced.

Every expected matrix comes from `torch.autograd.functional`, in float64, from all data at once. Where a fault would be
a number of the right shape, the test also shows that it would be far from the right one.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from untouched import untouched

import curvature as cv

Call = Callable[[Tensor], Tensor]  # a model at some parameters


def called(module: nn.Module, flat: Tensor) -> Call:
    """The model with the parameters that `flat` holds."""
    pieces = flat.split([p.numel() for p in module.parameters()])
    params = {name: piece.view(p.shape) for (name, p), piece in zip(module.named_parameters(), pieces, strict=True)}
    return lambda x: torch.func.functional_call(module, params, (x,))


def flat_of(module: nn.Module) -> Tensor:
    return nn.utils.parameters_to_vector(module.parameters()).detach()


def dense_hessian(module: nn.Module, loss: Callable[[Call], Tensor]) -> Tensor:
    """The Hessian of `loss` of the model in all its parameters."""
    twin = copy.deepcopy(module)  # whose running statistics may change
    return torch.autograd.functional.hessian(lambda flat: loss(called(twin, flat)), flat_of(module))


def dense_ggn(module: nn.Module, loss: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """J^T M J with J the Jacobian of the outputs and M the Hessian of `loss` at them."""
    twin, flat = copy.deepcopy(module), flat_of(module)
    outputs = called(twin, flat)(x)
    M = torch.autograd.functional.hessian(loss, outputs).reshape(outputs.numel(), -1)
    J = torch.autograd.functional.jacobian(lambda flat: called(twin, flat)(x).reshape(-1), flat)
    return J.T @ M @ J


def network(*widths: int, activation: type[nn.Module] = nn.Tanh) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [part for a, b in itertools.pairwise(widths) for part in (nn.Linear(a, b), activation())]
    return nn.Sequential(*layers[:-1]).double()


def classes(count: int, width: int = 4) -> tuple[Tensor, Tensor]:
    """Inputs of a growing scale, so that the last of them are unlike the others, and labels."""
    torch.manual_seed(1)
    scale = torch.linspace(0.5, 3, count).double().unsqueeze(1)
    return scale * torch.randn(count, width).double(), torch.randint(0, 3, (count,))


def relative(found: Tensor, expected: Tensor) -> float:
    return float(torch.linalg.norm(found.double() - expected) / torch.linalg.norm(expected))


EXACT = {"rtol": 1e-9, "atol": 1e-12}


# What is averaged


def empirical(module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The mean of g g^T over examples."""
    losses = F.cross_entropy(module(x), y, reduction="none")
    grads = (torch.autograd.grad(loss, module.parameters(), retain_graph=True) for loss in losses)
    rows = torch.stack([nn.utils.parameters_to_vector(grad) for grad in grads])
    return rows.T @ rows / len(x)


MATRICES = {
    "hessian": (cv.hessian, lambda m, x, y: dense_hessian(m, lambda call: F.cross_entropy(call(x), y))),
    "ggn": (cv.ggn, lambda m, x, y: dense_ggn(m, lambda outputs: F.cross_entropy(outputs, y), x)),
    "empirical_fisher": (cv.empirical_fisher, empirical),
}


@pytest.mark.parametrize("matrix, dense", MATRICES.values(), ids=MATRICES)
def test_examples_weigh_equally_in_a_short_last_batch(matrix, dense):
    """hessian-eigenthings 1.0.0a5 weights batches equally: 36 % off with 32 + 8 examples."""
    net, (x, y) = network(4, 5, 3), classes(40)
    loader = DataLoader(TensorDataset(x, y), batch_size=32)
    expected = dense(net, x, y)
    torch.testing.assert_close(matrix(cv.Objective.of(net, "cross-entropy", loader)).dense(), expected, **EXACT)
    by_batch = (dense(net, x[:32], y[:32]) + dense(net, x[32:], y[32:])) / 2
    assert relative(by_batch, expected) > 0.1


def sequences() -> tuple[nn.Module, Tensor, Tensor]:
    """Eight sequences of five tokens; of the last four most are ignored."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 6)).double()
    ids, labels = torch.randint(0, 7, (8, 5)), torch.randint(0, 6, (8, 5))
    labels[4:, 1:] = -100
    return net, ids, labels


def token_loss(outputs: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(outputs.flatten(0, 1), labels.flatten())


TOKENS = {
    "hessian": (cv.hessian, lambda m, x, y: dense_hessian(m, lambda call: token_loss(call(x), y))),
    "ggn": (cv.ggn, lambda m, x, y: dense_ggn(m, lambda outputs: token_loss(outputs, y), x)),
}


@pytest.mark.parametrize("matrix, dense", TOKENS.values(), ids=TOKENS)
def test_tokens_weigh_equally_where_batches_ignore_unequal_numbers_of_them(matrix, dense):
    """curvlinops 3.0.1 normalises by sequences whatever ignore_index leaves of them: 38 % off."""
    net, ids, labels = sequences()
    expected = dense(net, ids, labels)
    halves = list(zip(ids.split(4), labels.split(4), strict=True))
    torch.testing.assert_close(matrix(cv.Objective.of(net, "cross-entropy", halves)).dense(), expected, **EXACT)
    by_sequence = sum(dense(net, *half) for half in halves) / 2
    assert relative(by_sequence, expected) > 0.1


def test_tokens_weigh_equally_in_a_scalar_loss_too():
    net, ids, labels = sequences()
    halves = list(zip(ids.split(4), labels.split(4), strict=True))
    bare = cv.Objective.from_loss(net, lambda model, batch: token_loss(model(batch[0]), batch[1]), halves)
    expected = TOKENS["hessian"][1](net, ids, labels)
    torch.testing.assert_close(cv.hessian(bare).dense(), expected, **EXACT)


# Products


@pytest.mark.parametrize("name", ["hessian", "ggn"])
def test_products_of_a_relu_network_in_float32_are_exact_to_rounding_and_symmetric(name):
    """hessian-eigenthings 1.0.0a5 differences gradients: its Hessian is 1110 % off, its GGN is not symmetric."""
    net, (x, y) = network(4, 8, 8, 3, activation=nn.ReLU).float(), classes(30)
    x = x.float()
    matrix, dense = MATRICES[name]
    expected = dense(copy.deepcopy(net).double(), x.double(), y)
    A = matrix(cv.Objective.of(net, "cross-entropy", (x, y))).dense()
    assert A.dtype == torch.float32
    assert relative(A, expected) < 1e-6
    assert relative(A.T, A.double()) < 1e-6


LOSSES = {
    "cross-entropy": (F.cross_entropy, torch.arange(9) % 3),
    "mse": (F.mse_loss, torch.linspace(-2, 2, 27).double().view(9, 3)),
    "bce": (F.binary_cross_entropy_with_logits, (torch.arange(27).view(9, 3) % 2).double()),
}


@pytest.mark.parametrize("name", LOSSES)
def test_a_gauss_newton_product_is_that_with_the_dense_matrix_and_not_zero(name):
    """torch_secorder's gauss_newton_product returns 0."""
    net, x, (function, y) = network(4, 5, 3), classes(9)[0], LOSSES[name]
    G = cv.ggn(cv.Objective.of(net, name, (x, y)))
    v = torch.linspace(-1, 1, G.shape[0]).double()
    expected = dense_ggn(net, lambda outputs: function(outputs, y), x) @ v
    torch.testing.assert_close(G @ v, expected, **EXACT)
    assert expected.norm() > 0.1


def test_the_ggn_is_the_hessian_where_residuals_vanish():
    net, (x, _) = network(4, 5, 3), classes(9)
    y = net(x).detach()
    objective = cv.Objective.of(net, "mse", (x, y))
    expected = dense_hessian(net, lambda call: F.mse_loss(call(x), y))
    torch.testing.assert_close(cv.ggn(objective).dense(), expected, **EXACT)
    torch.testing.assert_close(cv.hessian(objective).dense(), expected, **EXACT)


# Training mode


@pytest.mark.parametrize("engine", ["retained", "recomputed", "forward"])
def test_dropout_in_training_mode_is_one_function_with_one_hessian(engine):
    """hessian-eigenthings 1.0.0a5 draws new masks in every product: two products with one vector differ."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Dropout(0.5), nn.Linear(6, 3)).double().train()
    x, y = classes(12)
    objective = cv.Objective.of(net, "cross-entropy", [(x, y)], mode="train", seed=5)

    def loss(call: Call, seed: int = 5) -> Tensor:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return F.cross_entropy(call(x), y)

    H, expected = cv.hessian(objective, engine=engine), dense_hessian(net, loss)
    v = torch.linspace(-1, 1, len(expected)).double()
    with untouched(net):
        assert torch.equal(H @ v, H @ v)
    torch.testing.assert_close(H.dense(), expected, **EXACT)
    assert relative(dense_hessian(net, lambda call: loss(call, 6)), expected) > 0.1


@pytest.mark.parametrize("name", ["hessian", "ggn"])
def test_batch_statistics_have_their_matrix_and_running_ones_stay(name):
    """curvlinops 3.0.1 raises on it, after it has changed the running statistics; hessian-eigenthings 1.0.0a5 changes
    them with every product."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3)).double().train()
    x, y = classes(14)
    batches = [(x[:5], y[:5]), (x[5:], y[5:])]
    matrix, dense = MATRICES[name]
    expected = sum(len(b) / 14 * dense(net, a, b) for a, b in batches)
    with untouched(net):
        A = matrix(cv.Objective.of(net, "cross-entropy", batches, mode="train")).dense()
    torch.testing.assert_close(A, expected, **EXACT)
    assert relative(dense(copy.deepcopy(net).eval(), x, y), expected) > 0.1  # the running statistics are others


OPERATORS = {
    "hessian": cv.hessian,
    "ggn": cv.ggn,
    "fisher": cv.fisher,
    "empirical_fisher": cv.empirical_fisher,
    "gradient_covariance": cv.gradient_covariance,
    "jacobian": cv.jacobian,
    "ntk": cv.ntk,
    "kfac": cv.kfac,
    "ekfac": cv.ekfac,
    "ggn_diagonal": cv.ggn_diagonal,
}


@pytest.mark.parametrize("make", OPERATORS.values(), ids=OPERATORS)
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_no_matrix_changes_the_mode_the_gradients_or_the_buffers_of_the_model(make, mode):
    """PyHessian 0.1 leaves the model in evaluation mode, and its .grad filled."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Dropout(0.2), nn.Tanh(), nn.Linear(5, 3)).double()
    net.train()[1].eval()
    net[0].weight.grad = torch.full_like(net[0].weight, 7.0)
    x, y = classes(10)
    with untouched(net):
        A = make(cv.Objective.of(net, "cross-entropy", [(x[:6], y[:6]), (x[6:], y[6:])], mode=mode))
        assert A.dense().abs().sum() > 0


@pytest.mark.parametrize("make", OPERATORS.values(), ids=OPERATORS)
def test_a_parameter_without_effect_has_zeros_and_the_others_what_they_have_without_it(make):
    """PyHessian 0.1 fails on it."""
    net, (x, y) = network(4, 5, 3), classes(8)
    expected = make(cv.Objective.of(net, "cross-entropy", (x, y))).dense()
    net.insert(3, nn.Identity())
    net[3].extra = nn.Parameter(torch.ones(2).double())  # the last two parameters
    objective = cv.Objective.of(net, "cross-entropy", (x, y))
    A = make(objective)
    m, n = (size - count for size, count in zip(A.shape, expected.shape, strict=True))
    assert objective.check().unused == ("3.extra",) and {m, n} <= {0, 2}
    expected = F.pad(expected, (0, n, 0, m))
    torch.testing.assert_close(A.dense(), expected, **EXACT)
    assert expected.abs().sum() > 0


class Criterion:
    """A mean, and no attribute says so."""

    def __call__(self, outputs: Tensor, labels: Tensor) -> Tensor:
        return (outputs.logsumexp(-1) - outputs.gather(-1, labels[:, None])[:, 0]).square().mean()


@pytest.mark.parametrize(
    "loss", [Criterion(), lambda outputs, labels: Criterion()(outputs, labels)], ids=["class", "lambda"]
)
def test_a_loss_needs_no_attribute_that_says_how_it_is_reduced(loss):
    """curvlinops 3.0.1: AttributeError, a loss has to have `.reduction`."""
    net, (x, y) = network(4, 5, 3), classes(11)
    objective = cv.Objective.of(net, loss, [(x[:8], y[:8]), (x[8:], y[8:])])
    expected = dense_hessian(net, lambda call: Criterion()(call(x), y))
    torch.testing.assert_close(cv.hessian(objective).dense(), expected, **EXACT)


def test_torchs_function_without_a_reduction_has_a_gauss_newton_matrix():
    net, (x, y) = network(4, 5, 3), classes(11)
    G = cv.ggn(cv.Objective.of(net, F.cross_entropy, [(x[:8], y[:8]), (x[8:], y[8:])]))
    torch.testing.assert_close(G.dense(), MATRICES["ggn"][1](net, x, y), **EXACT)


# Kronecker factors


class Mixed(nn.Module):
    """An embedding, a normalisation, and a layer that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.norm = nn.Embedding(6, 4), nn.LayerNorm(4)
        self.twice, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.twice(self.twice(self.norm(self.embedding(ids))).tanh()).tanh())


def factors(model: Mixed, ids: Tensor, count: slice = slice(None)) -> dict[str, tuple[Tensor, Tensor]]:
    """(E[a a^T], E[g g^T]) of each layer by their definition, g for all that the labels may be, by its probability.

    Of a layer's calls those in `count`: E[a a^T] is the mean over them, E[g g^T] the sum (Eschenhagen et al. 2023,
    "expand").
    """
    embedded = model.embedding(ids)
    normed = model.norm(embedded)
    first = model.twice(normed)
    second = model.twice(first.tanh())
    outputs = model.head(second.tanh())
    p = outputs.detach().softmax(-1)
    root = torch.diag_embed(p.sqrt()) - p.unsqueeze(2) * p.sqrt().unsqueeze(1)  # times its transpose: diag(p) - p p^T
    seen = {
        "embedding": ([F.one_hot(ids, 6).double()], [embedded]),
        "twice": ([F.pad(a, (0, 1), value=1.0) for a in (normed, first.tanh())], [first, second]),
        "head": ([F.pad(second.tanh(), (0, 1), value=1.0)], [outputs]),
    }
    found = {}
    for name, (inputs, calls) in seen.items():
        inputs, calls = inputs[count], calls[count]
        pulled = [torch.autograd.grad(outputs, calls, r, retain_graph=True) for r in root.unbind(2)]
        A = sum(a.T @ a for a in inputs).detach() / (len(inputs) * len(ids))
        found[name] = A, sum(g.T @ g for grads in pulled for g in grads) / len(ids)
    return found


def test_kfac_takes_embeddings_normalisations_and_a_layer_that_is_called_twice():
    """curvlinops 3.0.1: NotImplementedError with any parameter of a LayerNorm or Embedding; its hooks give silently
    wrong factors for modules that are called twice."""
    torch.manual_seed(0)
    model, ids, y = Mixed().double(), torch.randint(0, 6, (10,)), torch.randint(0, 3, (10,))
    objective = cv.Objective.of(model, "cross-entropy", [(ids[:7], y[:7]), (ids[7:], y[7:])])
    K, G = cv.kfac(objective, fisher="type-2"), dense_ggn(model, lambda outputs: F.cross_entropy(outputs, y), ids)

    at = {name: torch.arange(len(G))[place] for name, place in K.places.items()}
    assert torch.equal(torch.cat(list(at.values())).sort().values, torch.arange(len(G)))
    assert set(K.blocks) == {"embedding", "norm", "twice", "head"} and not K.source["diagonal"]

    found = factors(model, ids)
    expected = torch.zeros_like(G)
    for name, (A, B) in found.items():
        block = torch.kron(A, B) if name == "embedding" else torch.kron(B, A)  # embeddings hold (in, out)
        expected[at[name][:, None], at[name]] = block
    weight, bias = (list(objective.space.named(torch.arange(len(G)))[f"norm.{name}"]) for name in ("weight", "bias"))
    for pair in zip(weight, bias, strict=True):  # of each channel of a normalisation the block itself
        pair = torch.stack(pair)
        expected[pair[:, None], pair] = G[pair[:, None], pair]
    torch.testing.assert_close(K.dense(), expected, **EXACT)

    A, B = factors(model, ids, slice(-1, None))["twice"]  # of the last call alone
    assert relative(torch.kron(B, A), expected[at["twice"][:, None], at["twice"]]) > 0.1


# Precision


@pytest.mark.parametrize("name", ["hessian", "ggn"])
def test_weights_in_bfloat16_have_the_spectrum_of_the_same_numbers_in_float32(name):
    """curvlinops 3.0.1 and hessian-eigenthings 1.0.0a5 crash: eigh is not implemented for bfloat16."""
    net, (x, y) = network(4, 6, 3).bfloat16(), classes(24)
    x = x.bfloat16()
    matrix, dense = MATRICES[name]
    expected = torch.linalg.eigvalsh(dense(copy.deepcopy(net).double(), x.double(), y))

    def measured(net: nn.Module, x: Tensor) -> list[Tensor]:
        A = matrix(cv.Objective.of(net, "cross-entropy", (x, y)))
        density = cv.spectral_density(A, probes=4, steps=len(expected))
        return [
            cv.eigsh(A, 3).values,
            cv.trace(A, products=len(expected)).value,
            density.nodes,
            density.mean(torch.square).value,
        ]

    half, single = measured(net, x), measured(copy.deepcopy(net).float(), x.float())
    for one, other in zip(half, single, strict=True):
        assert torch.equal(one, other)
    top, trace, nodes, square = half
    size = float(expected.abs().max())
    torch.testing.assert_close(top.double(), expected.flip(0)[:3], rtol=1e-4, atol=0)
    torch.testing.assert_close(trace.double(), expected.sum(), rtol=1e-4, atol=0)
    torch.testing.assert_close(nodes[[0, -1]].double(), expected[[0, -1]], rtol=1e-4, atol=1e-5 * size)
    torch.testing.assert_close(square.double(), expected.square().mean(), rtol=1e-4, atol=0)
