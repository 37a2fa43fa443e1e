"""Block by block: layers decided one by one, then all roundings of a block learned together on samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from adaround_plugin.errors import InvalidOptionError
from adaround_plugin.hosts.base import Host
from adaround_plugin.learning.layerwise import LayerWise, PendingLayers
from adaround_plugin.learning.passes import Pass
from adaround_plugin.learning.region_step import RegionStep
from adaround_plugin.options import check_bool, check_integer, check_number, named
from adaround_plugin.regions.blocks import Block, find_blocks, named_blocks
from adaround_plugin.regions.learnable import Outcome, WeightInit
from adaround_plugin.regions.reconstruction import reconstruct
from adaround_plugin.regions.region import Drawing, Region
from adaround_plugin.report import BlockReport
from adaround_plugin.solvers.relaxation import Schedule

__all__ = ["BlockWise"]

# values of an activation, at most, for which blocks pay (docs/benchmarks.md)
_FEW_LEVELS = 16
_REGULARIZATION, _BETA = 30.0, (8.0, 2.0)


@dataclass(frozen=True, kw_only=True)
class BlockWise:
    """Decide the layers of a block one by one, then learn all of its roundings together; for activations of 4 bits.

    A block is learned by the error of its output on samples (BRECQ, Li et al. 2021, arXiv 2102.05426), each weight
    between the integer that was decided and the neighbour on whose side the error falls, by AdaRound's relaxation
    (arXiv 2004.10568, equations 21 to 24). What is no better than its start on held-out samples is not taken.

    Attributes:
        layers: how layers are decided before that.
        blocks: None for blocks found in the graph (a residual block, layers of a chain in threes); `"auto"` for these
            where AdaRound's observers watch activations of at most 4 bits, and for none elsewhere; or names of modules
            or patterns, each a block. Other layers are decided one by one.
        iterations: steps of Adam for each block; fewer if every weight has settled before.
        batch_size: samples in a step; a program exported for one batch size has that.
        learning_rate: of Adam, for the shares between two integers.
        drop: probability with which an activation in a block, or at its entry, is left unquantized in a step (QDrop,
            Wei et al. 2022, arXiv 2203.05740).
        weighs_outputs: weigh the entries of a block's output by their squared derivative of the network's output.
        learns_scale: learn scales of weights too, where they are ours to choose. (Biases are learned where the recipe
            of `layers` corrects them.)

    Raises:
        InvalidOptionError: an option is out of range.
    """

    layers: LayerWise = field(default_factory=lambda: LayerWise(column_weighting="fisher"))
    blocks: Sequence[str] | Literal["auto"] | None = None
    iterations: int = 1000
    batch_size: int = 32
    learning_rate: float = 0.1
    drop: float = 0.5
    weighs_outputs: bool = True
    learns_scale: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.layers, LayerWise):
            raise InvalidOptionError("BlockWise.layers", f"{self.layers!r} is not a LayerWise", "Pass a LayerWise.")
        check_integer(*named(self, "iterations"), least=1)
        check_integer(*named(self, "batch_size"), least=1)
        check_number(*named(self, "learning_rate"), above=0)
        check_number(*named(self, "drop"), least=0, below=1)
        check_bool(*named(self, "weighs_outputs"))
        check_bool(*named(self, "learns_scale"))
        blocks = self.blocks
        is_list = isinstance(blocks, Sequence) and not isinstance(blocks, str) and len(blocks) > 0
        if blocks not in (None, "auto") and not (is_list and all(isinstance(name, str) for name in blocks or ())):
            raise InvalidOptionError(
                "BlockWise.blocks", f"{blocks!r} is not a list of names", "Pass None, 'auto' or a list of names."
            )

    @property
    def is_baseline(self) -> bool:
        """Never: blocks are learned."""
        return False

    def check(self, host: Host) -> None:
        """Raise `InvalidOptionError` where a name in `blocks` names no block of the network."""
        self._blocks(host)

    def _blocks(self, host: Host) -> list[Block]:
        if self.blocks is None or isinstance(self.blocks, str):
            return find_blocks(host) if self.blocks is None or _has_few_levels(host) else []
        return named_blocks(host, self.blocks)

    def with_layers(self, layers: LayerWise) -> BlockWise:
        """The method whose layers are decided so."""
        return replace(self, layers=layers)

    def learn(self, run: Pass) -> None:
        """Decide every layer and learn every block of a pass."""
        layers = PendingLayers(run, self.layers)
        for block in self._blocks(run.host):
            report = self._learn_block(run, layers, block)
            if report is not None:
                run.report.blocks.append(report)
        layers.decide_all()

    def _learn_block(self, run: Pass, layers: PendingLayers, block: Block) -> BlockReport | None:
        """Decide a block's layers one by one, then all together from its entry; None if that was all."""
        nodes = [node for node in block.nodes if node.name not in run.excluded]
        names = tuple(node.name for node in nodes)
        if not nodes:
            return None
        layers.advance()
        entry = run.snapshot() if block.exits else None
        layers.decide(names)
        if entry is None:
            return BlockReport(block.name, names, note=block.note) if block.note else None
        step = RegionStep(
            run=run,
            layers=self.layers,
            name=block.name,
            nodes=nodes,
            exits=block.exits,
            drawing=Drawing(self.batch_size, self.drop, self.weighs_outputs),
            phase="reconstruct",
            learns_scale=self.learns_scale,
            propagate_error=self.layers.recipe.propagate_error,
            start=entry,
        )

        def learn(region: Region, inits: list[WeightInit], report: Callable[[int, float], None]) -> Outcome:
            return reconstruct(region, inits, self._schedule, from_weight=False, seed=run.seed, report=report)

        return step.learn(learn)

    @property
    def _schedule(self) -> Schedule:
        return Schedule(
            iterations=self.iterations,
            learning_rate=self.learning_rate,
            regularization=_REGULARIZATION,
            beta=_BETA,
        )


def _has_few_levels(host: Host) -> bool:
    """Whether activations of few bits are quantized."""
    return any(one.quant_max - one.quant_min < _FEW_LEVELS for one in host.quantizers)
