"""Which config wins: search on top of a score function and cost models."""

from eqnet.search.genetic import ParetoFront, SearchResult, front, genetic_search, pareto_search
from eqnet.search.ilp import ExactResult, InfeasibleError, exact_front, exact_search
from eqnet.search.measured import Candidate, Found, measured_search

__all__ = [
    "Candidate",
    "ExactResult",
    "Found",
    "InfeasibleError",
    "ParetoFront",
    "SearchResult",
    "exact_front",
    "exact_search",
    "front",
    "genetic_search",
    "measured_search",
    "pareto_search",
]
