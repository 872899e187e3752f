"""The accuracy predictor: rank quality on a known truth, restricted spaces, files, and what it refuses."""

import random
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from eqnet.checkpoint import load_tensors, save_tensors
from eqnet.scoring.predictor import (
    PAPER_RECIPE,
    AccuracyPredictor,
    PredictorRecipe,
    rank_metrics,
    table_size_curve,
)
from eqnet.space import ALL_FORMS, Form, Genomes, LayerInfo, MeanBitsSampler, QuantSpace


def make_space(num_layers: int = 22, **kwargs: object) -> QuantSpace:
    sizes = [16 * 2 ** (3 * i // num_layers) for i in range(num_layers)]
    layers = [LayerInfo(f"l{i}", "conv", (c, c, 3, 3), 9 * c * c * 64, c * 64) for i, c in enumerate(sizes)]
    return QuantSpace.from_layers(layers, **kwargs)  # type: ignore[arg-type]


class Truth:
    """Accuracy that falls with the noise of each layer, less so for asymmetric and per-channel formats; layers interact."""

    def __init__(self, space: QuantSpace, seed: int = 0, asym_gain: float = 0.25) -> None:
        rng = np.random.default_rng(seed)
        self.space = space
        self.sensitivity = np.exp(rng.normal(size=space.num_genes)) * space.elastic
        self.asym = 1 - asym_gain * rng.random(space.num_genes)
        self.channel = 1 - 0.3 * rng.random(space.num_genes)

    def __call__(self, genomes: Genomes) -> NDArray[np.float64]:
        columns = np.arange(self.space.num_genes)
        noise = self.sensitivity * 3.5 ** -(self.space.bits[columns, genomes] - 2.0)
        noise = noise * np.where(self.space.symmetric[columns, genomes], 1, self.asym)
        noise = noise * np.where(self.space.per_channel[columns, genomes], self.channel, 1)
        layers = noise.reshape(len(genomes), -1, 2).sum(2)
        total = layers.sum(1) + 0.5 * np.sqrt(layers[:, 1:] * layers[:, :-1]).sum(1)
        return 10 + 60 * np.exp(-0.3 * total / self.sensitivity.sum())

    def table(self, rows: int, seed: int = 1) -> tuple[Genomes, NDArray[np.float64]]:
        """Configs of all mean bits, with accuracies as a test on 10,000 images would give them."""
        rng = np.random.default_rng(seed)
        genomes = MeanBitsSampler(self.space).sample(rng, rows)
        return genomes, np.round(self(genomes) + 0.1 * rng.normal(size=rows), 2)


@pytest.fixture(scope="module")
def truth() -> Truth:
    return Truth(make_space())


@pytest.fixture(scope="module")
def predictor(truth: Truth) -> AccuracyPredictor:
    fitted = AccuracyPredictor(truth.space)
    fitted.fit(*truth.table(400), seed=0)
    return fitted


def test_400_rows_give_good_ranks_on_the_held_out_fifth(predictor: AccuracyPredictor) -> None:
    assert predictor.metrics["kendall"] > 0.8
    assert predictor.metrics["pearson"] > 0.9
    assert predictor.metrics["spearman"] > 0.9
    assert predictor.metrics["rmse"] < 1
    assert predictor.held_out is not None
    assert len(predictor.held_out.measured) == 80
    held_out = predictor.held_out
    ranks = rank_metrics(held_out.predicted, held_out.measured)
    assert predictor.metrics == {**ranks, "learned_kendall": ranks["kendall"]}  # it learned what was measured


def test_new_configs_are_ranked_too_also_at_equal_mean_bits(truth: Truth, predictor: AccuracyPredictor) -> None:
    rng = np.random.default_rng(7)
    sampler = MeanBitsSampler(truth.space)
    anywhere, near_3_bits = sampler.sample(rng, 300), sampler.sample(rng, 300, 3.0, 3.0)
    assert rank_metrics(predictor.score(anywhere), truth(anywhere))["kendall"] > 0.85
    # A search compares configs of one budget, where mean bits say nothing.
    assert rank_metrics(predictor.score(near_3_bits), truth(near_3_bits))["kendall"] > 0.7


def test_deep_networks_have_good_ranks() -> None:
    truth = Truth(make_space(54))
    assert AccuracyPredictor(truth.space).fit(*truth.table(400), seed=0)["kendall"] > 0.8


@pytest.mark.parametrize(
    "recipe",
    [PredictorRecipe(ranking_weight=1.0), PredictorRecipe(depth=2), PredictorRecipe(batch_size=64, epochs=60)],
    ids=["ranking loss", "depth 2", "batches"],
)
def test_other_recipes_learn(truth: Truth, recipe: PredictorRecipe) -> None:
    assert AccuracyPredictor(truth.space, recipe).fit(*truth.table(400), seed=0)["kendall"] > 0.8


def test_the_ranking_loss_changes_the_predictor(truth: Truth, predictor: AccuracyPredictor) -> None:
    genomes, accuracy = truth.table(400)
    ranking = AccuracyPredictor(truth.space, PredictorRecipe(ranking_weight=1.0))
    ranking.fit(genomes, accuracy, seed=0)
    assert np.abs(ranking.score(genomes) - predictor.score(genomes)).max() > 1e-3


def test_the_default_needs_fewer_rows_than_the_recipe_of_the_paper(truth: Truth) -> None:
    table = truth.table(200)
    ours = AccuracyPredictor(truth.space).fit(*table, seed=0)["kendall"]
    paper = AccuracyPredictor(truth.space, PAPER_RECIPE).fit(*table, seed=0)["kendall"]
    assert ours > 0.75
    assert ours > paper + 0.05


def test_the_paper_recipe_has_the_published_size_on_resnet18(tmp_path: Path) -> None:
    truth = Truth(make_space(21))
    predictor = AccuracyPredictor(truth.space, replace(PAPER_RECIPE, epochs=1))
    predictor.fit(*truth.table(20), seed=0)
    predictor.save(tmp_path / "p.safetensors")
    tensors = load_tensors(tmp_path / "p.safetensors")
    assert sum(t.numel() for name, t in tensors.items() if name.startswith(("weight.", "bias."))) == 301_600


def test_refit_uses_the_held_out_rows_but_leaves_the_metrics(truth: Truth) -> None:
    genomes, accuracy = truth.table(100)
    once, twice = AccuracyPredictor(truth.space), AccuracyPredictor(truth.space)
    assert once.fit(genomes, accuracy, seed=0, refit=False) == twice.fit(genomes, accuracy, seed=0)
    assert once.held_out is not None
    of_once = np.sort(once.score(genomes))
    assert np.isin(np.round(once.held_out.predicted, 3), np.round(of_once, 3)).all()
    error = [np.abs(p.score(genomes) - accuracy).mean() for p in (once, twice)]
    assert error[1] < error[0]


def test_metrics_compare_with_what_was_measured_where_something_else_is_learned(truth: Truth) -> None:
    genomes, accuracy = truth.table(100)
    noisy = accuracy + np.random.default_rng(0).normal(0, 1, 100)
    predictor, other = AccuracyPredictor(truth.space), AccuracyPredictor(truth.space)
    metrics = predictor.fit(genomes, accuracy, seed=0, measured=noisy)
    assert predictor.held_out is not None
    predicted, measured, learned = predictor.held_out
    assert np.isin(measured, noisy).all()
    assert np.isin(learned, accuracy).all()
    assert metrics == {
        **rank_metrics(predicted, measured),
        "learned_kendall": rank_metrics(predicted, learned)["kendall"],
    }
    assert metrics["learned_kendall"] > metrics["kendall"]  # the noise cannot be predicted
    other.fit(genomes, accuracy, seed=0)
    assert np.array_equal(predictor.score(genomes), other.score(genomes))


def test_a_refitted_predictor_is_one_fitted_on_all_rows(truth: Truth) -> None:
    genomes, accuracy = truth.table(60)
    first = AccuracyPredictor(truth.space, PredictorRecipe(epochs=50))
    metrics = first.fit(genomes[:50], accuracy[:50], seed=0)
    before = first.score(genomes)
    second = first.refitted(genomes, accuracy, seed=4)
    whole = AccuracyPredictor(truth.space, first.recipe)
    whole.fit(genomes, accuracy, seed=4)
    np.testing.assert_array_equal(second.score(genomes), whole.score(genomes))
    np.testing.assert_array_equal(first.score(genomes), before)
    assert second.metrics == metrics
    with pytest.raises(ValueError, match="60 configs but accuracies of shape"):
        first.refitted(genomes, accuracy[:50], seed=0)


def test_a_seed_says_it_all_and_global_state_is_left_alone(truth: Truth) -> None:
    table = truth.table(60)

    def scores(global_seed: int, seed: int) -> NDArray[np.float64]:
        torch.manual_seed(global_seed)
        np.random.seed(global_seed)
        random.seed(global_seed)
        before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[index,union-attr]
        predictor = AccuracyPredictor(truth.space)
        with torch.no_grad():  # a caller's gradient mode does not matter either
            predictor.fit(*table, seed=seed)
        assert torch.equal(before[0], torch.get_rng_state())
        assert before[1] == random.getstate()
        assert before[2] == np.random.get_state()[1].tolist()  # type: ignore[index,union-attr]
        return predictor.score(table[0])

    np.testing.assert_array_equal(scores(1, seed=5), scores(2, seed=5))
    assert not np.array_equal(scores(1, seed=5), scores(1, seed=6))


def test_a_saved_predictor_scores_identically(truth: Truth, predictor: AccuracyPredictor, tmp_path: Path) -> None:
    path = tmp_path / "predictor.safetensors"
    predictor.save(path)
    loaded = AccuracyPredictor.load(path, QuantSpace.from_json(truth.space.to_json()))
    genomes = truth.space.random_genomes(np.random.default_rng(0), 50)
    np.testing.assert_array_equal(loaded.score(genomes), predictor.score(genomes))
    assert loaded.recipe == predictor.recipe
    assert loaded.metrics == predictor.metrics


def float64_scores(path: Path, space: QuantSpace, genomes: Genomes, recipe: PredictorRecipe) -> NDArray[np.float64]:
    """What the networks of a saved predictor say, from `features` on, in float64 and layer by layer."""
    tensors = {name: tensor.double().numpy() for name, tensor in load_tensors(path).items()}
    inputs = space.features(genomes).astype(float)
    if recipe.inputs == "smooth":
        bits = np.arange(2, 9)
        basis = np.stack([bits / 8, 2.0 ** (2 - bits), 4.0 ** (2 - bits)], 1)
        smooth = inputs[:, 6:].reshape(len(genomes), -1, 7) @ basis
        inputs = np.concatenate([inputs[:, :6], smooth.reshape(len(genomes), -1)], 1)
    inputs = (inputs - tensors["input"][0]) * tensors["input"][1]
    outputs = []
    for k in range(recipe.members):
        hidden = inputs
        for i in range(recipe.depth):
            hidden = np.maximum(hidden @ tensors[f"weight.{i}"][k] + tensors[f"bias.{i}"][k], 0)
        output = hidden @ tensors[f"weight.{recipe.depth}"][k]
        if recipe.linear_path:
            output = output + inputs @ tensors["linear"][k]
        outputs.append(output[:, 0])
    mean, deviation = tensors["target"]
    return np.mean(outputs, 0) * deviation + mean


@pytest.mark.parametrize(
    "recipe",
    [
        PredictorRecipe(epochs=20),
        PredictorRecipe(epochs=20, depth=3, hidden=20, members=2),
        PredictorRecipe(epochs=20, linear_path=False, members=1),
        PredictorRecipe(epochs=20, inputs="onehot", standardize=False),
        replace(PAPER_RECIPE, epochs=2),
    ],
    ids=["default", "deep", "no linear path", "one-hot", "paper"],
)
def test_predictions_are_those_of_the_networks_up_to_rounding(tmp_path: Path, recipe: PredictorRecipe) -> None:
    layers = [LayerInfo(f"l{i}", "conv", (8, 8, 3, 3), 9 * 64 * 64, 8 * 64, calls=int(i != 4)) for i in range(9)]
    space = QuantSpace.from_layers(layers, ties=[("l2", "l6")])  # tied layers, and one with inputs in floating point
    genomes = space.random_genomes(np.random.default_rng(0), 1200)
    accuracy = space.bits[np.arange(space.num_genes), genomes].sum(1) / 2
    predictor = AccuracyPredictor(space, recipe)
    predictor.fit(genomes[:60], accuracy[:60], seed=0)
    predictor.save(tmp_path / "p.safetensors")
    expected = float64_scores(tmp_path / "p.safetensors", space, genomes, recipe)
    assert expected.std() > 0.01
    np.testing.assert_allclose(predictor.score(genomes), expected, rtol=0, atol=1e-4)


def test_a_score_depends_on_nothing_but_the_config(truth: Truth, predictor: AccuracyPredictor) -> None:
    genomes = truth.space.random_genomes(np.random.default_rng(0), 1100)
    scores = predictor.score(genomes)
    np.testing.assert_array_equal(predictor.score(genomes[::-1])[::-1], scores)
    np.testing.assert_array_equal([predictor.score(g[None])[0] for g in genomes[:20]], scores[:20])
    assert predictor.score(genomes[:0]).shape == (0,)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        np.testing.assert_array_equal(predictor.score(genomes), scores)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)


def test_files_of_other_spaces_and_other_files_are_refused(predictor: AccuracyPredictor, tmp_path: Path) -> None:
    path = tmp_path / "predictor.safetensors"
    predictor.save(path)
    with pytest.raises(ValueError, match="another quantization space"):
        AccuracyPredictor.load(path, make_space(22, bits=range(3, 9)))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="truncated"):
        AccuracyPredictor.load(path, predictor.space)
    save_tensors(path, {"weight": torch.zeros(3)})
    with pytest.raises(ValueError, match="not an accuracy predictor"):
        AccuracyPredictor.load(path, predictor.space)


