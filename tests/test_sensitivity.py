"""Sensitivities against closed forms: traces, eigenvalues, gradients, divergences; and as a loss for the exact search."""

from __future__ import annotations

import copy
import json
import math
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from commands import environment
from scipy.stats import spearmanr
from sklearn.linear_model import Ridge
from torch import Tensor, nn

from eqnet.nn.supernet import Supernet
from eqnet.scoring.curvature import block_traces, top_eigenvalue
from eqnet.scoring.evaluation import class_divergence
from eqnet.scoring.scores import SCORES
from eqnet.scoring.sensitivity import (
    Sensitivity,
    floating_point,
    normalised_error,
    perturbations,
    probed_loss,
)
from eqnet.search import exact_search
from eqnet.space import Budget, QuantFormat

Batch = tuple[Tensor, Tensor]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def nothing() -> None:
    pass


@pytest.fixture(scope="module")
def accelerator() -> Accelerator:
    return Accelerator(cpu=True)


@pytest.fixture
def batches(images: Callable[..., Tensor]) -> list[Batch]:
    return [(images(6, seed=s), torch.randint(0, 5, (6,), generator=generator(s))) for s in (1, 2)]


@pytest.fixture
def supernet(cnn: nn.Module, images: Callable[..., Tensor]) -> Supernet:
    net = Supernet.from_model(cnn, (3, 8, 8), bits=[2, 4, 8], fixed="none")
    net.calibrate(images(16))
    return net.eval()


