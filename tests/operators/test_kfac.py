"""K-FAC, EKFAC and GGN diagonals: exact where theory says so, for every kind of layer, and right about what is not."""

from __future__ import annotations

import weakref

import pytest
import torch
import torch.nn.functional as F
from objectives import Case, zoo
from torch import Tensor, nn
from untouched import untouched

import curvature as cv
from curvature.operators import layerwise

ZOO = pytest.mark.parametrize("case", zoo(), ids=str)


def on_blocks(A: cv.BlockDiagonal, matrix: Tensor) -> Tensor:
    """The matrix within the blocks of A, zero elsewhere."""
    mask = torch.zeros_like(matrix)
    for place in A.places.values():
        at = torch.arange(len(matrix))[place]
        mask[at[:, None], at] = 1
    return matrix * mask


class Mean(nn.Module):
    """The mean over positions, between the first axis and the last."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1, -2).mean(1)


def deep_linear(*last: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3, bias=False), nn.Linear(3, 2), *last).double()


def of(module: nn.Module, inputs: Tensor, loss: object = "mse", sizes: tuple[int, ...] | None = None, **options):
    """An objective with random targets, in batches of the given sizes."""
    torch.manual_seed(1)
    with torch.no_grad():
        outputs = module(inputs)
    targets = torch.randint(0, outputs.shape[-1], outputs.shape[:-1]) if loss == "cross-entropy" else outputs + 1
    sizes = sizes or (len(inputs),)
    batches = list(zip(inputs.split(list(sizes)), targets.split(list(sizes)), strict=True))
    return cv.Objective.of(module, loss, batches, **options)


@pytest.mark.parametrize("make", [cv.kfac, cv.ekfac])
@pytest.mark.parametrize("sharing, last", [("expand", ()), ("reduce", (Mean(),))])
def test_exact_for_deep_linear_networks_in_both_settings_of_sharing(make, sharing, last):
    """Eschenhagen et al. 2023: positions with losses of their own, and a mean over positions before the loss."""
    objective = of(deep_linear(*last), torch.randn(7, 3, 4).double(), sizes=(2, 5))
    A = make(objective, fisher="type-2", sharing=sharing)
    expected = on_blocks(A, cv.ggn(objective).dense())
    torch.testing.assert_close(A.dense(), expected, rtol=1e-10, atol=1e-12)
    assert all(isinstance(block, cv.Kronecker | cv.Spectral) for block in A.blocks.values()) and A.psd


def test_the_other_setting_is_far_off():
    """A test that cannot fail would pass here."""
    objective = of(deep_linear(Mean()), torch.randn(7, 3, 4).double())
    A = cv.kfac(objective, fisher="type-2", sharing="expand")
    expected = on_blocks(A, cv.ggn(objective).dense())
    assert torch.linalg.norm(A.dense() - expected) > 0.2 * torch.linalg.norm(expected)


class HuggingFaceConv1D(nn.Module):
    """What transformers.pytorch_utils.Conv1D computes: a linear layer that keeps (in, out)."""

    def __init__(self, out: int, into: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(into, out)), nn.Parameter(torch.randn(out))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(*x.shape[:-1], -1)


HuggingFaceConv1D.__name__ = "Conv1D"

ONE_LOCATION = {  # a layer that sees one position of each example, and its input
    "linear": (nn.Linear(4, 3), (4,)),
    "linear without bias": (nn.Linear(4, 3, bias=False), (4,)),
    "conv1d": (nn.Conv1d(2, 3, 4), (2, 4)),
    "conv2d": (nn.Conv2d(2, 3, (2, 3)), (2, 2, 3)),
    "conv3d": (nn.Conv3d(1, 3, 2, bias=False), (1, 2, 2, 2)),
    "groups": (nn.Conv2d(4, 6, 2, groups=2), (4, 2, 2)),
    "dilation and stride": (nn.Conv2d(2, 3, 2, dilation=2, stride=5), (2, 3, 3)),
    "padding": (nn.Conv2d(2, 3, 3, padding=1, stride=2), (2, 1, 1)),
    "Hugging Face Conv1D": (HuggingFaceConv1D(3, 4), (4,)),
    "embedding": (nn.Embedding(5, 3), ()),
    "padded embedding": (nn.Embedding(5, 3, padding_idx=1), ()),
    "layer norm": (nn.LayerNorm(4), (4,)),
    "layer norm without bias": (nn.LayerNorm(4, bias=False), (4,)),
    "rms norm": (nn.RMSNorm(4), (4,)),
    "batch norm": (nn.BatchNorm1d(4), (4,)),
}


def drawn(layer: nn.Module, shape: tuple[int, ...], count: int) -> Tensor:
    torch.manual_seed(2)
    return torch.randint(0, 5, (count,)) if isinstance(layer, nn.Embedding) else torch.randn(count, *shape).double()


@pytest.mark.parametrize("layer, shape", ONE_LOCATION.values(), ids=ONE_LOCATION)
@pytest.mark.parametrize("make", [cv.kfac, cv.ekfac])
def test_exact_for_one_datum_with_each_kind_of_layer(layer, shape, make):
    """The sum over outputs of g g^T, times one a a^T; within each group of a grouped layer."""
    torch.manual_seed(0)
    model = nn.Sequential(layer, nn.Flatten(), nn.Tanh(), nn.LazyLinear(3)).double().eval()
    inputs = drawn(layer, shape, 1)
    model(inputs)
    objective = of(model, inputs, "cross-entropy", select="0.*")
    A = make(objective, fisher="type-2")
    assert not A.source["diagonal"] and list(A.blocks) == ["0"]
    (block,) = A.blocks.values()
    expected = cv.ggn(objective).dense()
    order = torch.arange(len(expected))[A.places["0"]]
    groups = block.spectral if isinstance(block, cv.Kronecker) else block
    size = groups.values[0].numel() if groups.values.ndim == 3 else groups.values.numel()
    group = torch.empty(len(expected), dtype=torch.long)
    group[order] = torch.arange(len(expected)) // size
    expected = expected * (group[:, None] == group)
    torch.testing.assert_close(A.dense(), expected, rtol=1e-10, atol=1e-12)


LAYERS = {  # many positions, every option that changes what the weights see
    **ONE_LOCATION,
    "sequence": (nn.Linear(4, 3), (5, 4)),
    "images": (nn.Linear(2, 3), (3, 2, 2)),
    "conv1d locations": (nn.Conv1d(2, 4, 3, padding=2, stride=2, dilation=2, groups=2), (2, 9)),
    "conv2d same": (nn.Conv2d(2, 3, (2, 3), padding="same", dilation=(2, 1)), (2, 4, 5)),
    "conv2d valid": (nn.Conv2d(2, 3, 2, padding="valid"), (2, 4, 3)),
    "conv2d uneven": (nn.Conv2d(2, 3, (3, 1), padding=(2, 0), stride=(1, 2)), (2, 4, 5)),
    "conv2d circular": (nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"), (2, 4, 4)),
    "conv2d reflect": (nn.Conv2d(2, 3, 3, padding=(1, 2), padding_mode="reflect"), (2, 4, 4)),
    "conv2d replicate same": (nn.Conv2d(2, 3, 3, padding="same", padding_mode="replicate"), (2, 4, 4)),
    "depthwise": (nn.Conv2d(3, 6, 2, groups=3), (3, 3, 3)),
    "conv3d locations": (nn.Conv3d(2, 2, 2, padding=1, stride=2), (2, 3, 2, 2)),
    "layer norm of images": (nn.LayerNorm((2, 3)), (4, 2, 3)),
    "group norm": (nn.GroupNorm(2, 4), (4, 3)),
    "instance norm": (nn.InstanceNorm2d(2, affine=True), (2, 3, 3)),
    "batch norm of images": (nn.BatchNorm2d(2), (2, 3, 3)),
}


def model_of(layer: nn.Module, shape: tuple[int, ...], count: int) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(layer, nn.ReLU(inplace=True), nn.Flatten(), nn.LazyLinear(3)).double()
    inputs = drawn(layer, shape, count)
    model(inputs)
    return model.eval(), inputs


@pytest.mark.parametrize("layer, shape", LAYERS.values(), ids=LAYERS)
def test_diagonal_is_that_of_the_ggn_for_each_kind_of_layer(layer, shape):
    model, inputs = model_of(layer, shape, 6)
    objective = of(model, inputs, "cross-entropy", sizes=(4, 2))
    assert not cv.kfac(objective, fisher="input-only").source["diagonal"]
    torch.testing.assert_close(
        cv.ggn_diagonal(objective).entries, cv.ggn(objective).dense().diagonal(), rtol=1e-10, atol=1e-12
    )


@pytest.mark.parametrize("layer, shape", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("fisher", ["type-2", "sampled", "empirical", "input-only"])
def test_independent_of_batches_and_of_repeated_data(layer, shape, sharing, fisher):
    model, inputs = model_of(layer, shape, 6)
    options = {"fisher": fisher, "sharing": sharing}
    whole = cv.kfac(of(model, inputs, "cross-entropy"), **options).dense()
    parts = cv.kfac(of(model, inputs, "cross-entropy", sizes=(1, 3, 2)), **options).dense()
    torch.testing.assert_close(parts, whole, rtol=1e-10, atol=1e-12)
    if fisher != "sampled":  # a repeated example has samples of its own
        objective = of(model, inputs, "cross-entropy")
        doubled = [(x.repeat_interleave(2, 0), y.repeat_interleave(2, 0)) for x, y in objective.batches]
        twice = cv.kfac(cv.Objective.of(model, "cross-entropy", doubled), **options).dense()
        torch.testing.assert_close(twice, whole, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("layer, shape", LAYERS.values(), ids=LAYERS)
def test_ekfac_has_the_second_moments_along_the_eigenvectors_of_kfac(layer, shape):
    """diag(U^T F U), and with it the nearest of all such matrices to the blocks of the GGN."""
    model, inputs = model_of(layer, shape, 6)
    objective = of(model, inputs, "cross-entropy", sizes=(4, 2))
    G = cv.ggn(objective).dense()
    K, E = (make(objective, fisher="type-2") for make in (cv.kfac, cv.ekfac))
    expected = on_blocks(E, G)
    for name, place in E.places.items():
        at = torch.arange(len(G))[place]
        block = E.blocks[name]
        if not isinstance(block, cv.Spectral):
            continue
        U = torch.stack([_times(block, row) for row in torch.eye(len(at)).double()])
        torch.testing.assert_close(
            (U @ G[at[:, None], at] @ U.T).diagonal(), block.values.reshape(-1), rtol=1e-8, atol=1e-12
        )
    assert torch.linalg.norm(E.dense() - expected) <= torch.linalg.norm(K.dense() - expected) + 1e-12


def _times(block: cv.Spectral, row: Tensor) -> Tensor:
    """The eigenvector of that coordinate."""
    X = row.view(1, -1, *block.values.shape[-2:])
    X = X if block.U is None else block.U @ X
    return (X if block.V is None else X @ block.V.mT).reshape(-1)


@ZOO
def test_diagonal_is_that_of_the_ggn(case: Case):
    """Known layers and unknown ones, tied and repeated, whatever the batches."""
    expected = cv.ggn(case.objective()).dense().diagonal()
    for sizes in (None, (1, 5, len(case.inputs) - 6)):
        torch.testing.assert_close(cv.ggn_diagonal(case.objective(sizes)).entries, expected, rtol=1e-10, atol=1e-12)


@ZOO
@pytest.mark.parametrize("fisher", ["sampled", "empirical"])
def test_diagonals_of_fisher_matrices(case: Case, fisher):
    """Exactly those of the matrices with the same samples, where an example is a term."""
    if fisher == "sampled" and case.name in ("tokens", "tied-head"):
        pytest.skip("tokens are terms, whose samples meet: an estimate, tested below")
    objective = case.objective((1, 5, len(case.inputs) - 6))
    make = cv.fisher if fisher == "sampled" else cv.empirical_fisher
    expected = make(objective, **({"seed": 3} if fisher == "sampled" else {})).dense().diagonal()
    found = cv.ggn_diagonal(objective, fisher=fisher, seed=3).entries
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@ZOO
@pytest.mark.parametrize("make", [cv.kfac, cv.ekfac])
def test_every_parameter_has_a_block_and_nothing_is_touched(case: Case, make):
    objective = case.objective((1, 5, len(case.inputs) - 6))
    with untouched(case.module):
        A = make(objective, samples=2)
    torch.testing.assert_close(A.dense(), A.dense().T, rtol=0, atol=1e-12)
    assert torch.linalg.eigvalsh(A.dense()).min() > -1e-12 and (A.dense().diagonal().sum() > 0)
    torch.testing.assert_close(cv.trace(A).value, A.dense().trace(), rtol=1e-10, atol=0)
    inverse = cv.inverse(A, damping=1e-2).dense()
    torch.testing.assert_close(
        inverse @ (A.dense() + 1e-2 * torch.eye(len(inverse)).double()),
        torch.eye(len(inverse)).double(),
        rtol=0,
        atol=1e-9,
    )


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_samples_approach_the_exact_factors(sharing):
    objective = of(deep_linear(nn.Tanh()), torch.randn(9, 4).double(), "cross-entropy")
    exact = cv.kfac(objective, fisher="type-2", sharing=sharing).dense()
    errors = []
    for samples in (10, 1000):
        A = cv.kfac(objective, samples=samples, seed=1, sharing=sharing)
        errors.append(float(torch.linalg.norm(A.dense() - exact) / torch.linalg.norm(exact)))
    assert errors[1] < 0.05 and errors[1] < errors[0] / 4  # the root of 100 is 10


def test_samples_depend_on_the_seed_alone():
    objective = of(deep_linear(), torch.randn(9, 4).double())
    one, same, other = (cv.kfac(objective, seed=seed).dense() for seed in (0, 0, 1))
    assert torch.equal(one, same) and not torch.allclose(one, other)


def test_empirical_factors_are_those_of_the_real_residuals():
    objective = of(nn.Linear(3, 2).double(), torch.randn(1, 3).double(), "cross-entropy")
    expected = cv.empirical_fisher(objective).dense()
    A = cv.kfac(objective, fisher="empirical")
    torch.testing.assert_close(A.dense(), on_blocks(A, expected), rtol=1e-10, atol=1e-12)


def test_input_only_factors_have_the_identity_for_gradients_and_run_no_backward():
    x = torch.randn(5, 4).double()
    A = cv.kfac(of(nn.Linear(4, 3).double(), x), fisher="input-only")
    a = F.pad(x, (0, 1), value=1.0)
    expected = torch.kron(torch.eye(3).double(), a.T @ a / 5)
    order = torch.cat([torch.arange(12).view(3, 4), torch.arange(12, 15)[:, None]], 1).reshape(-1)
    torch.testing.assert_close(A.dense()[order[:, None], order], expected)


@pytest.mark.parametrize("select", ["*.weight", "*.bias", ["0.weight", "2.bias"]])
def test_frozen_parameters_have_no_part_in_the_blocks(select):
    objective = of(deep_linear(), torch.randn(6, 4).double(), select=select)
    A = cv.kfac(objective, fisher="type-2")
    torch.testing.assert_close(A.dense(), on_blocks(A, cv.ggn(objective).dense()), rtol=1e-10, atol=1e-12)
    assert A.domain == objective.space


class Odd(nn.Module):
    """Parameters that no layer explains: tied, never called, used elsewhere too, not called for each example."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(6, 4), nn.Linear(4, 6, bias=False)
        self.head.weight = self.embedding.weight
        self.scale = nn.Parameter(torch.ones(4))
        self.bypassed, self.elsewhere, self.twice = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.position, self.bilinear = nn.Embedding(5, 4), nn.Bilinear(4, 4, 4)

    def forward(self, ids: Tensor) -> Tensor:
        h = self.embedding(ids) * self.scale + self.position(torch.arange(ids.shape[1])[None])
        h = h + F.linear(h, self.bypassed.weight, self.bypassed.bias).tanh()
        h = h + self.elsewhere(h).tanh() * self.elsewhere.weight.mean()
        h = h + self.twice(self.twice(h).tanh())
        return self.head(self.bilinear(h, h)).mean(1)


