"""Taylor expansions of second to fourth order with backward differences (TaylorSeer, arXiv 2503.06923)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from hgc_learn.predictors.base import Fill, Predictor


def fill(ages: Sequence[int], step: int, parameters: Mapping[str, Tensor]) -> Fill:
    """sum_i k^i / i! D^i_0, of the highest order that the values at hand allow, with D^0_j = F_j and
    D^(i+1)_j = (D^i_j - D^i_(j+1)) / (steps from F_(j+1) to F_j).

    With an even spacing N and a = k/N the weights of second order are 1 + a + a^2/2, -(a + a^2), a^2/2.
    """
    size = len(ages)
    differences = [[float(i == j) for i in range(size)] for j in range(size)]  # D^order_j in terms of the F_i
    coefficients, weight = differences[0], 1.0
    for order in range(1, size):
        differences = [
            [(x - y) / (ages[j + 1] - ages[j]) for x, y in zip(differences[j], differences[j + 1], strict=True)]
            for j in range(size - order)
        ]
        weight *= ages[0] / order
        coefficients = [c + weight * d for c, d in zip(coefficients, differences[0], strict=True)]
    return Fill(tuple(coefficients))


TAYLOR2 = Predictor("taylor2", "2", 3, fill)
TAYLOR3 = Predictor("taylor3", "3", 4, fill)
TAYLOR4 = Predictor("taylor4", "4", 5, fill)
