"""New proxies: random typed trees, mutants and crossovers. DEAP's own operators draw from Python's global generator."""

from __future__ import annotations

from typing import Any

import numpy as np
from deap import gp
from numpy.typing import NDArray

from eqnet.scoring.emq_trees import INPUTS, OPERATIONS, PRIMITIVES, Score
from eqnet.scoring.layer_statistics import LayerStatistics

Floats = NDArray[np.float64]
MAX_NODES = 32
_DEPTH = 6  # of random trees


class Grower:
    """Draws random trees and mutants."""

    def __init__(self, statistics: LayerStatistics, *, priority: bool = True, scores: bool = True) -> None:
        """Tabulates what may be drawn for each type, with its probability.

        Args:
            statistics: inputs that were not gathered are left out.
            priority: draw operations and inputs by their weights (EMQ's operation sampling prioritisation), not uniformly.
            scores: additive scores may be inputs.
        """
        self._terminals: dict[type, tuple[list[Any], Floats]] = {}
        self._operations: dict[type, tuple[list[Any], Floats]] = {}
        for kind in {op.gives for op in OPERATIONS.values()}:
            inputs = [x for x in INPUTS.values() if x.gives is kind]
            inputs = [x for x in inputs if x.score is None or (scores and x.score in statistics.losses)]
            operations = [op for op in OPERATIONS.values() if op.gives is kind]
            for table, nodes in ((self._terminals, inputs), (self._operations, operations)):
                weights = np.array([node.priority if priority else 1.0 for node in nodes], float)
                table[kind] = [PRIMITIVES.mapping[node.name] for node in nodes], weights / max(weights.sum(), 1e-300)

    def grow(self, rng: np.random.Generator, kind: type = Score, depth: int | None = None) -> gp.PrimitiveTree:
        """A random tree of a type; whole proxies have `MAX_NODES` nodes at most.

        Args:
            rng: source of randomness.
            kind: the type.
            depth: where inputs end the tree as soon as types allow; None draws it.
        """
        while True:
            limit = int(rng.integers(3, _DEPTH + 1)) if depth is None else depth
            tree = self._drawn(rng, kind, limit)
            if len(tree) <= MAX_NODES:
                return tree

    def _drawn(self, rng: np.random.Generator, kind: type, limit: int) -> gp.PrimitiveTree:
        nodes: list[Any] = []
        open_types = [(kind, limit)]
        while open_types:
            wanted, left = open_types.pop()
            terminals, weights = self._terminals[wanted]
            if terminals and (left <= 0 or rng.random() < 0.25):
                nodes.append(terminals[rng.choice(len(terminals), p=weights)])
                continue
            operations, weights = self._operations[wanted]
            node = operations[rng.choice(len(operations), p=weights)]
            if wanted is Score and (left < 4 or len(nodes) > MAX_NODES // 2):
                node = PRIMITIVES.mapping["sum_over_layers"]
            nodes.append(node)
            open_types += [(argument, left - 1) for argument in reversed(node.args)]
        return gp.PrimitiveTree(nodes)

    def mutated(self, tree: gp.PrimitiveTree, rng: np.random.Generator) -> gp.PrimitiveTree:
        """One node becomes another of the same signature, or a part becomes a new one; a tree that grew too large is drawn again."""
        index = int(rng.integers(len(tree)))
        node = tree[index]
        mutant = gp.PrimitiveTree(tree)
        if rng.random() < 0.5:
            nodes, weights = (self._operations if node.arity else self._terminals)[node.ret]
            fits = np.array([getattr(n, "args", []) == getattr(node, "args", []) for n in nodes]) * weights
            if fits.sum() > 0:
                mutant[index] = nodes[rng.choice(len(nodes), p=fits / fits.sum())]
                return mutant
        mutant[tree.searchSubtree(index)] = self.grow(rng, node.ret, int(rng.integers(0, 3)))
        return mutant if len(mutant) <= MAX_NODES else self.grow(rng)


def crossed(first: gp.PrimitiveTree, second: gp.PrimitiveTree, rng: np.random.Generator) -> gp.PrimitiveTree:
    """The first tree with a part replaced by one of the same type from the second; the shorter parent if it grew too large."""
    child = gp.PrimitiveTree(first)
    index = int(rng.integers(len(first)))
    donors = [i for i, node in enumerate(second) if node.ret is first[index].ret]
    if donors:
        part = second.searchSubtree(donors[int(rng.integers(len(donors)))])
        child[first.searchSubtree(index)] = second[part]
    return child if len(child) <= MAX_NODES else min(first, second, key=len)