def quadratic(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """(1/2 x'Ax at a random point, x)."""
    x = torch.randn(len(matrix), generator=generator(9), dtype=matrix.dtype, requires_grad=True)
    return 0.5 * x @ matrix @ x, x


def symmetric(n: int, seed: int = 0) -> Tensor:
    a = torch.randn(n, n, generator=generator(seed), dtype=torch.float64)
    return a @ a.T


# -- traces -----------------------------------------------------------------------------------------------------------


def test_one_sample_is_exact_for_a_diagonal_hessian() -> None:
    diagonal = torch.arange(1.0, 8.0, dtype=torch.float64)
    for seed in range(3):
        loss, x = quadratic(torch.diag(diagonal))
        trace, error, count = block_traces(loss, [[x]], generator(seed), max_samples=2)
        assert trace.item() == pytest.approx(28.0, rel=1e-12)
        assert error.item() == pytest.approx(0.0, abs=1e-9)
        assert count == 2


def test_the_mean_and_variance_of_samples_follow_the_formula() -> None:
    matrix = symmetric(12)
    loss, x = quadratic(matrix)
    trace, error, count = block_traces(loss, [[x]], generator(1), tolerance=0.0, max_samples=4000)
    variance = 2 * (matrix.square().sum() - matrix.diagonal().square().sum())
    assert count == 4000
    assert abs(trace - matrix.trace()) < 3 * math.sqrt(variance / count)
    assert error.item() ** 2 * count == pytest.approx(variance.item(), rel=0.15)


def test_sampling_stops_by_the_standard_error() -> None:
    loss, x = quadratic(symmetric(12) + 50 * torch.eye(12, dtype=torch.float64))
    trace, error, count = block_traces(loss, [[x]], generator(2), tolerance=0.01, max_samples=2000)
    assert error <= 0.01 * trace
    assert 4 <= count < 2000


def test_blocks_agree_with_the_exact_hessian_of_a_two_layer_net() -> None:
    torch.manual_seed(3)
    first = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    second = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    x, labels = torch.randn(20, 3, dtype=torch.float64), torch.randint(0, 2, (20,))

    def loss_of(flat: Tensor) -> Tensor:
        a, b = flat[:12].view(4, 3), flat[12:].view(2, 4)
        return F.cross_entropy(torch.tanh(x @ a.T) @ b.T, labels)

    exact = torch.func.hessian(loss_of)(torch.cat([first.detach().flatten(), second.detach().flatten()]))
    loss = F.cross_entropy(torch.tanh(x @ first.T) @ second.T, labels)
    trace, error, _ = block_traces(loss, [[first], [second]], generator(4), tolerance=0.0, max_samples=500)
    assert abs(trace[0] - exact[:12, :12].trace()) < 3 * error[0]
    assert abs(trace[1] - exact[12:, 12:].trace()) < 3 * error[1]
    whole, whole_error, _ = block_traces(loss, [[first, second]], generator(5), tolerance=0.0, max_samples=500)
    assert abs(whole - exact.trace()) < 3 * whole_error


def test_the_trace_of_logistic_regression_has_its_closed_form() -> None:
    torch.manual_seed(6)
    x, labels = torch.randn(50, 8, dtype=torch.float64), torch.randint(0, 2, (50,)).double()
    w = torch.randn(8, dtype=torch.float64, requires_grad=True)
    loss = F.binary_cross_entropy_with_logits(x @ w, labels, reduction="sum")
    trace, error, _ = block_traces(loss, [[w]], generator(7), tolerance=0.0, max_samples=400)
    p = torch.sigmoid(x @ w).detach()
    exact = (p * (1 - p) * x.square().sum(1)).sum()
    assert abs(trace - exact) < 3 * error
    assert error < 0.1 * exact


def test_a_linear_loss_has_no_curvature() -> None:
    x = torch.randn(5, requires_grad=True)
    trace, _, _ = block_traces(x.sum(), [[x]], generator())
    assert trace.item() == 0
    assert top_eigenvalue((2 * x).sum(), [x], generator()) == 0


def test_a_loss_without_gradient_is_refused() -> None:
    with pytest.raises(ValueError, match="no gradient"):
        block_traces(torch.ones(()), [[torch.ones(3, requires_grad=True)]], generator())


def test_half_the_trace_is_the_mean_loss_of_random_changes() -> None:
    matrix = symmetric(10, 8)
    changes = 0.3 * torch.randn(20000, 10, generator=generator(10), dtype=torch.float64)
    changed = 0.5 * torch.einsum("ni,ij,nj->n", changes, matrix, changes).mean()
    loss, x = quadratic(matrix)
    trace, _, _ = block_traces(loss, [[x]], generator(11), tolerance=0.005, max_samples=3000)
    assert changed.item() == pytest.approx(0.5 * 0.3**2 * trace.item(), rel=0.03)


@pytest.mark.parametrize("sign", [1, -1])
def test_power_iteration_finds_the_largest_eigenvalue_with_its_sign(sign: int) -> None:
    matrix = sign * symmetric(15, 12)
    loss, x = quadratic(matrix)
    values = [top_eigenvalue(loss, [x], generator(seed), iterations=500, tolerance=1e-6) for seed in range(3)]
    exact = torch.linalg.eigvalsh(matrix)
    largest = exact[exact.abs().argmax()].item()
    assert values == pytest.approx([largest] * 3, rel=1e-3)
    assert abs(values[0]) <= abs(matrix.trace().item())


# -- scores -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("score", SCORES)
def test_every_score_gives_a_table_that_the_exact_search_takes(
    score: str, supernet: Supernet, batches: list[Batch], accelerator: Accelerator
) -> None:
    before, state = supernet.config, copy.deepcopy(supernet.state_dict())
    steps: list[int] = []
    found = SCORES[score](supernet, supernet.space, batches, accelerator, lambda: steps.append(1))
    assert len(steps) == len(batches) * len(supernet.layers)
    assert supernet.config == before
    assert all(torch.equal(state[name], value) for name, value in supernet.state_dict().items())
    loss = found.loss(supernet.space)
    space = supernet.space
    form = space.forms[0]
    values = [loss.of(space.uniform(bits, form)) for bits in (2, 4, 8)]
    assert values[0] > values[1] > values[2] >= 0
    again = SCORES[score](supernet, supernet.space, batches, accelerator, nothing)
    assert again.to_json() == found.to_json()
    budget = Budget.parse("w=4,a=4").bind(space)
    best = exact_search(loss, budget.costs, budget.limits, forms=space.forms)
    assert best.optimal
    assert best.loss <= loss.of(space.uniform(4, form)) * (1 + 1e-9)
    narrow = space.restrict_form(form)
    assert found.loss(narrow).of(narrow.uniform(4, form)) == pytest.approx(values[1], rel=1e-12)
    alone = SCORES[score](supernet, narrow, batches, accelerator, nothing)
    assert alone.loss(narrow).of(narrow.uniform(4, form)) == pytest.approx(values[1], rel=1e-12)


def test_errors_fall_with_bits_and_scale_with_the_weights(
    supernet: Supernet, batches: list[Batch], accelerator: Accelerator, images: Callable[..., Tensor]
) -> None:
    errors = perturbations(supernet, supernet.space, batches, accelerator, nothing)
    for (name, slot), values in errors.items():
        formats = supernet.space.choices(name, slot)
        for form in {(f.symmetric, f.granularity) for f in formats}:
            by_bits = [values[i] for i, f in enumerate(formats) if (f.symmetric, f.granularity) == form]
            assert sorted(by_bits, reverse=True) == by_bits, (name, slot)
    with torch.no_grad():
        for layer in supernet.layers.values():
            layer.latent_weight.mul_(3)
    supernet.calibrate(images(16))
    scaled = perturbations(supernet, supernet.space, batches, accelerator, nothing)
    for name in supernet.layers:
        torch.testing.assert_close(scaled[name, "weight"], 9 * errors[name, "weight"], rtol=1e-3, atol=1e-9)


@pytest.fixture
def linear(images: Callable[..., Tensor]) -> Supernet:
    """One linear layer: every score has a closed form."""
    net = Supernet.from_model(nn.Sequential(nn.Flatten(), nn.Linear(12, 4)), (3, 2, 2), bits=[2, 4], fixed="none")
    net.calibrate(images(16, (3, 2, 2)))
    return net.eval()


def linear_batches(images: Callable[..., Tensor]) -> list[Batch]:
    return [(images(5, (3, 2, 2), seed=s), torch.randint(0, 4, (5,), generator=generator(s))) for s in (3, 4)]


def test_scores_of_a_linear_layer_equal_their_formulas(
    linear: Supernet, accelerator: Accelerator, images: Callable[..., Tensor]
) -> None:
    data = linear_batches(images)
    (layer,) = linear.layers.values()
    name, weight, quantizer = "1", layer.latent_weight.detach(), layer.weight_quantizer
    x, labels = torch.cat([b[0] for b in data]).flatten(1), torch.cat([b[1] for b in data])
    with floating_point(linear):
        logits = linear(x.view(-1, 3, 2, 2)).detach()
    p = logits.softmax(1)
    residual = p - F.one_hot(labels, 4)
    fmt = QuantFormat(2, True, "channel")
    quantizer.select(fmt)
    change = (quantizer(weight) - weight).detach()

    def value(score: str) -> float:
        return SCORES[score](linear, linear.space, data, accelerator, nothing).tables[name, "weight"][fmt]

    assert value("squared_error") == pytest.approx(change.square().sum().item(), rel=1e-5)
    output = x @ change.T
    assert value("gradient") == pytest.approx((residual * output).square().sum(1).mean().item(), rel=1e-4)
    slopes = torch.stack([residual[i : i + 5].T @ x[i : i + 5] for i in (0, 5)])
    assert value("fisher") == pytest.approx(((slopes * change).square().sum() / 10).item(), rel=1e-4)
    relative = (output.square().sum(1) / logits.square().sum(1)).mean().item()
    assert value("output_error") == pytest.approx(2 * relative, rel=1e-4)  # the layer's output is the logits too
    q = (logits + output).log_softmax(1)
    assert value("kl") == pytest.approx((p * (p.log() - q)).sum(1).mean().item(), rel=1e-3)
    curvature = ((p * (1 - p)).sum(1) * x.square().sum(1)).mean().item()  # trace of the softmax regression
    facts = SCORES["hessian"](linear, linear.space, data, accelerator, nothing).facts
    error = facts["standard_error"]["1.weight"]
    assert abs(facts["trace_per_element"]["1.weight"] - curvature / 48) < 3 * error
    assert error < 0.5 * curvature / 48


def test_the_gradient_score_is_zero_without_a_change_and_quadratic_in_it(
    linear: Supernet, accelerator: Accelerator, images: Callable[..., Tensor]
) -> None:
    data = linear_batches(images)
    (layer,) = linear.layers.values()
    fmt = QuantFormat(4, True, "tensor")
    quantizer = layer.weight_quantizer
    quantizer.select(fmt)
    with torch.no_grad():
        on_grid = quantizer(layer.latent_weight).clone()
        layer.latent_weight.copy_(on_grid)

    def score(eps: float) -> float:
        with torch.no_grad():
            layer.latent_weight.copy_(on_grid + eps * quantizer.scale.min() * 1e-2)
        return SCORES["gradient"](linear, linear.space, data, accelerator, nothing).tables["1", "weight"][fmt]

    assert score(0.0) == pytest.approx(0.0, abs=1e-9)
    assert score(4.0) / score(2.0) == pytest.approx(4.0, rel=0.05)


def test_divergences_and_errors_of_outputs() -> None:
    a, b = torch.randn(6, 5, generator=generator(1)), torch.randn(6, 5, generator=generator(2))
    assert class_divergence(a, a).item() == pytest.approx(0.0, abs=1e-12)
    assert class_divergence(a, b) > 0
    assert class_divergence(a, b + 7).item() == pytest.approx(class_divergence(a, b).item(), rel=1e-6)
    assert normalised_error(a, a).item() == 0
    assert normalised_error(a, 0 * a).item() == pytest.approx(6.0, rel=1e-6)


def test_products_with_the_hessian_are_symmetric(supernet: Supernet, batches: list[Batch]) -> None:
    with floating_point(supernet):
        _, probes, loss = probed_loss(supernet, *batches[0], reduction="mean")
        flat = [probe for calls in probes.values() for probe in calls]
        slopes = torch.autograd.grad(loss, flat, create_graph=True)
        u, v = ([torch.randn(p.shape, generator=generator(s)) for p in flat] for s in (1, 2))

        def times(w: list[Tensor]) -> tuple[Tensor, ...]:
            return torch.autograd.grad(slopes, flat, w, retain_graph=True)

        left = sum(float((a * b).sum().double()) for a, b in zip(u, times(v), strict=True))
        right = sum(float((a * b).sum().double()) for a, b in zip(v, times(u), strict=True))
    assert left == pytest.approx(right, rel=1e-4)


class Scaled(nn.Module):
    """The logits of a linear layer with its weights multiplied by `factor`, divided by it again: the same function."""

    def __init__(self, weight: Tensor, factor: float) -> None:
        super().__init__()
        self.fc, self.factor = nn.Linear(12, 4, bias=False), factor
        self.fc.weight.data.copy_(factor * weight)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc(x.flatten(1)) / self.factor
        return out


@pytest.mark.parametrize("score", ["hessian", "eigenvalue", "fisher", "gradient", "kl"])
def test_the_scale_of_weights_does_not_matter(
    score: str, accelerator: Accelerator, images: Callable[..., Tensor]
) -> None:
    weight, found = torch.randn(4, 12, generator=generator(5)), []
    for factor in (1.0, 4.0):  # a power of two: no rounding
        net = Supernet.from_model(Scaled(weight, factor), (3, 2, 2), bits=[2, 4, 8], fixed="none")
        net.calibrate(images(16, (3, 2, 2)))
        found.append(SCORES[score](net.eval(), net.space, linear_batches(images), accelerator, nothing))
    if score != "hessian":
        one, other = (list(f.tables["fc", "weight"].values()) for f in found)
        assert one == pytest.approx(other, rel=1e-4)
        return
    # H becomes H / 16, but the samples of all blocks are drawn together, so the noise of an estimate is not that of one block
    traces, errors = ([f.facts[k]["fc.weight"] for f in found] for k in ("trace_per_element", "standard_error"))
    assert abs(traces[0] - 16 * traces[1]) < 3 * math.hypot(errors[0], 16 * errors[1])


def test_scores_that_weight_bits_are_linear_and_ridge_on_bits_bounds_them(supernet: Supernet) -> None:
    space = supernet.space.restrict_form(supernet.space.forms[0])
    rng = np.random.default_rng(0)
    genomes = space.random_genomes(rng, 600)
    bits = space.bits[np.arange(space.num_genes), genomes].astype(float)
    true = rng.random(space.num_genes)
    accuracy = bits @ true + rng.normal(size=600)

    def bit_weighted(weights: np.ndarray) -> np.ndarray:
        factor = {key: weights[gene] for key, gene in space.gene_of.items()}
        tables = {key: {fmt: factor[key] * fmt.bits for fmt in space.choices(*key)} for key in space.gene_of}
        loss = Sensitivity("bits", tables).loss(space)(genomes)
        np.testing.assert_allclose(loss, bits @ weights, rtol=1e-12)  # z(b) = sum m_l b_l
        return loss

    half = slice(300, None)
    ridge = Ridge(alpha=1.0).fit(bits[:300], accuracy[:300])
    reference = spearmanr(bit_weighted(ridge.coef_)[half], accuracy[half]).statistic
    best = spearmanr(bit_weighted(true)[half], accuracy[half]).statistic
    others = [spearmanr(bit_weighted(rng.random(len(true)))[half], accuracy[half]).statistic for _ in range(20)]
    assert max(others) < best
    assert reference > best - 0.02


TWO_PROCESSES = """
import json, sys
import torch
from accelerate import Accelerator
from torch import nn
from eqnet.nn.supernet import Supernet
from eqnet.scoring.evaluation import class_divergence
from eqnet.scoring.scores import SCORES

torch.manual_seed(0)
torch.set_num_threads(1)
accelerator = Accelerator(cpu=True)
model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5))
net = Supernet.from_model(model, (3, 6, 6), bits=[2, 4, 8], fixed="none").eval()
images, labels = torch.randn(15, 3, 6, 6), torch.randint(0, 5, (15,))
net.calibrate(images)
batches = list(zip(images.split(4), labels.split(4)))  # 4 batches, one of them smaller
found = {name: score(net, net.space, batches, accelerator, lambda: None) for name, score in SCORES.items()}
assert accelerator.num_processes == int(sys.argv[2])
if accelerator.is_main_process:
    json.dump({name: table.to_json() for name, table in found.items()}, open(sys.argv[1], "w"))
"""


def test_two_processes_score_like_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "scores.py"
    script.write_text(TWO_PROCESSES)
    monkeypatch.setattr(sys, "argv", ["scores.py", str(tmp_path / "1.json"), "1"])
    runpy.run_path(str(script))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += [str(script), str(tmp_path / "2.json"), "2"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    one, two = (json.loads((tmp_path / f"{count}.json").read_text()) for count in (1, 2))
    assert set(one) == set(SCORES)
    for name in SCORES:
        for a, b in zip(one[name]["table"], two[name]["table"], strict=True):
            value = a.pop("value")
            assert b.pop("value") == pytest.approx(value, rel=1e-5, abs=1e-12), (name, a)
            assert a == b
        assert one[name]["facts"].get("products") == two[name]["facts"].get("products")


# -- what cannot be scored ---------------------------------------------------------------------------------------------


class Unused(nn.Module):
    """A network with a layer that never runs."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.used(x.flatten(1))
        return out


@pytest.mark.parametrize("score", ["gradient", "fisher", "hessian", "eigenvalue"])
def test_a_layer_that_never_runs_is_named(score: str, accelerator: Accelerator, images: Callable[..., Tensor]) -> None:
    net = Supernet.from_model(Unused(), (1, 2, 2), bits=[2, 4], fixed="none")
    net.calibrate(images(8, (1, 2, 2)))
    with pytest.raises(ValueError, match="layer 'unused' never runs"):
        SCORES[score](net, net.space, [(images(4, (1, 2, 2)), torch.zeros(4, dtype=torch.int64))], accelerator, nothing)


def test_scores_need_images_and_calibration(
    supernet: Supernet, make_cnn: Callable[[], nn.Module], batches: list[Batch], accelerator: Accelerator
) -> None:
    with pytest.raises(ValueError, match="no image"):
        SCORES["kl"](supernet, supernet.space, [], accelerator, nothing)
    fresh = Supernet.from_model(make_cnn(), (3, 8, 8))
    with pytest.raises(ValueError, match="not calibrated"):
        SCORES["kl"](fresh, fresh.space, batches, accelerator, nothing)


def test_tables_that_do_not_fit_are_refused(supernet: Supernet, batches: list[Batch], accelerator: Accelerator) -> None:
    found = SCORES["squared_error"](supernet, supernet.space, batches, accelerator, nothing)
    key = next(iter(found.tables))
    with pytest.raises(ValueError, match="not finite"):
        Sensitivity("kl", {key: {QuantFormat(2): float("nan")}})
    with pytest.raises(ValueError, match=f"lacks layer '{key[0]}': weight at 2 bits"):
        Sensitivity("kl", {k: v for k, v in found.tables.items() if k != key}).loss(supernet.space)
    with pytest.raises(ValueError, match="not in the space: other"):
        Sensitivity("kl", {**found.tables, ("other", "weight"): {}}).loss(supernet.space)


def test_a_loss_adds_up_over_layers(supernet: Supernet, batches: list[Batch], accelerator: Accelerator) -> None:
    found = SCORES["kl"](supernet, supernet.space, batches, accelerator, nothing)
    space, loss = supernet.space, found.loss(supernet.space)
    config = space.sample(np.random.default_rng(0))
    by_hand = sum(
        found.tables[name, "weight"][c.weight] + (0 if c.act is None else found.tables[name, "act"][c.act])
        for name, c in config.items()
    )
    assert loss.of(config) == pytest.approx(by_hand, rel=1e-12)
    assert loss.format(1.5) == "1.50 loss"
