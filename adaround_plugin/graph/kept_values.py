"""What a stream knows of one batch, put away between stages, and looked up when a node asks for it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any

from torch import fx

from adaround_plugin.graph.memory import Memory
from adaround_plugin.graph.value_files import Kept

__all__ = ["BatchValues", "KeptValues"]


class KeptValues(MutableMapping[fx.Node, Any]):
    """Values by node: those of now, and those that were put away.

    Args:
        kept: what is put away already.

    Attributes:
        kept: what is put away.
    """

    def __init__(self, kept: Mapping[fx.Node, Kept]) -> None:
        self.kept = dict(kept)
        # looked up, or new, since values were put away
        self._open: dict[fx.Node, Any] = {}

    def __getitem__(self, node: fx.Node) -> Any:
        if node not in self._open:
            self._open[node] = self.kept[node].value
        return self._open[node]

    def __setitem__(self, node: fx.Node, value: Any) -> None:
        self.kept.pop(node, None)
        self._open[node] = value

    def __delitem__(self, node: fx.Node) -> None:
        if node not in self:
            raise KeyError(node)
        self.kept.pop(node, None)
        self._open.pop(node, None)

    def __contains__(self, node: object) -> bool:
        return node in self._open or node in self.kept

    def __iter__(self) -> Iterator[fx.Node]:
        yield from self.kept
        yield from (node for node in self._open if node not in self.kept)

    def __len__(self) -> int:
        return len(self.kept.keys() | self._open.keys())

    def copy(self) -> KeptValues:
        """The same values, of which either may forget some."""
        assert self._open.keys() <= self.kept.keys(), "put away first"
        return KeptValues(self.kept)

    def share(self, node: fx.Node, other: KeptValues, source: fx.Node) -> None:
        """Know a value as another stream knows it."""
        self[node] = other[source]
        if source in other.kept:
            self.kept[node] = other.kept[source]

    def restless(self) -> list[fx.Node]:
        """The nodes whose values are new, or cannot stay where they are."""
        return [node for node in self if node not in self.kept or not self.kept[node].is_lasting]

    def close(self) -> None:
        """Forget what was looked up, when all is put away."""
        assert self._open.keys() <= self.kept.keys(), "put away first"
        self._open.clear()

    def read_ahead(self, nodes: Iterable[fx.Node]) -> None:
        """Let the system read the values of these nodes, where they are in a file."""
        for node in nodes:
            if node in self.kept:
                self.kept[node].read_ahead()


def _put_away(memory: Memory, *streams: KeptValues) -> None:
    """Put away what the streams know of one batch, all that is new of it together."""
    new = [(values, node) for values in streams for node in values.restless()]
    kept = memory.keep([values[node] for values, node in new])
    for (values, node), one in zip(new, kept, strict=True):
        values.kept[node] = one
    for values in streams:
        values.close()


class BatchValues(Sequence[tuple[KeptValues, KeptValues]]):
    """What the float and the quantized stream know of every batch.

    Args:
        memory: where values are put away.
        pairs: of each batch.

    Attributes:
        pairs: of each batch; to change.
    """

    def __init__(self, memory: Memory, pairs: Iterable[tuple[KeptValues, KeptValues]]) -> None:
        self._memory, self.pairs = memory, list(pairs)

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, batch: Any) -> Any:
        """Values to read: what is looked up lives as long as they do."""
        exact, quantized = self.pairs[batch]
        return exact.copy(), quantized.copy()

    def visit(self, *reads: Iterable[fx.Node]) -> Iterator[tuple[int, tuple[KeptValues, KeptValues]]]:
        """Every batch's number and values to change, which are put away afterwards.

        Args:
            reads: nodes of either stream whose values will be looked up.
        """
        for number, pair in enumerate(self.pairs):
            for following in self.pairs[number + 1 : number + 2]:
                self._read_ahead(following, reads)
            yield number, pair
            _put_away(self._memory, *pair)

    def read_ahead(self, *reads: Iterable[fx.Node]) -> None:
        """Let the system read what is looked up first."""
        for pair in self.pairs[:1]:
            self._read_ahead(pair, reads)

    @staticmethod
    def _read_ahead(pair: tuple[KeptValues, KeptValues], reads: tuple[Iterable[fx.Node], ...]) -> None:
        for values, nodes in zip(pair, reads, strict=True):
            values.read_ahead(nodes)

    def exact(self) -> list[KeptValues]:
        """The float stream's, to be shared with another pass."""
        return [exact for exact, _ in self.pairs]

    def copy(self) -> BatchValues:
        """The same values, of which either may forget some."""
        return BatchValues(self._memory, self)

    def with_quantized_of(self, other: BatchValues) -> BatchValues:
        """What the float stream knows now, and what the quantized stream knew there."""
        pairs = zip(self.pairs, other.pairs, strict=True)
        return BatchValues(self._memory, [(exact, again.copy()) for (exact, _), (_, again) in pairs])