def test_parameters_without_factors_get_an_exact_diagonal_and_are_listed_with_the_reason():
    torch.manual_seed(0)
    model = Odd().double()
    objective = of(model, torch.randint(0, 6, (5, 5)), "cross-entropy", sizes=(3, 2))
    A = cv.kfac(objective, fisher="type-2")
    assert A.source["diagonal"] == {
        "scale": "Odd has no factors",
        "embedding.weight": "shared with head.weight",
        "bypassed.weight": "its layer is never called",
        "bypassed.bias": "its layer is never called",
        "elsewhere.weight": "it is used outside its layer, or changed by it",
        "elsewhere.bias": "it is used outside its layer, or changed by it",
        "position.weight": "its layer is not called for each example",
        "bilinear.weight": "Bilinear has no factors",
        "bilinear.bias": "Bilinear has no factors",
    }
    G = cv.ggn(objective).dense().diagonal()
    for name in A.source["diagonal"]:
        torch.testing.assert_close(A.blocks[name].entries, G[A.places[name]], rtol=1e-10, atol=1e-12)
    assert isinstance(A.blocks["twice"], cv.Kronecker)  # positions of both calls
    torch.testing.assert_close(cv.ggn_diagonal(objective).entries, G, rtol=1e-10, atol=1e-12)


