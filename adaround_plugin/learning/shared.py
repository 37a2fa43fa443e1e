"""What trials that go through a network side by side have in common."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from adaround_plugin.rounding.grid import Grid

__all__ = ["Shared"]


class Shared:
    """What trials have in common: the float stream's columns, gathered once, and grids, searched once.

    The share of columns that count is `(sum p)^2 / (n sum p^2)` of the squared norms `p` of a layer's `n` columns, over
    all groups: 1 where these are equal, near 0 where a few massive activations carry nearly all.

    Attributes:
        grids: by name of the weighted node, the grid that the first trial to come by has chosen.
        least_share: the smallest share of columns that count, of all layers gone by; 1 before the first.
    """

    def __init__(self) -> None:
        self.grids: dict[str, Grid] = {}
        self.least_share = 1.0
        # by call site and batch
        self._columns: dict[tuple[fx.Node, int], Tensor] = {}

    def columns(self, site: fx.Node, batch: int) -> Tensor | None:
        """`(G, n, D)` columns of the float stream, where a trial has gathered them in this step."""
        return self._columns.get((site, batch))

    def keep(self, site: fx.Node, batch: int, columns: Tensor) -> None:
        """Keep columns of the float stream until all trials have made the step."""
        self._columns[site, batch] = columns

    def end_step(self) -> None:
        """Free the columns, when all trials have made a step."""
        powers: dict[fx.Node, list[Tensor]] = {}
        for (site, _), columns in self._columns.items():
            powers.setdefault(site, []).append(columns.square().sum((0, 2)).double())
        for of_batches in powers.values():
            power = torch.cat(of_batches)
            if power.sum() > 0:
                share = power.sum().square() / (len(power) * power.square().sum())
                self.least_share = min(self.least_share, float(share))
        self._columns.clear()
