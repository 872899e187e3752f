"""Training-free proxies: each statistic is what its source defines, bits meet their own layers, scoring is vectorised."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from conftest import small_cnn
from scipy.stats import spearmanr
from torch import Tensor, nn

from eqnet.nn.supernet import Supernet
from eqnet.scoring.layer_statistics import NUMBER_NAMES, SAMPLE_NAMES, LayerStatistics, gather, linear_cka
from eqnet.scoring.proxies import PROXIES, LayerSum, additive_model, occupied, rounded_deviation
from eqnet.scoring.scores import SCORES
from eqnet.space import QuantConfig, QuantFormat, QuantSpace, bitops

Images = Callable[..., Tensor]
Batches = list[tuple[Tensor, Tensor]]


@pytest.fixture(scope="module")
def network() -> tuple[nn.Sequential, Supernet, Batches]:
    """A float network in eval mode, its calibrated supernet, and labelled images."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    model = small_cnn()
    batches = [(torch.randn(8, 3, 8, 8, generator=generator), torch.arange(8) % 5) for _ in range(2)]
    with torch.no_grad():
        model(batches[0][0])
    model.eval()
    supernet = Supernet.from_model(copy.deepcopy(model), (3, 8, 8), bits=[2, 3, 4], act_bits=[4, 8], fixed="none")
    supernet.calibrate(batches[0][0])
    return model, supernet.eval(), batches


@pytest.fixture(scope="module")
def statistics(network: tuple[nn.Sequential, Supernet, Batches]) -> LayerStatistics:
    _, supernet, batches = network
    return gather(supernet, supernet.space, batches, Accelerator())


def mean_loss_gradients(model: nn.Module, batches: Batches) -> dict[str, Tensor]:
    """Of the weights, averaged over batches."""
    total: dict[str, Tensor] = {}
    for images, labels in batches:
        model.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        for name, p in model.named_parameters():
            assert p.grad is not None
            total[name] = total.get(name, torch.zeros_like(p)) + p.grad / len(batches)
    return total


# -- statistics -------------------------------------------------------------------------------------------------------


def test_snip_is_the_gradient_of_masks(
    network: tuple[nn.Sequential, Supernet, Batches], statistics: LayerStatistics
) -> None:
    model, supernet, batches = network
    masks = {name: torch.ones_like(p, requires_grad=True) for name, p in model.named_parameters()}
    weights = {name: p.detach() for name, p in model.named_parameters()}
    loss = torch.stack(
        [
            F.cross_entropy(
                torch.func.functional_call(model, {n: w * masks[n] for n, w in weights.items()}, (images,)), labels
            )
            for images, labels in batches
        ]
    ).mean()
    slopes = dict(zip(masks, torch.autograd.grad(loss, list(masks.values())), strict=True))
    expected = [float(slopes[f"{layer.name}.weight"].abs().sum()) for layer in supernet.space.layers]
    np.testing.assert_allclose(statistics.numbers["snip_weight"], expected, rtol=1e-5)


def test_snip_of_inputs_and_fisher(
    network: tuple[nn.Sequential, Supernet, Batches], statistics: LayerStatistics
) -> None:
    model, _, batches = network
    snip, fisher = [], []
    for images, labels in batches:
        x = images.clone().requires_grad_()
        slope = torch.autograd.grad(F.cross_entropy(model(x), labels, reduction="sum"), x)[0]
        snip.append(float((x * slope).abs().sum()) / len(x))
        fisher.append(float((x * slope).sum((2, 3)).square().sum()) / (2 * len(x)))
    assert statistics.numbers["snip_act"][0] == pytest.approx(np.mean(snip), rel=1e-5)
    assert statistics.numbers["channel_fisher"][0] == pytest.approx(np.mean(fisher), rel=1e-5)


def test_grasp_is_the_derivative_of_the_gradient_norm(
    network: tuple[nn.Sequential, Supernet, Batches], statistics: LayerStatistics
) -> None:
    """t (H g) = t d(|g|^2 / 2)/dt where g is the gradient of all weights and inputs; checked with weights alone, rescaled."""
    _, supernet, batches = network
    images, labels = batches[0]
    from eqnet.scoring.sensitivity import floating_point, probed_loss

    with floating_point(supernet):
        values, probes, loss = probed_loss(supernet, images, labels, reduction="mean")
        flat = [p for calls in probes.values() for p in calls]
        slopes = torch.autograd.grad(loss, flat, create_graph=True)
        half = sum(s.square().sum() for s in slopes) / 2
        derivatives = dict(zip(probes, torch.autograd.grad(half, flat), strict=True))
    for i, name in enumerate(statistics.names):
        for slot in ("weight", "act"):
            key = (name, slot)
            expected = float((values[key][0] * derivatives[key]).sum())  # type: ignore[index]
            assert statistics.numbers[f"grasp_{slot}"][i] == pytest.approx(expected, rel=1e-3, abs=1e-6)