@pytest.mark.parametrize("name", ["tensor-sym-sym", "channel-asym-asym"])
def test_one_predictor_scores_restricted_spaces(predictor: AccuracyPredictor, name: str) -> None:
    form = Form.parse(name)
    restricted = predictor.space.restrict_form(form).restrict(lambda layer, slot, fmt: fmt.bits in (4, 8))
    genomes = restricted.random_genomes(np.random.default_rng(0), 20)
    same = predictor.space.encode_all([restricted.decode(g) for g in genomes])
    np.testing.assert_array_equal(predictor.score(genomes, restricted), predictor.score(same))


def test_restricted_spaces_may_take_turns(predictor: AccuracyPredictor) -> None:
    low, high = (predictor.space.restrict(lambda layer, slot, fmt, b=b: fmt.bits in (*b, 8)) for b in ((2, 3), (6, 7)))
    genomes = low.random_genomes(np.random.default_rng(0), 20)
    first, second = predictor.score(genomes, low), predictor.score(genomes, high)
    assert (first < second).all()
    np.testing.assert_array_equal(predictor.score(genomes, low), first)


def test_foreign_spaces_are_refused(predictor: AccuracyPredictor) -> None:
    for other in (make_space(21), make_space(22, fixed="none")):
        with pytest.raises(ValueError, match="not contained"):
            predictor.score(other.random_genomes(np.random.default_rng(0), 3), other)


