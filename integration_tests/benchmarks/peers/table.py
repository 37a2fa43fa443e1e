"""The results of peers as Markdown tables and as a figure."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from integration_tests.benchmarks.peers.registry import PEERS

__all__ = ["draw", "show"]

_MARKERS = "os^vD*Ph"


def _label(row: dict[str, Any]) -> str:
    return f"{PEERS[row['peer']].title}: {row['setting']}"


def _place(row: dict[str, Any]) -> tuple[int, int]:
    """Where the registry has the peer, and where the peer has the setting."""
    return list(PEERS).index(row["peer"]), list(PEERS[row["peer"]].settings).index(row["setting"])


def _ordered(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """By samples, bits, group, peer and setting."""
    return sorted(rows, key=lambda row: (-row["samples"], -row["bits"], row.get("group") or 0, *_place(row)))


def _cells(row: dict[str, Any]) -> list[str]:
    """One line of a table."""
    group = row.get("group")
    start = [f"W{row['bits']}{'' if group is None else f' g{group}'}", _label(row), str(row["samples"])]
    if "failed" in row:
        return [*start, f"fails: `{row['failed']}`", "", "", "", ""]
    more = row["memory"] - row["memory_before"]
    grid = "yes" if row["on_grid"] else "**no**"
    return [
        *start,
        f"{row['score']:.2f}",
        f"{row['divergence']:.4f}",
        f"{row['seconds']:.0f}",
        f"{more:.0f}",
        grid,
    ]


def show(rows: list[dict[str, Any]]) -> None:
    """Print a table for each network, and one of what each tool makes."""
    head = ["weights", "tool: setting", "samples", "score", "divergence", "CPU s", "MB more", "on a grid of its bits"]
    for network in dict.fromkeys(row["network"] for row in rows):
        print(f"\n{network}\n\n| {' | '.join(head)} |\n|{'---|' * len(head)}")
        for row in _ordered([row for row in rows if row["network"] == network]):
            print(f"| {' | '.join(_cells(row))} |")
    print("\n| tool | what comes out | documentation |\n|---|---|---|")
    for peer in PEERS.values():
        print(f"| {peer.title} | {peer.makes} | {peer.page} |")


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Divergence against CPU seconds: a row of panels for each network, a panel for each number of bits.

    Marks are hollow where fewer samples were taken than in other runs on the network.
    """
    from matplotlib.figure import Figure

    rows = [row for row in rows if "failed" not in row and row["on_grid"]]
    names = list(dict.fromkeys(row["network"] for row in rows))
    widths = sorted({row["bits"] for row in rows}, reverse=True)
    most = {name: max(row["samples"] for row in rows if row["network"] == name) for name in names}
    labels = list(dict.fromkeys(_label(row) for row in sorted(rows, key=_place)))
    figure = Figure(figsize=(4.2 * len(widths), 3.6 * len(names) + 1.2), layout="constrained")
    panels = figure.subplots(len(names), len(widths), squeeze=False)
    for name, line in zip(names, panels, strict=True):
        for bits, axes in zip(widths, line, strict=True):
            for row in (row for row in rows if (row["network"], row["bits"]) == (name, bits)):
                peer, setting = _place(row)
                look = {"marker": _MARKERS[setting], "color": f"C{peer}", "label": _label(row)}
                fill = "full" if row["samples"] == most[name] else "none"
                axes.plot(row["seconds"], row["divergence"], linestyle="", fillstyle=fill, **look)
            axes.set_visible(axes.has_data())
            axes.set(xscale="log", yscale="log", title=f"{name}, {bits} bits", xlabel="CPU seconds")
            axes.set_ylabel("divergence from float")
            axes.margins(0.15)
    handles = {
        label: handle for axes in figure.axes for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend([handles[name] for name in labels], labels, loc="outside lower center", ncols=4, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