class Positioned(nn.Module):
    """Positions are embedded once for all examples."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions, self.head = nn.Embedding(6, 3), nn.Embedding(4, 3), nn.Linear(3, 2)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head((self.tokens(ids) + self.positions(torch.arange(4)[None])).tanh().mean(1))


@pytest.mark.parametrize("sizes", [(5,), (1, 4), (1, 1, 3)])
def test_a_first_batch_of_one_example_does_not_hide_what_is_shared_by_all(sizes):
    objective = of(Positioned().double(), torch.randint(0, 6, (5, 4)), "cross-entropy", sizes=sizes)
    assert cv.kfac(objective).source["diagonal"] == {"positions.weight": "its layer is not called for each example"}
    torch.testing.assert_close(
        cv.ggn_diagonal(objective).entries, cv.ggn(objective).dense().diagonal(), rtol=1e-10, atol=1e-12
    )


def test_a_model_that_is_one_layer_goes_by_its_class():
    objective = of(nn.Linear(3, 2), torch.randn(4, 3))
    assert list(cv.kfac(objective).blocks) == list(cv.blockwise(cv.ggn, objective).blocks) == ["Linear"]


class Crossed(nn.Module):
    """The layer sees positions first: (positions, examples, features)."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x.transpose(0, 1)).tanh().mean(0))