def test_the_form_alone_changes_the_prediction_in_the_right_direction() -> None:
    truth = Truth(make_space(12), asym_gain=0.9)
    predictor = AccuracyPredictor(truth.space)
    predictor.fit(*truth.table(300), seed=0)
    bits = MeanBitsSampler(truth.space).sample(np.random.default_rng(3), 40, 3.5, 3.5)

    def in_form(name: str) -> Genomes:
        return truth.space.impose_form(bits, np.full(len(bits), ALL_FORMS.index(Form.parse(name))))

    sym, act_asym, asym = in_form("tensor-sym-sym"), in_form("tensor-sym-asym"), in_form("tensor-asym-asym")
    assert (truth.space.features(sym) != truth.space.features(asym)).sum(1).tolist() == [4] * len(bits)
    assert (predictor.score(act_asym) > predictor.score(sym)).all()
    assert (predictor.score(asym) > predictor.score(act_asym)).all()


def test_more_rows_rank_better(truth: Truth) -> None:
    curve = table_size_curve(truth.space, *truth.table(500), [30, 100, 400], seed=0)
    assert [point["rows"] for point in curve] == [30, 100, 400]
    kendall = [point["kendall"] for point in curve]
    assert kendall == sorted(kendall)
    assert kendall[-1] > 0.8
    with pytest.raises(ValueError, match="2 to 400 rows"):
        table_size_curve(truth.space, *truth.table(500), [401], seed=0)


