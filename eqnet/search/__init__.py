"""Which config wins: search on top of a score function and cost models."""

from eqnet.search.genetic import ParetoFront, SearchResult, front, genetic_search, pareto_search

__all__ = ["ParetoFront", "SearchResult", "front", "genetic_search", "pareto_search"]
