"""Benchmark tables: files, halves, foreign pickles, correlations with intervals, and the commands."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from commands import launch, one_sentence
from conftest import Eqnet
from PIL import Image
from scipy.stats import kendalltau, pearsonr, spearmanr

from eqnet.scoring.mqbench import Benchmark, benchmark_genomes, rank, ridge_scores, search_half
from eqnet.scoring.mqbench101 import read_mqbench101
from eqnet.scoring.proxies import PROXIES
from eqnet.space import LayerInfo, QuantSpace

LAYERS = [LayerInfo(f"layer{i}", "conv", (4 + i, 4, 3, 3), 1000 * (i + 1), 100 * (i + 1)) for i in range(10)]
SPACE = QuantSpace.from_layers(LAYERS, [2, 3, 4], [8], (True,), ("channel",), fixed="none")


def additive(size: int = 240, noise: float = 0.0) -> tuple[Benchmark, np.ndarray]:
    """A table whose accuracies are a sum over layers, and what each bit-width adds [layers, 3]."""
    rng = np.random.default_rng(0)
    gains = np.sort(rng.exponential(size=(10, 3)), 1)
    genomes, drawn = benchmark_genomes(SPACE, size, 0)
    weights = genomes[:, ::2]
    accuracy = 60 + gains[np.arange(10), weights].sum(1) + noise * rng.normal(size=size)
    return Benchmark(SPACE, genomes, accuracy, search_half(size, 0), drawn, {"seed": 0}), gains


# -- tables -----------------------------------------------------------------------------------------------------------


def test_configs_of_a_table() -> None:
    genomes, drawn = benchmark_genomes(SPACE, 300, 7)
    assert len(np.unique(genomes, axis=0)) == 300
    assert drawn[:3] == ("uniform",) * 3
    assert {d: drawn.count(d) for d in set(drawn)}["tilted"] > 120
    means = SPACE.bits[np.arange(20), genomes][:, ::2].mean(1)
    tilted, independent = (means[np.array(drawn) == d] for d in ("tilted", "random"))
    assert tilted.std() > 1.5 * independent.std()  # the whole range against the middle
    fewer, _ = benchmark_genomes(SPACE, 50, 7)
    assert np.array_equal(fewer, genomes[:50])
    assert np.array_equal(search_half(50, 7), search_half(300, 7)[:50])
    assert search_half(300, 7).sum() == 150
    assert not np.array_equal(genomes, benchmark_genomes(SPACE, 300, 8)[0])
    tiny = QuantSpace.from_layers(LAYERS[:2], [2, 3, 4], [8], (True,), ("channel",), fixed="none")
    with pytest.raises(ValueError, match="too few distinct configs for 10 rows; ask for 9 or fewer"):
        benchmark_genomes(tiny, 10, 0)


def test_a_table_survives_its_file(tmp_path: Path) -> None:
    full = QuantSpace.from_layers(LAYERS)
    for space in (SPACE, full):
        genomes, drawn = benchmark_genomes(space, 60, 0)
        accuracy = np.random.default_rng(1).random(60) * 100
        table = Benchmark(space, genomes, accuracy, search_half(60, 0), drawn, {"model": "mine", "seed": 0})
        path = tmp_path / "table.csv"
        table.save(path)
        again = Benchmark.load(path)
        assert again.space == space
        assert np.array_equal(again.genomes, genomes)
        assert np.array_equal(again.search, table.search)
        assert (again.drawn, again.header) == (drawn, {"model": "mine", "seed": 0})
        np.testing.assert_allclose(again.accuracy, accuracy, rtol=1e-5)
        config = space.decode(genomes[17])
        assert again.accuracy_of(config) == pytest.approx(accuracy[17], rel=1e-5)
        if space is SPACE:
            for wrong in (dict(list(config.items())[1:]), {**config, "other": config["layer0"]}):
                with pytest.raises(ValueError, match="the config does not fit the model"):
                    again.accuracy_of(type(config)(wrong))


def test_damaged_tables_are_named(tmp_path: Path) -> None:
    table, _ = additive(20)
    path = tmp_path / "table.csv"
    table.save(path)
    text = path.read_text()
    lines = text.splitlines()
    for changed, message in (
        ("\n".join([lines[0], lines[1].replace("layer3.weight", "layer33.weight"), *lines[2:]]), "layer3"),
        ("\n".join([*lines, lines[5]]), "more than once"),
        (text.replace("search,", "train,", 1), "train"),
        ("\n".join([*lines[:2], lines[2].replace("4cs", "5cs").replace("2cs", "5cs")]), "not in the space"),
        (text[:30], "not a benchmark"),
    ):
        path.write_text(changed)
        with pytest.raises(ValueError, match=message):
            Benchmark.load(path)
    with pytest.raises(ValueError, match="cannot read the benchmark"):
        Benchmark.load(tmp_path / "none.csv")
    with pytest.raises(ValueError, match="the accuracy of row 3 is not a number"):
        Benchmark(SPACE, table.genomes, np.where(np.arange(20) == 3, np.nan, 1.0), table.search, table.drawn, {})


# -- MQ-Bench-101 -----------------------------------------------------------------------------------------------------

NAMES = ["conv1", *(f"layer{i}.{j}.conv{k}" for i in (1, 2, 3, 4) for j in (0, 1) for k in (1, 2)), "fc"]


def written(path: Path, entries: object) -> Path:
    path.write_bytes(pickle.dumps(entries))
    return path


def test_the_published_format(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    vectors = [rng.integers(2, 5, size=18).tolist() for _ in range(30)]
    texts = [str(v) if i % 3 == 0 else tuple(v) if i % 3 == 1 else v for i, v in enumerate(vectors)]
    entries = {i: {"bit_cfg": t, "acc": 60 + i / 10} for i, t in enumerate(texts)}
    table = read_mqbench101(written(tmp_path / "a.pkl", entries), NAMES)
    assert len(table) == 30
    for i, vector in enumerate(vectors):
        config = table.space.decode(table.genomes[i])
        assert [config[name].weight.bits for name in NAMES] == vector
        assert table.accuracy_of(config) == 60 + i / 10
    assert {c.act.bits for c in config.values() if c.act} == {8}


class _Runs:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, (str(self.path), "w")


def test_pickles_run_nothing(tmp_path: Path) -> None:
    path = written(tmp_path / "bad.pkl", {0: {"bit_cfg": "[4]", "acc": _Runs(tmp_path / "made")}})
    with pytest.raises(ValueError, match="not a plain pickle"):
        read_mqbench101(path, ["conv1"])
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({0: {"bit_cfg": "[4, 3]", "acc": 1.0}}, "2 bit-widths for 18 layer names"),
        ({0: {"bit_cfg": str([4] * 18), "acc": 1.0}, 1: {"bit_cfg": [4] * 18, "acc": 2.0}}, "more than once"),
        ({0: {"bit_cfg": "__import__('os')", "acc": 1.0}}, "entry 0: not a bit_cfg"),
        ({0: {"bits": [4] * 18}}, "entry 0: not a bit_cfg"),
        ([1, 2], "holds no dict"),
    ],
)
def test_bad_pickles_are_named(entries: object, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        read_mqbench101(written(tmp_path / "bad.pkl", entries), NAMES)


# -- correlations -----------------------------------------------------------------------------------------------------


def test_correlations_keep_their_sign_and_the_top_is_by_accuracy() -> None:
    rng = np.random.default_rng(0)
    accuracy = rng.normal(size=200)
    scores = accuracy + rng.normal(size=200)
    found = rank(scores, accuracy)
    for top in (100, 50, 20):
        rows = np.argsort(-accuracy)[: 2 * top]
        x, y = scores[rows], accuracy[rows]
        assert found[top]["spearman"].value == pytest.approx(spearmanr(x, y).statistic)
        assert found[top]["kendall"].value == pytest.approx(kendalltau(x, y).statistic)
        assert found[top]["pearson"].value == pytest.approx(pearsonr(x, y).statistic)
        for correlation in found[top].values():
            assert correlation.low < correlation.value < correlation.high
    assert (
        found[20]["spearman"].high - found[20]["spearman"].low
        > found[100]["spearman"].high - found[100]["spearman"].low
    )
    negative = rank(-scores, accuracy)
    assert negative[100]["spearman"].value == -found[100]["spearman"].value
    assert rank(scores, accuracy) == found
    assert rank(np.ones(200), accuracy)[100]["spearman"].value == 0


def test_intervals_cover_the_truth() -> None:
    """Of 60 samples from a population of known rank correlation, about 95 % of the intervals hold it."""
    rng = np.random.default_rng(1)
    rho = 0.6
    truth = 6 / np.pi * np.arcsin(rho / 2)
    covered = 0
    for trial in range(60):
        x = rng.normal(size=80)
        y = rho * x + np.sqrt(1 - rho**2) * rng.normal(size=80)
        interval = rank(x, y, seed=trial, resamples=300)[100]["spearman"]
        covered += interval.low <= truth <= interval.high
    assert 50 <= covered <= 60


def test_bootstrap_of_kendall_is_that_of_resampled_rows() -> None:
    from eqnet.scoring.mqbench import _resampled_kendall

    rng = np.random.default_rng(2)
    x, y = rng.integers(6, size=30).astype(float), rng.normal(size=30).round(1)
    drawn = rng.integers(30, size=(20, 30))
    expected = [kendalltau(x[rows], y[rows]).statistic for rows in drawn]
    np.testing.assert_allclose(_resampled_kendall(x, y, drawn), expected, atol=1e-12)


def test_scores_that_cannot_be_ranked() -> None:
    with pytest.raises(ValueError, match="config 1 is not finite"):
        rank([1.0, np.nan, *range(10)], range(12))
    with pytest.raises(ValueError, match="same length of at least 10"):
        rank([1.0, 2.0], [1.0, 2.0])


def test_ridge_bounds_every_sum_over_layers() -> None:
    """On accuracies that are a sum over layers ridge regression ranks held-out configs at least as well as any weighting."""
    table, gains = additive(noise=0.2)
    held_out = ~table.search
    ridge = spearmanr(ridge_scores(table)[held_out], table.accuracy[held_out]).statistic
    assert ridge > 0.97
    rng = np.random.default_rng(3)
    bits = SPACE.bits[np.arange(20), table.genomes][:, ::2]
    others = [spearmanr(bits[held_out] @ rng.random(10), table.accuracy[held_out]).statistic for _ in range(200)]
    assert max(others) < ridge
    truth = spearmanr(gains[np.arange(10), table.genomes[:, ::2]].sum(1)[held_out], table.accuracy[held_out]).statistic
    assert ridge > truth - 0.02


# -- commands ---------------------------------------------------------------------------------------------------------

QUICK = ["search.bn_images=64", "search.score_images=16"]


@pytest.mark.slow
def test_build_and_rank(eqnet: Eqnet, run: Path, tmp_path: Path) -> None:
    options = ["--run", run, "--configs", 24, "--bits", "2,3,4", "--act-bits", "8", "--form", "channel-sym-sym"]
    code, out, err = eqnet("benchmark", "build", "--output", "a.csv", *options, *QUICK)
    assert code == 0, err
    assert "24 configs" in out
    table = Benchmark.load(tmp_path / "a.csv")
    assert {"model", "weights_sha256", "data", "split", "quantizer", "seed", "bn_images", "versions"} <= set(
        table.header
    )
    assert {
        f.bits
        for g in table.space.genes
        if g.slot == "weight" and g.layers[0] not in table.space.fixed
        for f in g.formats
    } == {2, 4}  # the run has 2, 4 and 8
    # killed in the middle of a row, then started again: what was measured is not measured again, and the table is the same
    rows = (tmp_path / "a.rows" / "rows-0.jsonl").read_text().splitlines()
    (tmp_path / "b.rows").mkdir()
    (tmp_path / "b.rows" / "header.json").write_bytes((tmp_path / "a.rows" / "header.json").read_bytes())
    (tmp_path / "b.rows" / "rows-0.jsonl").write_text("\n".join(rows[:10]) + '\n{"index": 10, "accu')
    code, out, err = eqnet("benchmark", "build", "--output", "b.csv", *options, *QUICK)
    assert code == 0, err
    assert (tmp_path / "b.csv").read_bytes() == (tmp_path / "a.csv").read_bytes()
    assert (tmp_path / "b.rows" / "rows-0.jsonl").read_text().startswith("\n".join(rows[:10]))

    # two processes share the rows and write the same table
    build = ["-m", "eqnet.cli", "benchmark", "build", "--output", "c.csv", *map(str, options), *QUICK]
    launch(2, *build, cwd=tmp_path)
    shares = [len(p.read_text().splitlines()) for p in (tmp_path / "c.rows").glob("rows-*.jsonl")]
    assert len(shares) == 2
    assert sum(shares) == 24
    assert (tmp_path / "c.csv").read_bytes() == (tmp_path / "a.csv").read_bytes()

    code, out, err = eqnet("benchmark", "rank", "a.csv", "--picture", "a.png", "--json", "a.json")
    assert code == 0, err
    figures = json.loads((tmp_path / "a.json").read_text())
    assert {"bit_sum", "hawq_v2", "fisher", "ridge"} <= set(figures)
    for name, value in figures.items():
        rho, low, high = value["top 100 %"]["spearman"]
        assert low <= rho <= high
        assert name in out
    assert np.asarray(Image.open(tmp_path / "a.png")).std() > 5

    before = (tmp_path / "a.csv").read_bytes()
    code, _, err = eqnet("benchmark", "build", "--output", "a.csv", *options)
    assert code == 2
    assert "a.csv exists already" in one_sentence(err)
    assert (tmp_path / "a.csv").read_bytes() == before


def test_a_published_pickle_is_ranked(eqnet: Eqnet, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    vectors = rng.integers(2, 5, size=(60, 18))
    path = written(
        tmp_path / "a.pkl", {i: {"bit_cfg": str(v.tolist()), "acc": float(v.sum())} for i, v in enumerate(vectors)}
    )
    code, _, err = eqnet(
        "benchmark", "rank", path, "--layers", ",".join(NAMES), "--score", "bit_sum,ridge", "--json", "a.json"
    )
    assert code == 0, err
    assert json.loads((tmp_path / "a.json").read_text())["bit_sum"]["top 100 %"]["spearman"][0] == pytest.approx(1)
    code, _, err = eqnet("benchmark", "rank", path, "--layers", ",".join(NAMES), "--score", "snip")
    assert code == 2
    assert "the statistic 'snip_weight' of the layers is needed" in one_sentence(err)
    code, _, err = eqnet("benchmark", "rank", path)
    assert code == 2
    assert "names no layers; give them with --layers" in one_sentence(err)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["rank", "none.csv"], "cannot read the benchmark none.csv"),
        (["build", "--output", "a.txt"], "a table is a .csv file"),
        (["build", "--output", "a.csv", "--run", "nothing"], "not the folder of a run"),
    ],
)
def test_mistakes_are_one_sentence(arguments: list[str], message: str, eqnet: Eqnet) -> None:
    code, _, err = eqnet("benchmark", *arguments)
    assert code == 2
    assert message in one_sentence(err)


def test_figures_and_pictures_are_not_replaced(eqnet: Eqnet, tmp_path: Path) -> None:
    for option in ("--json", "--picture"):
        (tmp_path / "kept").write_text("mine")
        code, _, err = eqnet("benchmark", "rank", TABLE, "--score", "bit_sum", option, "kept")
        assert code == 2
        assert f"kept exists already; give another {option}" in one_sentence(err)
        assert (tmp_path / "kept").read_text() == "mine"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--bits", "2,x"], "--bits is a list of whole numbers"),
        (["--bits", "9"], "no weight format left"),
        (["--form", "round"], "unknown form 'round'"),
        (["train.lr=0.5"], "train belongs to the trained run"),
    ],
)
def test_mistakes_in_a_space_are_one_sentence(
    arguments: list[str],
    message: str,
    eqnet: Eqnet,
    run: Path,
    tmp_path: Path,
) -> None:
    code, _, err = eqnet("benchmark", "build", "--output", "a.csv", "--run", run, *arguments)
    assert code == 2
    assert message in one_sentence(err)
    assert not list(tmp_path.iterdir())


def test_proxies_are_listed(eqnet: Eqnet) -> None:
    code, out, _ = eqnet("proxies", "list")
    assert code == 0
    assert all(
        name in out for name in ("bit_sum", "bparams", "snip", "synflow", "hawq_v2", "ompq", "qe", "entropy", "kl")
    )


# -- the committed table ----------------------------------------------------------------------------------------------

DOCS = Path(__file__).resolve().parent.parent / "docs"
TABLE = DOCS / "data" / "mqbench_resnet20_w234_a8.csv"


def test_the_page_shows_what_the_committed_table_gives(eqnet: Eqnet, tmp_path: Path) -> None:
    """The figures of the page are those of its command on the committed table."""
    evolved = DOCS / "data" / "emq_resnet20.json"
    names = ["ridge", f"emq:{evolved}", "bit_sum", "hessian", "snip"]
    code, _, err = eqnet("benchmark", "rank", TABLE, "--score", ",".join(names), "--json", "r.json")
    assert code == 0, err
    figures = json.loads((tmp_path / "r.json").read_text())
    rows = [line.strip("| ").split(" | ") for line in (DOCS / "proxies.md").read_text().splitlines()]
    shown = {row[0]: row[1:] for row in rows if len(row) == 6}
    for name in names:
        found = figures[name]
        cells = [found["top 100 %"][metric] for metric in ("spearman", "kendall", "pearson")]
        expected = [f"{v:+.3f} [{low:.2f}, {high:.2f}]" for v, low, high in cells]
        expected += [f"{found[f'top {top} %']['spearman'][0]:+.3f}" for top in (50, 20)]
        assert shown["emq" if name.startswith("emq:") else name] == expected
    best = max(float(cells[0].split()[0]) for name, cells in shown.items() if name in PROXIES)
    assert figures[f"emq:{evolved}"]["top 100 %"]["spearman"][0] > best
    header = Benchmark.load(TABLE).header
    assert (header["model"], header["quantizer"]) == ("cifar_resnet20", "post-training")


@pytest.mark.parametrize(
    ("column", "table"),
    [(0, "mqbench_resnet20_w234_a8"), (1, "mqbench_resnet20_w234_a234"), (2, "mqbench_mobilenetv2_w234_a8")],
)
def test_the_page_shows_how_scores_rank_three_tables(column: int, table: str, eqnet: Eqnet, tmp_path: Path) -> None:
    evolved = ["emq_resnet20", "emq_resnet20_mixed", "emq_mobilenetv2"]
    names = {name: f"emq:{DOCS / 'data' / name}.json" for name in evolved} | {"ridge": "ridge", "hessian": "hessian"}
    scores = ",".join(names.values())
    code, _, err = eqnet("benchmark", "rank", DOCS / "data" / f"{table}.csv", "--score", scores, "--json", "r.json")
    assert code == 0, err
    figures = json.loads((tmp_path / "r.json").read_text())
    rows = [line.strip("| ").split(" | ") for line in (DOCS / "proxies.md").read_text().splitlines()]
    shown = {row[0]: row[1:] for row in rows if len(row) == 4}
    for name, score in names.items():
        value, low, high = figures[score]["top 100 %"]["spearman"]
        assert shown[name][column] == f"{value:+.3f} [{low:.2f}, {high:.2f}]"
    assert set(PROXIES) <= set(shown)
