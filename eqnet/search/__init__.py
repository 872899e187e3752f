"""Which config wins: search on top of a score function and cost models."""

from eqnet.search.genetic import ParetoFront, SearchResult, front, genetic_search, pareto_search
from eqnet.search.measured import Candidate, Found, measured_search

__all__ = [
    "Candidate",
    "Found",
    "ParetoFront",
    "SearchResult",
    "front",
    "genetic_search",
    "measured_search",
    "pareto_search",
]