def test_the_curve_ends_at_the_metrics_of_fit(truth: Truth) -> None:
    table = truth.table(50)
    last = table_size_curve(truth.space, *table, [40], seed=3)[-1]
    assert last == {"rows": 40, **AccuracyPredictor(truth.space).fit(*table, seed=3)}


def test_tables_that_cannot_be_fitted_are_refused(truth: Truth) -> None:
    genomes, accuracy = truth.table(12)
    predictor = AccuracyPredictor(truth.space)
    with pytest.raises(ValueError, match="at least 10 configs"):
        predictor.fit(genomes[:9], accuracy[:9], seed=0)
    with pytest.raises(ValueError, match="12 configs but accuracies of shape"):
        predictor.fit(genomes, accuracy[:11], seed=0)
    with pytest.raises(ValueError, match="not finite in row 3"):
        predictor.fit(genomes, np.where(np.arange(12) == 3, np.nan, accuracy), seed=0)
    with pytest.raises(ValueError, match="the space has 44 genes"):
        predictor.fit(genomes[:, :5], accuracy, seed=0)
    with pytest.raises(ValueError, match="not been fitted"):
        predictor.score(genomes)
    with pytest.raises(ValueError, match="not been fitted"):
        predictor.save("nowhere")


@pytest.mark.parametrize("changes", [{"hidden": 0}, {"inputs": "raw"}, {"batch_size": 0}, {"learning_rate": 0.0}])
def test_wrong_recipes_are_refused(changes: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(changes))):
        PredictorRecipe(**changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("recipe", [PredictorRecipe(), PAPER_RECIPE], ids=["default", "paper"])
def test_constant_accuracy_is_no_accident(truth: Truth, recipe: PredictorRecipe) -> None:
    genomes, _ = truth.table(30)
    predictor = AccuracyPredictor(truth.space, recipe)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        metrics = predictor.fit(genomes, np.full(30, 10.0), seed=0)
    assert metrics["kendall"] == metrics["pearson"] == metrics["spearman"] == 0.0
    assert np.isfinite(predictor.score(genomes)).all()
    np.testing.assert_allclose(predictor.score(genomes), 10.0, atol=5.0)


numbers = st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)), min_size=2, max_size=40)