def test_layers_that_see_other_axes_first_are_found_out():
    objective = of(Crossed().double(), torch.randn(4, 8, 3).double())
    A = cv.ekfac(objective, fisher="type-2")
    assert set(A.source["diagonal"].values()) == {"its layer mixes examples"}
    torch.testing.assert_close(
        cv.ggn_diagonal(objective).entries, cv.ggn(objective).dense().diagonal(), rtol=1e-10, atol=1e-12
    )


def test_models_that_need_their_whole_batch_have_diagonals_too():
    """Batch statistics couple the examples: none can be taken alone."""
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Bilinear(4, 4, 2)).double()
    model[3] = Squares()
    objective = of(model.double(), torch.randn(6, 3).double(), mode="train")
    expected = cv.ggn(objective).dense().diagonal()
    diagonal = cv.ggn_diagonal(objective)
    at = slice(len(expected) - 8, len(expected))
    torch.testing.assert_close(diagonal.entries[at], expected[at], rtol=1e-10, atol=1e-12)


class Squares(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(2, 4))

    def forward(self, x: Tensor) -> Tensor:
        return x.square() @ self.matrix.T


def transformer() -> cv.Objective:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True)
    return of(nn.Sequential(layer, nn.Linear(4, 3)).double(), torch.randn(5, 4, 4).double(), "cross-entropy")


