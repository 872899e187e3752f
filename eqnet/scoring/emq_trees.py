"""The space of evolved proxies: strongly typed expressions over the statistics of a layer (EMQ, arXiv 2307.10554, section 4.2).

An expression is a `deap.gp` tree of four types:

| type | one value for | inputs of the network's layers |
|---|---|---|
| Weights | each sampled weight | W, its gradient G_w, Hessian diagonal H_w, virtual gradient V, quantization error E_w |
| Inputs | each sampled input value | A, G_a, H_a, E_a likewise |
| Number | each layer and format | bits b_w, b_a, parameters n, macs, ...; additive scores such as kl_w, kl_a |
| Score | each config | |

Operations map elements, reduce them to a number per layer, combine numbers, and aggregate them over layers. Errors and bits
depend on the format, so an expression is evaluated once for all formats of all layers, whatever the number of configs. A proxy
of which only sums over layers are added is a sum over layers, and can be maximised exactly.

Departs from the official code, whose operations were never published: the elements are joined by position within a tensor and
by the name of the layer, bits and errors are terminals rather than a final factor, and trees have any shape.

Shape legend: `N` configs, `G` genes, `L` layers, `F` formats of weights, `A` formats of inputs, `K` sampled elements.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from deap import gp
from numpy.typing import NDArray

from eqnet.checkpoint import read_json
from eqnet.scoring.layer_statistics import SLOTS, LayerStatistics
from eqnet.scoring.proxies import PROXIES, Proxy, check_needs, occupied
from eqnet.scoring.scores import SCORES
from eqnet.space import Genomes

Floats = NDArray[np.float64]
FORMAT = "eqnet proxy 1"
PREFIX = "emq:"
_TINY = 1e-12


class Weights:
    """Type of expressions with a value for each sampled weight, [L, F or 1, K]."""


class Inputs:
    """Type of expressions with a value for each sampled input, [L, A or 1, K]."""


class Number:
    """Type of expressions with a value for each layer and format, [L, F or 1, A or 1]."""


class Score:
    """Type of expressions with a value for each config, [N]."""


@dataclass(frozen=True)
class Operation:
    """A primitive of the trees.

    Attributes:
        name: in files; unique.
        takes: types of the arguments.
        gives: type of the result.
        apply: on arrays.
        infix: for people, with {0}, {1} for the arguments.
        latex: likewise.
        priority: how often it is drawn (EMQ's operation sampling prioritisation).
        commutative: arguments may be swapped.
    """

    name: str
    takes: tuple[type, ...]
    gives: type
    apply: Callable[..., Floats]
    infix: str
    latex: str
    priority: float = 1.0
    commutative: bool = False


@dataclass(frozen=True)
class Input:
    """A terminal: a statistic.

    Attributes:
        name: in files.
        gives: its type.
        read: from the statistics.
        latex: its symbol.
        score: the additive score it belongs to, if any.
        priority: how often it is drawn.
    """

    name: str
    gives: type
    read: Callable[[LayerStatistics], Floats]
    latex: str
    score: str | None = None
    priority: float = 1.0


def _inverse(x: Floats) -> Floats:
    out: Floats = x / (x * x + 1e-18)
    return out


def _softmax(x: Floats) -> Floats:
    e = np.exp(x - x.max(-1, keepdims=True))
    out: Floats = e / e.sum(-1, keepdims=True)
    return out


def _scaled(x: Floats) -> Floats:
    low, high = x.min(-1, keepdims=True), x.max(-1, keepdims=True)
    out: Floats = (x - low) / (high - low + _TINY)
    return out


_ELEMENTWISE: tuple[tuple[str, Callable[[Floats], Floats], str, str, float], ...] = (
    ("neg", np.negative, "-{0}", "-{0}", 0.5),
    ("abs", np.abs, "|{0}|", r"\left|{0}\right|", 2.0),
    ("square", np.square, "({0})^2", r"\left({0}\right)^2", 2.0),
    ("sqrt", lambda x: np.sqrt(np.abs(x)), "sqrt|{0}|", r"\sqrt{{\left|{0}\right|}}", 1.0),
    ("log", lambda x: np.log(np.abs(x) + _TINY), "log|{0}|", r"\log\left|{0}\right|", 1.0),
    ("exp", lambda x: np.exp(np.clip(x, -30, 30)), "exp({0})", r"\exp\left({0}\right)", 0.5),
    ("relu", lambda x: np.maximum(x, 0), "relu({0})", r"\left({0}\right)_+", 0.5),
    ("inverse", _inverse, "1/({0})", r"\frac{{1}}{{{0}}}", 0.5),
    ("tanh", np.tanh, "tanh({0})", r"\tanh\left({0}\right)", 0.5),
)
_OF_A_TENSOR: tuple[tuple[str, Callable[[Floats], Floats], str, str, float], ...] = (
    (
        "normalize",
        lambda x: (x - x.mean(-1, keepdims=True)) / (x.std(-1, keepdims=True) + _TINY),
        "normalize({0})",
        r"\mathrm{{normalize}}\left({0}\right)",
        0.5,
    ),
    ("softmax", _softmax, "softmax({0})", r"\mathrm{{softmax}}\left({0}\right)", 0.5),
    ("min_max", _scaled, "min_max({0})", r"\mathrm{{min\_max}}\left({0}\right)", 0.5),
)
_PAIRS: tuple[tuple[str, Callable[[Floats, Floats], Floats], str, str, float, bool], ...] = (
    ("add", np.add, "({0} + {1})", r"\left({0} + {1}\right)", 1.0, True),
    ("sub", np.subtract, "({0} - {1})", r"\left({0} - {1}\right)", 1.0, False),
    ("mul", np.multiply, "({0} * {1})", r"{0} \cdot {1}", 3.0, True),
    ("div", lambda x, y: x * _inverse(y), "({0} / {1})", r"\frac{{{0}}}{{{1}}}", 1.0, False),
    ("min", np.minimum, "min({0}, {1})", r"\min\left({0}, {1}\right)", 0.3, True),
    ("max", np.maximum, "max({0}, {1})", r"\max\left({0}, {1}\right)", 0.3, True),
)
_REDUCTIONS: tuple[tuple[str, Callable[[Floats], Floats], str, str, float], ...] = (
    ("mean", lambda x: x.mean(-1), "mean({0})", r"\mathrm{{mean}}\left({0}\right)", 3.0),
    ("std", lambda x: x.std(-1), "std({0})", r"\mathrm{{std}}\left({0}\right)", 1.0),
    ("largest", lambda x: np.abs(x).max(-1), "largest|{0}|", r"\max\left|{0}\right|", 0.5),
    ("norm", lambda x: np.sqrt((x * x).mean(-1)), "norm({0})", r"\left\|{0}\right\|", 1.0),
)
_OVER_LAYERS: tuple[tuple[str, Callable[[Floats], Floats], str, str, float], ...] = (
    ("sum", lambda x: x.sum(1), "sum_l {0}", r"\sum_l {0}", 6.0),
    ("maximum", lambda x: x.max(1), "max_l {0}", r"\max_l {0}", 0.5),
    ("minimum", lambda x: x.min(1), "min_l {0}", r"\min_l {0}", 0.5),
    ("length", lambda x: np.sqrt((x * x).sum(1)), "norm_l {0}", r"\left\|{0}\right\|_l", 0.5),
    (
        "neighbours",
        lambda x: (x[:, 1:] * x[:, :-1]).sum(1),
        "sum_l ({0})_l ({0})_(l+1)",
        r"\sum_l \left({0}\right)_l \left({0}\right)_{{l+1}}",
        0.5,
    ),
)


def _operations() -> list[Operation]:
    found = []
    for letter, kind, axis in (("w", Weights, 2), ("a", Inputs, 1)):
        for name, apply, infix, latex, priority in (*_ELEMENTWISE, *_OF_A_TENSOR):
            found.append(Operation(f"{name}_{letter}", (kind,), kind, apply, infix, latex, priority))
        for name, pair, infix, latex, priority, swaps in _PAIRS:
            found.append(Operation(f"{name}_{letter}", (kind, kind), kind, pair, infix, latex, priority, swaps))
        for name, apply, infix, latex, priority in _REDUCTIONS:
            reduce = _reduction(apply, axis)
            found.append(Operation(f"{name}_{letter}", (kind,), Number, reduce, infix, latex, priority))
    for name, apply, infix, latex, priority in _ELEMENTWISE:
        found.append(Operation(name, (Number,), Number, apply, infix, latex, priority))
    found.append(Operation("power", (Number,), Number, lambda x: 4.0 ** -np.clip(x, -30, 30), "4^-({0})", "4^{{-{0}}}"))
    for name, pair, infix, latex, priority, swaps in _PAIRS:
        found.append(Operation(name, (Number, Number), Number, pair, infix, latex, priority, swaps))
    for name, apply, infix, latex, priority in _OVER_LAYERS:
        found.append(Operation(f"{name}_over_layers", (Number,), Score, apply, infix, latex, priority))
    for name, pair, infix, latex, priority, swaps in _PAIRS[:3]:
        found.append(Operation(f"{name}_scores", (Score, Score), Score, pair, infix, latex, 0.5 * priority, swaps))
    return found


def _reduction(apply: Callable[[Floats], Floats], axis: int) -> Callable[[Floats], Floats]:
    """Elements [L, formats, K] -> numbers, with an axis for the formats of the other slot."""
    return lambda x: np.expand_dims(apply(x), axis)


def _sample(name: str) -> Callable[[LayerStatistics], Floats]:
    return lambda s: s.samples[name]


def _number(name: str) -> Callable[[LayerStatistics], Floats]:
    return lambda s: s.numbers[name][:, None, None]


def _loss(name: str, slot: int) -> Callable[[LayerStatistics], Floats]:
    return lambda s: np.expand_dims(s.losses[name][slot], 2 - slot)


def _inputs() -> list[Input]:
    found = [Input("V", Weights, _sample("virtual_gradient"), "V")]
    for letter, slot, kind, value in (("w", "weight", Weights, "W"), ("a", "act", Inputs, "A")):
        found.append(Input(value, kind, _sample(f"{slot}_value"), value))
        for symbol, what, priority in (("G", "gradient", 2.0), ("H", "hessian", 2.0), ("E", "error", 4.0)):
            read = _sample(f"{slot}_{what}")
            found.append(Input(f"{symbol}_{letter}", kind, read, f"{symbol}_{letter}", None, priority))
    found.append(Input("b_w", Number, lambda s: s.bits("weight")[:, :, None], "b_w", None, 4.0))
    found.append(Input("b_a", Number, lambda s: s.bits("act")[:, None, :], "b_a", None, 1.0))
    for name, symbol in (("parameters", "n"), ("macs", "m"), ("stage", "s"), ("orm", r"\gamma"), ("synflow", r"\phi")):
        found.append(Input(name, Number, _number(name), symbol))
    for name in SCORES:
        for index, letter in enumerate("wa"):
            latex = rf"\mathrm{{{name}}}_{letter}".replace("_error", r"\_error")
            found.append(Input(f"{name}_{letter}", Number, _loss(name, index), latex, name))
    return found


OPERATIONS = {op.name: op for op in _operations()}
INPUTS = {source.name: source for source in _inputs()}


def _primitive_set() -> gp.PrimitiveSetTyped:
    pset = gp.PrimitiveSetTyped("proxy", [], Score)
    for op in OPERATIONS.values():
        pset.addPrimitive(op.apply, list(op.takes), op.gives, name=op.name)
    for source in INPUTS.values():
        pset.addTerminal(source.read, source.gives, name=source.name)
    return pset


PRIMITIVES = _primitive_set()


def parse(names: Sequence[str]) -> gp.PrimitiveTree:
    """The tree of node names in prefix order.

    Raises:
        ValueError: an unknown name, or names that do not form an expression of type Score.
    """
    unknown = [name for name in names if name not in OPERATIONS and name not in INPUTS]
    if unknown:
        raise ValueError(f"the expression has unknown operations or inputs: {', '.join(map(str, unknown[:5]))}.")
    wanted: list[type] = [Score]
    for name in names:
        given = OPERATIONS[name].gives if name in OPERATIONS else INPUTS[name].gives
        if not wanted or wanted.pop() is not given:
            raise ValueError(f"the expression is not well typed at {name!r}.")
        wanted += reversed(OPERATIONS[name].takes if name in OPERATIONS else ())
    if wanted:
        raise ValueError("the expression ends too early.")
    return gp.PrimitiveTree([PRIMITIVES.mapping[name] for name in names])


def names_of(tree: gp.PrimitiveTree) -> list[str]:
    """Node names in prefix order, the inverse of `parse`."""
    return [node.name for node in tree]


def fold(tree: gp.PrimitiveTree, terminal: Callable[[str], Any], node: Callable[[str, list[Any]], Any]) -> Any:
    """A tree from the leaves to the root: `terminal(name)` of inputs, `node(name, results)` of operations."""
    stack: list[Any] = []
    for item in reversed(tree):
        arguments = [stack.pop() for _ in range(item.arity)]
        stack.append(node(item.name, arguments) if arguments else terminal(item.name))
    return stack.pop()


def infix(tree: gp.PrimitiveTree) -> str:
    """The formula for people.

    Examples:
        >>> infix(parse(["sum_over_layers", "mul", "b_w", "mean_w", "abs_w", "W"]))
        'sum_l (b_w * mean(|W|))'
    """
    return str(fold(tree, str, lambda name, arguments: OPERATIONS[name].infix.format(*arguments)))


def latex(tree: gp.PrimitiveTree) -> str:
    r"""The formula in LaTeX.

    Examples:
        >>> latex(parse(["sum_over_layers", "mul", "b_w", "mean_w", "abs_w", "W"]))
        '\\sum_l b_w \\cdot \\mathrm{mean}\\left(\\left|W\\right|\\right)'
    """
    terms = fold(tree, lambda name: INPUTS[name].latex, lambda name, parts: OPERATIONS[name].latex.format(*parts))
    return str(terms)


def is_additive(tree: gp.PrimitiveTree) -> bool:
    """Whether the score is a sum over layers: only `sum_over_layers`, added and subtracted."""
    scores = {item.name for item in tree if item.ret is Score}
    return scores <= {"sum_over_layers", "add_scores", "sub_scores"}


def canonical(tree: gp.PrimitiveTree) -> str:
    """One text for trees that order configs alike by the rules of algebra.

    Arguments of commutative operations are sorted; signs and absolute values that change nothing are left out, also that of
    the whole score, whose direction is a matter of its own.
    """

    def base(name: str) -> str:
        return name.removesuffix("_w").removesuffix("_a")

    def node(name: str, arguments: list[str]) -> str:
        op = base(name)
        inner = [argument.partition("(") for argument in arguments]
        if op in ("abs", "square", "sqrt", "log") and base(inner[0][0]) in ("neg", "abs"):
            return node(name, [inner[0][2][:-1]])  # the sign of the argument does not matter
        if op == "neg" and base(inner[0][0]) == "neg":
            return inner[0][2][:-1]
        if op == "abs" and base(inner[0][0]) in ("square", "sqrt", "exp", "relu", "softmax", "std", "norm", "largest"):
            return arguments[0]
        if OPERATIONS[name].commutative:
            arguments = sorted(arguments)
        return f"{name}({','.join(arguments)})"

    text = str(fold(tree, str, node))
    while text.startswith("sum_over_layers(neg("):
        text = f"sum_over_layers({text[len('sum_over_layers(neg(') : -1]}"
    return text


@dataclass(frozen=True)
class EvolvedProxy:
    """A tree and its direction, a `Proxy`.

    Attributes:
        tree: of type Score.
        sign: 1 if higher values of the tree mean higher accuracy, -1 otherwise; known from the search half.
        name: of the proxy.
    """

    tree: gp.PrimitiveTree
    sign: int = 1
    name: str = "evolved"

    @property
    def additive(self) -> bool:
        """See `is_additive`."""
        return is_additive(self.tree)

    @property
    def needs(self) -> tuple[str, ...]:
        """The additive scores among the inputs."""
        used = [INPUTS[item.name].score for item in self.tree if item.arity == 0]
        return tuple(dict.fromkeys(score for score in used if score is not None))

    def cells(self, statistics: LayerStatistics) -> Floats:
        """See `Proxy`."""
        if not self.additive:
            raise ValueError(f"the proxy {self.name!r} is not a sum over layers.")

        def node(name: str, arguments: list[Floats]) -> Floats:
            return arguments[0] if name == "sum_over_layers" else OPERATIONS[name].apply(*arguments)

        with np.errstate(all="ignore"):
            values = self.sign * fold(self.tree, self._read(statistics), node)
        shape = (len(statistics.names), *(statistics.bits(slot).shape[1] for slot in SLOTS))
        return np.broadcast_to(values, shape)

    def scores(self, statistics: LayerStatistics, genomes: Genomes) -> Floats:
        """See `Proxy`; not finite where the expression overflows."""

        def node(name: str, arguments: list[Floats]) -> Floats:
            op = OPERATIONS[name]
            if op.takes == (Number,) and op.gives is Score:
                return op.apply(occupied(arguments[0], statistics.space, genomes))
            return op.apply(*arguments)

        with np.errstate(all="ignore"):
            values: Floats = self.sign * fold(self.tree, self._read(statistics), node)
        return values

    def _read(self, statistics: LayerStatistics) -> Callable[[str], Floats]:
        check_needs(self.name, self.needs, statistics)
        return lambda name: INPUTS[name].read(statistics)

    def to_json(self) -> dict[str, Any]:
        """A JSON-able dict."""
        return {
            "format": FORMAT,
            "sign": self.sign,
            "tree": names_of(self.tree),
            "formula": f"{'-' * (self.sign < 0)}{infix(self.tree)}",
            "latex": f"{'-' * (self.sign < 0)}{latex(self.tree)}",
            "additive": self.additive,
        }

    @staticmethod
    def load(path: Path) -> EvolvedProxy:
        """Reads a file that holds a dict of `to_json`.

        Raises:
            ValueError: it is missing, damaged, or no proxy.
        """
        data = read_json(path)
        if not isinstance(data, dict) or data.get("format") != FORMAT or data.get("sign") not in (1, -1):
            raise ValueError(f"'{path}' holds no evolved proxy.")
        names = data.get("tree")
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError(f"'{path}' holds no evolved proxy: its tree is not a list of names.")
        try:
            return EvolvedProxy(parse(names), data["sign"], f"{PREFIX}{path}")
        except ValueError as error:
            raise ValueError(f"'{path}' holds no evolved proxy: {error}") from error


def find_proxy(name: str) -> Proxy:
    """A hand-made proxy by name, or the evolved one of the file in `emq:FILE`.

    Raises:
        ValueError: an unknown name, or a file that holds no proxy.
    """
    if name.startswith(PREFIX):
        return EvolvedProxy.load(Path(name.removeprefix(PREFIX)))
    if name not in PROXIES:
        raise ValueError(f"unknown proxy {name!r}; the proxies are {', '.join(PROXIES)}, and emq:FILE.")
    return PROXIES[name]