def test_synaptic_flow_is_conserved() -> None:
    """Without bias and normalisation the flow through every layer is the same, and equals R."""
    torch.manual_seed(3)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.ReLU(), nn.Conv2d(6, 4, 3, stride=2, bias=False), nn.ReLU(),
        nn.Flatten(), nn.Linear(36, 8, bias=False), nn.ReLU(), nn.Linear(8, 3, bias=False),
    )  # fmt: skip
    supernet = Supernet.from_model(model, (3, 8, 8), bits=[2, 4], fixed="none")
    images = torch.randn(8, 3, 8, 8)
    supernet.calibrate(images)
    found = gather(supernet, supernet.space, [(images, torch.zeros(8, dtype=torch.int64))], Accelerator(), scores=())
    np.testing.assert_allclose(found.numbers["synflow"], 1.0, rtol=1e-9)


def test_similarity_of_features() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(12, 7)), rng.normal(size=(12, 5))
    rotation = np.linalg.qr(rng.normal(size=(7, 7)))[0]
    assert linear_cka(x, x) == pytest.approx(1, abs=1e-12)
    assert linear_cka(x, 3 * x @ rotation) == pytest.approx(1, abs=1e-9)
    assert linear_cka(x @ rotation, 0.1 * y) == pytest.approx(linear_cka(x, y), abs=1e-12)
    a, b = x - x.mean(0), y - y.mean(0)
    in_features = np.linalg.norm(a.T @ b) ** 2 / (np.linalg.norm(a.T @ a) * np.linalg.norm(b.T @ b))
    assert linear_cka(x, y) == pytest.approx(in_features, abs=1e-9)
    assert linear_cka(x, np.ones((12, 3))) == 0


def test_orm_sums_over_the_other_layers(
    network: tuple[nn.Sequential, Supernet, Batches], statistics: LayerStatistics
) -> None:
    model, _, batches = network
    x, outputs = batches[0][0], []
    with torch.no_grad():
        for module in model:
            x = module(x)
            if isinstance(module, nn.Conv2d | nn.Linear):
                outputs.append(x.clone())
    for i, own in enumerate(outputs):
        others = [
            linear_cka(own.flatten(1).double().numpy(), o.flatten(1).double().numpy())
            for j, o in enumerate(outputs)
            if j != i
        ]
        assert statistics.numbers["orm"][i] == pytest.approx(sum(others), rel=1e-6)
        assert statistics.numbers["log_std"][i] == pytest.approx(np.log(float(own.double().std())), rel=1e-5)
    assert statistics.numbers["stage"].tolist() == [0, 0, 1, 1, 2]


def test_constants_of_the_quantization_entropy() -> None:
    """The published table holds the deviation of a standard normal variable, rounded and clamped."""
    table = {2: 1.008919, 3: 1.040803, 4: 1.040833, 8: 1.040833}
    for bits, value in table.items():
        assert rounded_deviation(bits) == pytest.approx(value, abs=1e-5)


def test_samples_are_of_the_same_elements(
    network: tuple[nn.Sequential, Supernet, Batches], statistics: LayerStatistics
) -> None:
    model, supernet, batches = network
    slopes = mean_loss_gradients(model, batches)
    for i, name in enumerate(statistics.names):
        weight = dict(model.named_parameters())[f"{name}.weight"].detach().flatten()
        layer = supernet.layers[name]
        for k in range(0, 256, 50):
            value = statistics.samples["weight_value"][i, 0, k]
            at = int((weight == value).nonzero()[0])
            assert weight[at] == value
            gradient = statistics.samples["weight_gradient"][i, 0, k]
            assert gradient == pytest.approx(float(slopes[f"{name}.weight"].flatten()[at]), rel=1e-4, abs=1e-8)
            quantizer = layer.weight_quantizer
            enabled, quantizer.enabled = quantizer.enabled, True
            for f, fmt in enumerate(supernet.space.choices(name, "weight")):
                quantizer.select(fmt)
                error = (quantizer(layer.float_weight) - layer.float_weight).flatten()[at]
                assert statistics.samples["weight_error"][i, f, k] == pytest.approx(float(error), abs=1e-6)
            quantizer.enabled = enabled