@pytest.mark.parametrize("kind", ["sampled", "type-2", "empirical"])
def test_tokens_that_meet_in_attention_do_so_without_bias(kind):
    """Random signs: over seeds the mean diagonal of the exact blocks is that of the matrix."""
    objective = transformer()
    make = cv.empirical_fisher if kind == "empirical" else cv.ggn
    expected = make(objective).dense().diagonal()
    draws = []
    for seed in range(100):
        A = cv.kfac(objective, fisher=kind, seed=seed)
        draws.append(torch.cat([A.blocks[name].dense().diagonal() for name in EXACT]))
    draws = torch.stack(draws)
    places = torch.cat([torch.arange(len(expected))[A.places[name]] for name in EXACT])
    error = (draws.mean(0) - expected[places]) / (draws.std(0) / 10)
    assert draws.std(0).min() > 0 and error.abs().max() < 5 and error.square().mean() < 2


EXACT = ("0.norm1", "0.self_attn.in_proj_weight", "0.self_attn.out_proj.weight")


def test_layers_that_torch_calls_without_their_modules_are_listed():
    assert cv.kfac(transformer()).source["diagonal"] == {
        "0.self_attn.in_proj_weight": "MultiheadAttention has no factors",
        "0.self_attn.in_proj_bias": "MultiheadAttention has no factors",
        "0.self_attn.out_proj.weight": "its layer is never called",
        "0.self_attn.out_proj.bias": "its layer is never called",
    }


def test_diagonal_of_the_ggn_with_attention_is_exact():
    objective = transformer()
    torch.testing.assert_close(
        cv.ggn_diagonal(objective).entries, cv.ggn(objective).dense().diagonal(), rtol=1e-10, atol=1e-12
    )


@pytest.mark.parametrize(
    "call, error, words",
    [
        (lambda o: cv.kfac(o, fisher="exact"), ValueError, "fisher is 'type-2', 'sampled'"),
        (lambda o: cv.kfac(o, sharing="both"), ValueError, "sharing is 'expand' or 'reduce'"),
        (lambda o: cv.kfac(o, samples=0), ValueError, "at least one sample"),
        (lambda o: cv.kfac(o.function.module), TypeError, r"Write kfac\(Objective.of"),
        (lambda o: cv.ggn_diagonal(o.function.module), TypeError, r"Write ggn_diagonal\(Objective.of"),
    ],
)
def test_wrong_arguments_are_refused(call, error, words):
    with pytest.raises(error, match=words):
        call(of(nn.Linear(3, 2), torch.randn(4, 3)))


def test_losses_without_a_distribution_have_input_only_factors_alone():
    objective = of(nn.Linear(3, 2), torch.randn(4, 3), lambda outputs, targets: (outputs - targets).abs().mean())
    with pytest.raises(cv.BadObjective, match="no closed-form Hessian here, which kfac needs"):
        cv.kfac(objective)
    assert cv.trace(cv.kfac(objective, fisher="input-only")).value > 0


class TimeMajor(nn.Module):
    """Causal along the first axis: the first entry depends on no other, the others on it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(3, 4), nn.Linear(4, 2)
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.head((self.layer(x).tanh() * self.scale).cumsum(0))


def test_models_that_are_causal_along_their_first_axis_are_found_out():
    objective = of(TimeMajor().double(), torch.randn(5, 3).double(), "cross-entropy")
    assert cv.kfac(objective).source["diagonal"]["layer.weight"] == "its layer mixes examples"
    torch.testing.assert_close(
        cv.ggn_diagonal(objective).entries, cv.ggn(objective).dense().diagonal(), rtol=1e-10, atol=1e-12
    )


def test_positions_are_shared_by_all_examples_in_training_too():
    objective = of(Positioned().double(), torch.randint(0, 6, (4, 4)), "cross-entropy", mode="train")
    torch.testing.assert_close(
        cv.ggn_diagonal(objective).entries, cv.ggn(objective).dense().diagonal(), rtol=1e-10, atol=1e-12
    )


@pytest.mark.parametrize("fisher", ["sampled", "type-2", "empirical"])
def test_batches_without_terms_have_no_part_wherever_they_come(fisher):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(6, 4), nn.LayerNorm(4), nn.Linear(4, 3)).double()
    ids, labels = torch.randint(0, 6, (5, 4)), torch.randint(0, 3, (5, 4))
    ignored = ids[:2], torch.full((2, 4), -100)
    loss = cv.CrossEntropy(axis=-1)
    expected = cv.kfac(cv.Objective.of(model, loss, [(ids, labels)]), fisher=fisher).dense()
    for batches in ([ignored, (ids, labels)], [(ids, labels), ignored]):
        found = cv.kfac(cv.Objective.of(model, loss, batches), fisher=fisher).dense()
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_padding_has_no_part_in_the_factors_of_an_embedding():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(6, 4, padding_idx=0), nn.Linear(4, 3)).double()
    ids, labels = torch.randint(1, 6, (5, 3)), torch.randint(0, 3, (5, 3))
    padded = F.pad(ids, (0, 4)), F.pad(labels, (0, 4), value=-100)
    loss = cv.CrossEntropy(axis=-1)
    plain, more = (
        cv.kfac(cv.Objective.of(model, loss, [batch]), fisher="type-2").blocks["0"].dense()
        for batch in ((ids, labels), padded)
    )
    torch.testing.assert_close(more, plain, rtol=1e-10, atol=1e-12)


def test_buffers_of_parametrizations_are_not_touched():
    torch.manual_seed(0)
    spectral = nn.utils.parametrizations.spectral_norm(nn.Linear(4, 5))
    model = nn.Sequential(spectral, nn.Tanh(), nn.Linear(5, 3)).double()
    objective = of(model, torch.randn(6, 4).double(), "cross-entropy")
    with untouched(model):
        A = cv.kfac(objective)
    assert list(A.source["diagonal"]) == ["0.parametrizations.weight.original"]


class LayerNorm2d(nn.LayerNorm):
    """Channels first, as convolutional networks write it."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class FanIn(nn.Linear):
    """A weight (in, out)."""

    def __init__(self) -> None:
        super().__init__(3, 2)
        self.weight = nn.Parameter(torch.randn(3, 2))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


class GatedRMSNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        return F.rms_norm(x, (3,)) * self.weight * gate


class Unlike(nn.Module):
    """Layers that are like their kinds by name or class alone."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear, self.gated = LayerNorm2d(3), FanIn(), GatedRMSNorm()

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x).mean((2, 3))
        return self.linear(self.gated(h, h.sigmoid()))


def test_layers_that_are_unlike_their_kind_get_an_exact_diagonal():
    objective = of(Unlike().double(), torch.randn(5, 3, 4, 2).double(), "cross-entropy")
    A = cv.kfac(objective, fisher="type-2")
    assert {name.rpartition(".")[0] for name in A.source["diagonal"]} >= {"norm", "gated"}
    torch.testing.assert_close(
        cv.ggn_diagonal(objective).entries, cv.ggn(objective).dense().diagonal(), rtol=1e-10, atol=1e-12
    )


@pytest.mark.parametrize("make", [cv.ekfac, cv.ggn_diagonal])
def test_input_only_is_for_kfac_alone(make):
    with pytest.raises(ValueError, match="fisher is 'type-2', 'sampled' or 'empirical', but got 'input-only'"):
        make(of(nn.Linear(3, 2), torch.randn(4, 3)), fisher="input-only")


class Masked(nn.Module):
    """Positions that see each other as a mask among the inputs says, and add a learned bias: no layer's parameter."""

    def __init__(self, into: int = 3, width: int = 2) -> None:
        super().__init__()
        self.before, self.after = nn.Linear(into, width), nn.Linear(width, 2)
        self.shift = nn.Parameter(torch.randn(width))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.after(torch.tanh(torch.softmax(mask, -1) @ self.before(x) + self.shift))


@pytest.mark.parametrize("examples", [2, 4], ids=["another number of examples", "as many as positions"])
def test_what_belongs_to_all_examples_is_not_cut_whatever_its_length(examples):
    """A mask (T, T) of T = 4 positions: with four examples its first axis is as long as theirs."""
    torch.manual_seed(0)
    module, mask = Masked().double(), torch.randn(4, 4).double()
    inputs, targets = torch.randn(examples, 4, 3).double(), torch.randn(examples, 4, 2).double()
    objective = cv.Objective.of(module, "mse", [(inputs, mask, targets)])
    A = cv.ggn_diagonal(objective)
    assert A.source["fisher"] == "type-2" and list(cv.kfac(objective).source["diagonal"]) == ["shift"]
    torch.testing.assert_close(A.entries, cv.ggn(objective).dense().diagonal(), rtol=1e-10, atol=1e-12)


class Flat(nn.Module):
    """The outputs of all positions in one row after another, as some language models return their logits."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x).flatten(0, 1)


@pytest.mark.parametrize("make", [cv.kfac, cv.ekfac, cv.ggn_diagonal])
@pytest.mark.parametrize("fisher", ["type-2", "empirical", "sampled"])
def test_outputs_may_be_flat_over_the_positions_of_an_example(make, fisher):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.RNN(5, 3, batch_first=True), First(), nn.Linear(3, 2))
    inputs, targets = torch.randn(5, 3, 4).double(), torch.randint(0, 2, (5, 3))
    module = module.double()
    shaped = cv.Objective.of(module, cv.CrossEntropy(axis=-1), [(inputs, targets)])
    flat = cv.Objective.of(Flat(module), "cross-entropy", [(inputs, targets.flatten())])
    A, B = make(shaped, fisher=fisher), make(flat, fisher=fisher)
    torch.testing.assert_close(B.dense(), A.dense(), rtol=1e-10, atol=1e-12)
    if make is cv.kfac:
        assert len(B.source["diagonal"]) == 4 and isinstance(B.blocks["inner.0"], cv.Kronecker)  # the RNN's
    if make is cv.ggn_diagonal and fisher == "type-2":
        torch.testing.assert_close(B.entries, cv.ggn(flat).dense().diagonal(), rtol=1e-10, atol=1e-12)


class First(nn.Module):
    def forward(self, both: tuple[Tensor, Tensor]) -> Tensor:
        return both[0]


class Fickle(nn.Module):
    """A layer that is called for each example in some batches, and in others for one more."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        if len(x) == 4:
            return self.last(torch.tanh(self.first(torch.cat([x, x[:1]]))[:-1]))
        return self.last(torch.tanh(self.first(x)))