@settings(max_examples=40)
@given(numbers)
def test_rank_metrics_are_those_of_scipy_or_zero(pairs: list[tuple[int, int]]) -> None:
    x, y = np.array(pairs, float).T
    metrics = rank_metrics(x, y)
    assert metrics["rmse"] == pytest.approx(np.sqrt(((x - y) ** 2).mean()))
    if len(set(x)) > 1 and len(set(y)) > 1:
        assert metrics["kendall"] == pytest.approx(scipy.stats.kendalltau(x, y, variant="b").statistic)
        assert metrics["spearman"] == pytest.approx(scipy.stats.spearmanr(x, y).statistic)
        assert metrics["pearson"] == pytest.approx(scipy.stats.pearsonr(x, y).statistic)
        assert rank_metrics(np.exp(x), y)["kendall"] == pytest.approx(metrics["kendall"])
        assert rank_metrics(-x, y)["kendall"] == pytest.approx(-metrics["kendall"])
    else:
        assert metrics["kendall"] == metrics["pearson"] == metrics["spearman"] == 0.0


def test_rank_metrics_need_two_lists_of_one_length() -> None:
    for x, y in (([1.0], [1.0]), ([1.0, 2.0], [1.0, 2.0, 3.0])):
        with pytest.raises(ValueError, match="same length of at least 2"):
            rank_metrics(x, y)