def test_counted_parameters_give_published_sizes() -> None:
    """ResNet-18 with BN (2 C) and the bias of its classifier: 11,689,512; at 4, 3 and 2 bits 5.574, 4.180 and 2.787 MiB."""
    import timm

    from eqnet.nn.supernet import trace_layers
    from eqnet.scoring.layer_statistics import _parameters

    for name, parameters, sizes in (
        ("resnet18", 11_689_512, {4: 5.574, 3: 4.180, 2: 2.787}),
        ("mobilenetv2_100", 3_504_872, {4: 1.671}),
    ):
        with torch.device("meta"):
            model = timm.create_model(name)
        layers = trace_layers(model, (3, 224, 224))
        space = QuantSpace.from_layers(layers, [2, 3, 4], [8], (True,), ("channel",), fixed="none")
        found = _parameters(Supernet(model, space), space)
        assert found.sum() == parameters
        numbers = {n: np.zeros(len(layers)) for n in NUMBER_NAMES} | {"parameters": found}
        statistics = LayerStatistics(space, {}, numbers, {})
        for bits, size in sizes.items():
            genome = space.encode(space.uniform(bits, space.forms[0], 8))[None]
            mib = PROXIES["bparams"].scores(statistics, genome)[0] / 8 / 2**20
            assert mib == pytest.approx(size, abs=6e-4)


def test_statistics_survive_their_file(statistics: LayerStatistics, tmp_path: Path) -> None:
    statistics.save(tmp_path / "s.safetensors")
    again = LayerStatistics.load(tmp_path / "s.safetensors", statistics.space)
    assert set(again.samples) == set(SAMPLE_NAMES)
    assert set(again.losses) == set(SCORES)
    rng = np.random.default_rng(0)
    genomes = statistics.space.random_genomes(rng, 20)
    for proxy in PROXIES.values():
        np.testing.assert_array_equal(proxy.scores(again, genomes), proxy.scores(statistics, genomes))
    fewer = QuantSpace.from_layers(statistics.space.layers[:-1], [2, 3, 4], [4, 8], fixed="none")
    with pytest.raises(ValueError, match="statistics of other layers than the space: 10"):
        LayerStatistics.load(tmp_path / "s.safetensors", fewer)
    narrow = statistics.space.restrict(lambda layer, slot, fmt: fmt.bits != 3)
    with pytest.raises(ValueError, match="another number of weight formats"):
        LayerStatistics.load(tmp_path / "s.safetensors", narrow)


def test_gathering_is_reproducible_and_leaves_the_supernet_alone(
    network: tuple[nn.Sequential, Supernet, Batches], statistics: LayerStatistics
) -> None:
    _, supernet, batches = network
    before = copy.deepcopy(supernet.state_dict())
    again = gather(supernet, supernet.space, batches, Accelerator())
    for name in NUMBER_NAMES:
        np.testing.assert_array_equal(again.numbers[name], statistics.numbers[name])
    for name in SAMPLE_NAMES:
        np.testing.assert_array_equal(again.samples[name], statistics.samples[name])
    assert all(torch.equal(t, before[name]) for name, t in supernet.state_dict().items())


# -- proxies ----------------------------------------------------------------------------------------------------------


def slow_score(proxy: LayerSum, statistics: LayerStatistics, config: QuantConfig) -> float:
    """Layer by layer, by name."""
    cells, space = proxy.cells(statistics), statistics.space
    total = 0.0
    for i, name in enumerate(statistics.names):
        w = space.choices(name, "weight").index(config[name].weight)
        act = config[name].act
        assert act is not None
        total += cells[i, w, space.choices(name, "act").index(act)]
    return total


@pytest.mark.parametrize("name", PROXIES)
def test_scores_are_sums_over_layers_by_name(name: str, statistics: LayerStatistics) -> None:
    proxy, rng = PROXIES[name], np.random.default_rng(0)
    genomes = statistics.space.random_genomes(rng, 16)
    expected = [slow_score(proxy, statistics, statistics.space.decode(g)) for g in genomes]
    scores = proxy.scores(statistics, genomes)
    np.testing.assert_allclose(scores, expected, rtol=1e-9, atol=1e-12)
    assert np.isfinite(scores).all()
    np.testing.assert_allclose(occupied(proxy.cells(statistics), statistics.space, genomes).sum(1), expected, rtol=1e-9)