def test_a_layer_that_a_later_batch_uses_otherwise_is_left_to_the_others():
    torch.manual_seed(0)
    objective = of(Fickle().double(), torch.randn(12, 3).double(), sizes=(5, 4, 3))
    dense = cv.ggn(objective).dense()
    torch.testing.assert_close(cv.ggn_diagonal(objective).entries, dense.diagonal(), rtol=1e-10, atol=1e-12)
    for make in (cv.kfac, cv.ekfac):
        A = make(objective, fisher="type-2")
        assert list(A.blocks) == ["last", "first.weight", "first.bias"]
        assert A.source["diagonal"] == dict.fromkeys(
            ("first.weight", "first.bias"), "its layer is not called for each example"
        )
        torch.testing.assert_close(A.blocks["first.bias"].entries, dense.diagonal()[12:16], rtol=1e-10, atol=1e-12)


def test_layers_without_gradients_are_layers():
    """A head of zeros, as many fine-tuned models begin with: nothing comes back to what is below."""
    module = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    nn.init.zeros_(module[2].weight)
    A = cv.kfac(of(module, torch.randn(5, 3).double()), fisher="type-2")
    assert not A.source["diagonal"] and not A.blocks["0"].dense().any() and A.blocks["2"].dense().any()


def test_factors_that_do_not_fit_are_refused_before_the_data_are_read(monkeypatch):
    module = nn.Sequential(nn.Linear(3, 50), nn.Linear(50, 2)).double()
    objective = of(module, torch.randn(5, 3).double())
    objective.check()
    monkeypatch.setattr("curvature.linalg.memory.free_bytes", lambda device: 8 * (50 + 4) ** 2 / 0.8)
    reads = objective.meter.passes
    with pytest.raises(cv.TooLarge, match=r"Kronecker factors take .* free.*Leave the largest layer out, 1:"):
        cv.kfac(objective)
    assert objective.meter.passes == reads
    assert cv.kfac(objective.narrowed("0.*")).blocks


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def is_exact(objective: cv.Objective) -> None:
    dense = cv.ggn(objective).dense().diagonal()
    assert relative(cv.ggn_diagonal(objective).entries, dense) < 1e-9


class Gated(nn.Module):
    """A branch that begins with a factor of zero, as ReZero, LayerScale and LoRA have it: outputs do not show it."""

    def __init__(self, branch: nn.Module) -> None:
        super().__init__()
        self.into, self.branch, self.out = nn.Linear(4, 5), branch, nn.Linear(5, 3)
        self.gate = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        x = self.into(x)
        return self.out(x + self.gate * self.branch(torch.tanh(x)))


class Centred(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0)


@pytest.mark.parametrize("branch", [nn.Dropout(0.3), nn.BatchNorm1d(5), Centred()], ids=lambda b: type(b).__name__)
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_examples_that_meet_where_outputs_do_not_show_it_go_with_their_batch(branch, mode):
    torch.manual_seed(0)
    is_exact(of(Gated(branch).double(), torch.randn(6, 4).double(), "cross-entropy", mode=mode))


class Graphs(nn.Module):
    """Nodes of graphs that are added up: what an example is, the first few rows do not tell."""

    def __init__(self) -> None:
        super().__init__()
        self.node, self.out = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor, graph: Tensor) -> Tensor:
        h = torch.tanh(self.node(x))
        return self.out(h.new_zeros(int(graph.max()) + 1, 5).index_add(0, graph, h))


@pytest.mark.parametrize("sizes", [(3, 5), (4, 4), (3, 4, 5)], ids=str)
def test_rows_of_several_lengths_are_not_taken_for_examples(sizes):
    torch.manual_seed(0)
    graph = torch.cat([torch.full((size,), index) for index, size in enumerate(sizes)])
    batch = (torch.randn(len(graph), 4).double(), graph, torch.randint(0, 3, (len(sizes),)))
    is_exact(cv.Objective.of(Graphs().double(), "cross-entropy", [batch]))


class Unpadded(nn.Module):
    """Only tokens that the mask keeps go through the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.out = nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        h = torch.zeros_like(x)
        h[mask] = torch.tanh(self.layer(x[mask]))
        return self.out(h.sum(1))


@pytest.mark.parametrize("lengths", [((4, 4, 4), (4, 1, 1)), ((3, 3, 3), (4, 3, 2))], ids=str)
def test_layers_that_see_other_tokens_in_a_later_batch_are_found_out(lengths):
    torch.manual_seed(0)
    masks = [torch.arange(4)[None] < torch.tensor(own)[:, None] for own in lengths]
    batches = [(torch.randn(3, 4, 3).double(), mask, torch.randint(0, 2, (3,))) for mask in masks]
    is_exact(cv.Objective.of(Unpadded().double(), "cross-entropy", batches))


class Sometimes(nn.Module):
    """A layer whose weight some batches use without it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.out = nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        return self.out(torch.tanh(F.linear(h, self.first.weight, self.first.bias)) if x.sum() > 50 else h)


