"""The additive scores by name, all with one signature; see `sensitivity` for what each measures."""

from __future__ import annotations

from eqnet.scoring.curvature import eigenvalue, hessian
from eqnet.scoring.sensitivity import Score, fisher, gradient, kl, output_error, squared_error

SCORES: dict[str, Score] = {
    "squared_error": squared_error,
    "output_error": output_error,
    "gradient": gradient,
    "fisher": fisher,
    "kl": kl,
    "hessian": hessian,
    "eigenvalue": eigenvalue,
}