def test_hand_made_formulas(statistics: LayerStatistics) -> None:
    space, rng = statistics.space, np.random.default_rng(1)
    genomes = space.random_genomes(rng, 8)
    configs = [space.decode(g) for g in genomes]
    bits = [sum(c.weight.bits + c.act.bits for c in config.values() if c.act) for config in configs]
    np.testing.assert_allclose(PROXIES["bit_sum"].scores(statistics, genomes), bits)
    np.testing.assert_allclose(PROXIES["bops"].scores(statistics, genomes), bitops(space)(genomes))
    trace = statistics.numbers
    expected = [
        sum(
            c[n].weight.bits * trace["trace_weight"][i] + c[n].act.bits * trace["trace_act"][i]  # type: ignore[union-attr]
            for i, n in enumerate(statistics.names)
        )
        for c in configs
    ]
    np.testing.assert_allclose(PROXIES["hawq_v2"].scores(statistics, genomes), expected, rtol=1e-9)


def test_losses_are_those_of_the_scores(
    network: tuple[nn.Sequential, Supernet, Batches], statistics: LayerStatistics
) -> None:
    _, supernet, batches = network
    genomes = supernet.space.random_genomes(np.random.default_rng(2), 8)
    for name in ("kl", "fisher", "hessian"):
        loss = SCORES[name](supernet, supernet.space, batches, Accelerator(), lambda: None).loss(supernet.space)
        np.testing.assert_allclose(PROXIES[name].scores(statistics, genomes), -loss(genomes), rtol=1e-6)


def test_bits_of_another_layer_change_a_score(statistics: LayerStatistics) -> None:
    """Alignment: moving (layer, bits) pairs together changes nothing; shifting the bits by one layer does."""
    layers = statistics.space.layers
    reordered = QuantSpace(
        layers[::-1],
        {x.name: statistics.space.choices(x.name, "weight") for x in layers},
        {x.name: statistics.space.choices(x.name, "act") for x in layers},
    )
    turned = LayerStatistics(
        reordered,
        {k: v[::-1] for k, v in statistics.samples.items()},
        {k: v[::-1] for k, v in statistics.numbers.items()},
        {k: (w[::-1], a[::-1]) for k, (w, a) in statistics.losses.items()},
    )
    rng = np.random.default_rng(3)
    configs = [statistics.space.decode(g) for g in statistics.space.random_genomes(rng, 12)]
    shifted = [
        QuantConfig(dict(zip(config, [*list(config.values())[1:], next(iter(config.values()))], strict=True)))
        for config in configs
    ]
    for name in ("snip", "hawq_v2", "fisher", "bops", "ompq", "synflow"):
        proxy = PROXIES[name]
        scores = proxy.scores(statistics, statistics.space.encode_all(configs))
        np.testing.assert_allclose(proxy.scores(turned, reordered.encode_all(configs)), scores, rtol=1e-9)
        assert not np.allclose(proxy.scores(statistics, statistics.space.encode_all(shifted)), scores, rtol=1e-6)


def test_scaling_a_proxy_keeps_its_order(statistics: LayerStatistics) -> None:
    genomes = statistics.space.random_genomes(np.random.default_rng(4), 50)
    accuracy = np.random.default_rng(5).normal(size=50)
    scores = PROXIES["snip"].scores(statistics, genomes)
    cells = 7.5 * PROXIES["snip"].cells(statistics)
    scaled = additive_model("scaled", cells, statistics.space)(genomes)
    assert spearmanr(scaled, accuracy).statistic == pytest.approx(spearmanr(scores, accuracy).statistic, abs=1e-12)


def test_more_bits_score_higher_where_errors_matter(statistics: LayerStatistics) -> None:
    """Direction: higher is better for every proxy that is meant to grow with bits."""
    space = statistics.space
    low, high = (space.encode(c)[None] for c in (space.smallest(), space.largest()))
    for name in ("bit_sum", "bparams", "bops", "snip", "channel_fisher", "synflow", "ompq", "qe", *SCORES):
        low_score, high_score = (PROXIES[name].scores(statistics, g)[0] for g in (low, high))
        assert high_score > low_score, name


def test_a_missing_score_is_named(statistics: LayerStatistics) -> None:
    bare = LayerStatistics(statistics.space, statistics.samples, statistics.numbers, {})
    with pytest.raises(ValueError, match="the proxy 'kl' needs the scores kl, which were not gathered"):
        PROXIES["kl"].scores(bare, np.zeros((1, statistics.space.num_genes), np.int16))
    assert QuantFormat(4) in statistics.space.choices(statistics.names[0], "weight")