def test_a_weight_that_a_later_batch_uses_without_its_layer_is_found_out():
    torch.manual_seed(0)
    x = torch.randn(8, 3).double()
    objective = of(Sometimes().double(), torch.cat([x[:4], x[4:] + 9]), "cross-entropy", sizes=(4, 4))
    is_exact(objective)
    assert list(cv.kfac(objective).source["diagonal"]) == ["first.weight", "first.bias"]


class Groups(nn.Module):
    """Examples see others of their group; the first is alone in its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.out = nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        group = torch.tensor([0, 1, 1, 1, 2, 2])
        near = (group[:, None] == group).to(x.dtype)
        return self.out(near @ torch.tanh(self.first(x)))


def test_examples_that_meet_are_found_wherever_they_are():
    torch.manual_seed(0)
    objective = of(Groups().double(), torch.randn(6, 3).double(), "cross-entropy")
    is_exact(objective)
    assert set(cv.ekfac(objective).source["diagonal"].values()) == {"its layer mixes examples"}


@pytest.mark.parametrize("norm", [nn.BatchNorm1d(5), nn.GroupNorm(1, 5)], ids=lambda n: type(n).__name__)
def test_the_diagonal_is_exact_in_training_mode_too(norm):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 5), norm, nn.Tanh(), nn.Dropout(0.2), nn.Linear(5, 3)).double()
    is_exact(of(module, torch.randn(6, 4).double(), "cross-entropy", mode="train"))


class Positions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(7, 4), nn.Embedding(5, 4)
        self.layer, self.out = nn.Linear(4, 4), nn.Linear(4, 7)

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        return self.out(torch.tanh(self.layer(self.tokens(input_ids) + self.places(position_ids))))


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_the_order_of_the_inputs_has_no_influence(sharing):
    torch.manual_seed(0)
    module, ids = Positions().double(), torch.randint(0, 7, (6, 5))
    own, shared, labels = {"input_ids": ids}, {"position_ids": torch.arange(5)[None]}, {"labels": ids.roll(1, 1)}
    first, second = (
        cv.kfac(cv.Objective.of(module, cv.CrossEntropy(axis=-1), [batch]), fisher="empirical", sharing=sharing)
        for batch in ({**own, **shared, **labels}, {**shared, **own, **labels})
    )
    torch.testing.assert_close(first.dense(), second.dense(), rtol=1e-12, atol=1e-14)


class Dropped(nn.Module):
    """A layer that is left out in training."""

    def __init__(self) -> None:
        super().__init__()
        self.maybe, self.out = nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(x if self.training else self.maybe(x))


@pytest.mark.parametrize("make", [cv.kfac, cv.ekfac])
def test_layers_that_no_batch_calls_are_listed(make):
    objective = of(Dropped().double(), torch.randn(6, 3).double(), "cross-entropy", mode="train")
    A = make(objective)
    assert A.source["diagonal"] == dict.fromkeys(["maybe.weight", "maybe.bias"], "its layer is never called")
    assert not A.blocks["maybe.weight"].entries.any()
    is_exact(objective)


def test_all_residuals_are_never_held_at_once():
    """6 positions of 8 classes: 48 residuals, each as large as the outputs."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.GRU(4, 4, batch_first=True), First(), nn.Linear(4, 8)).double()
    objective = of(module, torch.randn(2, 6, 4).double(), "cross-entropy", select="0.*")
    alive: list[weakref.ref] = []
    most = 0

    def counting(*arguments, each=layerwise.one_term_each):
        nonlocal most
        for residual in each(*arguments):
            alive.append(weakref.ref(residual))
            most = max(most, sum(ref() is not None for ref in alive))
            yield residual

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layerwise, "one_term_each", counting)
        entries = cv.ggn_diagonal(objective).entries
    assert len(alive) == 48 and most <= 2 * layerwise.CHUNK
    torch.testing.assert_close(entries, cv.ggn(objective).dense().diagonal(), rtol=1e-10, atol=1e-12)


def test_an_embedding_that_sees_padding_alone_has_a_block_of_zeros():
    module = nn.Sequential(nn.Embedding(5, 4, padding_idx=1), nn.Flatten(), nn.Linear(8, 3)).double()
    for fisher in ("type-2", "input-only"):
        A = cv.kfac(of(module, torch.ones(4, 2, dtype=torch.long), "cross-entropy"), fisher=fisher)
        assert not A.blocks["0"].dense().any()


def test_outputs_without_an_axis_are_refused_with_the_fix():
    class Squeezed(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).squeeze()

    objective = cv.Objective.of(Squeezed(3, 1), "mse", [(torch.randn(1, 3), torch.randn(()))])
    with pytest.raises(cv.BadObjective, match=r"single number.* squeeze\(-1\) instead of squeeze\(\)"):
        cv.ggn_diagonal(objective)


def test_norms_that_draw_random_numbers_do_not_use_them_up():
    class DropoutLayerNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.ones(4)), nn.Parameter(torch.zeros(4))

        def forward(self, x: Tensor) -> Tensor:
            return F.layer_norm(F.dropout(x, 0.3, self.training), (4,), self.weight, self.bias)

    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 4), DropoutLayerNorm(), nn.Dropout(0.5), nn.Linear(4, 2)).double()
    is_exact(of(module, torch.randn(6, 3).double(), "cross-entropy", mode="train"))
