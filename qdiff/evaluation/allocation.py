"""Bits for every unit under a budget: the choice that adds the least error, by a table of what each unit's costs."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from qdiff.evaluation.cost import FLOPS_PER_MAC, counted_bits
from qdiff.evaluation.sensitivity import Sensitivity
from qdiff.recipes.recipe import Recipe, Rule

CELLS = 20000  # resolution of the budget in the exact search


def allocate(errors: np.ndarray, costs: np.ndarray, budget: int) -> list[int]:
    """One column of each row, so that the errors' sum is least among all choices whose costs' sum is at most budget.

    errors, costs: [U, B], costs whole numbers. A multiple-choice knapsack, solved by dynamic programming over the
    budget in CELLS cells: costs are rounded up to cells, so the budget holds, and within that rounding (at most U
    cells) the choice is the best. Raises ValueError where even the cheapest choice exceeds the budget.
    """
    if not np.isfinite(errors).all():
        raise ValueError("allocation: expected finite errors, found undefined ones")
    cheapest = int(costs.min(1).sum())
    if cheapest > budget:
        raise ValueError(f"budget: expected at least {cheapest}, the cheapest choice, found {budget}")
    rows, spare = np.arange(len(costs)), costs - costs.min(1, keepdims=True)  # only what exceeds the cheapest is chosen
    cell = max(1, -(-(budget - cheapest) // CELLS))
    cells, needed = (budget - cheapest) // cell, -(-spare // cell)
    best = np.zeros(cells + 1)
    taken = np.zeros((len(costs), cells + 1), dtype=np.int16)
    for u in rows:
        options = np.full((costs.shape[1], cells + 1), np.inf)
        for b in range(costs.shape[1]):
            if needed[u, b] <= cells:
                options[b, needed[u, b] :] = best[: cells + 1 - needed[u, b]] + errors[u, b]
        taken[u] = options.argmin(0)
        best = options.min(0)
    chosen, left = [], cells
    for u in reversed(rows):
        chosen.append(int(taken[u, left]))
        left -= needed[u, chosen[-1]]
    return chosen[::-1]


def mixed_recipe(recipe: Recipe, found: Sensitivity, bits: list[int]) -> Recipe:
    """The recipe with a rule for every unit whose weights take other bits than the recipe's own."""
    rules = list(recipe.rules)
    for unit, layers, width in zip(found.units, found.layers, bits, strict=True):
        if width != recipe.weights.bits:
            rules.append(Rule(unit if layers == (unit,) else f"{unit}.*", weight_bits=width))
    return replace(recipe, name=f"{recipe.name}, mixed", rules=tuple(rules))


def bit_operations(products: int, weight_bits: int, act_bits: int) -> int:
    """Of that many multiply-accumulates, as the papers count them (docs/protocol.md); 32 bits are float32."""
    return FLOPS_PER_MAC * products * counted_bits(weight_bits) * counted_bits(act_bits)
