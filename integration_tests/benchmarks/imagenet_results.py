"""Results of the experiment on ImageNet, one JSON line each, and the table of them beside the paper's.

A line has `network`, `mode`, `method`, `seed`, `score` in percent, `seconds` of `adaround`, `recipe` and the `settings`
it was measured under. A file holds one set of settings for each network.
"""

import json
import os
import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

from adaround_plugin.errors import InvalidOptionError
from integration_tests.benchmarks.imagenet_models import TOPOLOGIES

__all__ = ["FLOAT", "PAPER", "Key", "Results", "table"]

Key = tuple[str, str, str, int]  # network, mode, method, seed

FLOAT: Final = ("W32A32", "float")  # mode and method of the float network

# Top-1 in percent, with the spread over its runs where the paper has one: Nagel et al. 2020 (arXiv 2004.10568), table
# 7; checked against a transcription of that table, not against the paper itself. mIoU of DeepLabV3+: its table 8;
# checked against the README of AIMET, a library of the paper's authors. AdaRound's MobileNetV2 is equalized.
PAPER: Final[Mapping[tuple[str, str, str], str]] = {
    ("resnet18", *FLOAT): "69.68",
    ("resnet18", "W4A32", "nearest"): "23.99",
    ("resnet18", "W4A32", "AdaRound"): "68.71 ± 0.06",
    ("resnet18", "W4A8", "AdaRound"): "68.55 ± 0.01",
    ("resnet50", *FLOAT): "76.07",
    ("resnet50", "W4A32", "nearest"): "35.60",
    ("resnet50", "W4A32", "AdaRound"): "75.23 ± 0.04",
    ("resnet50", "W4A8", "AdaRound"): "75.01 ± 0.05",
    ("inception_v3", *FLOAT): "77.40",
    ("inception_v3", "W4A32", "nearest"): "1.67",
    ("inception_v3", "W4A32", "AdaRound"): "75.76 ± 0.09",
    ("inception_v3", "W4A8", "AdaRound"): "75.72 ± 0.09",
    ("mobilenet_v2", *FLOAT): "71.72",
    ("mobilenet_v2", "W4A32", "nearest"): "8.09",
    ("mobilenet_v2", "W4A32", "AdaRound"): "69.78 ± 0.05",
    ("mobilenet_v2", "W4A8", "AdaRound"): "69.25 ± 0.06",
    ("deeplabv3plus", *FLOAT): "72.94",
    ("deeplabv3plus", "W4A8", "nearest"): "6.09",
    ("deeplabv3plus", "W4A8", "AdaRound"): "70.86",
}


class Results:
    """The lines of a results file, and a place to append more.

    Raises:
        InvalidOptionError: a line of the file is not one of this experiment's.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lines: dict[Key, dict[str, Any]] = {}
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        # what follows the last newline was cut off while it was written
        whole = text[: text.rfind("\n") + 1]
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                entry = json.loads(line)
                self.lines[entry["network"], entry["mode"], entry["method"], entry["seed"]] = entry
                entry["score"], entry["settings"].items()
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                raise InvalidOptionError(
                    "results", f"{path}, line {number}, is no result ({error!r})", "Name another file."
                ) from error
        if whole != text:
            path.write_text(whole, encoding="utf-8")

    def check(self, network: str, settings: Mapping[str, Any]) -> None:
        """Refuse to mix results of a network.

        Raises:
            InvalidOptionError: the file has results of the network under other settings.
        """
        for entry in self.lines.values():
            if entry["network"] == network and entry["settings"] != settings:
                other = entry["settings"]
                differing = ", ".join(
                    f"{name} {other.get(name)!r} instead of {settings.get(name)!r}"
                    for name in sorted({*other, *settings})
                    if other.get(name) != settings.get(name)
                )
                raise InvalidOptionError(
                    "results",
                    f"{self.path} has results of {network} with {differing}",
                    "Name another file, or repeat its settings.",
                )

    def append(self, key: Key, **values: Any) -> None:
        """Add a result and write it out before returning."""
        entry = {**dict(zip(("network", "mode", "method", "seed"), key, strict=True)), **values}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.lines[key] = entry


def table(entries: Iterable[Mapping[str, Any]]) -> str:
    """A Markdown table of results: mean over the seeds and, of several, the standard deviation.

    `loss` is float minus this score. The paper's column has the paper's AdaRound in the row of every method that
    learns, and a dash where the paper has no figure.
    """
    groups: dict[tuple[str, str, str], list[Mapping[str, Any]]] = {}
    for entry in entries:
        groups.setdefault((entry["network"], entry["mode"], entry["method"]), []).append(entry)
    head = ["network", "weights, activations", "method", "score %", "loss", "the paper's %", "seeds", "seconds"]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for (network, mode, method), group in groups.items():
        scores = [entry["score"] for entry in group]
        score = statistics.fmean(scores)
        exact = groups.get((network, *FLOAT))
        loss = "-" if exact is None or method == "float" else f"{exact[0]['score'] - score:.2f}"
        spread = f" ± {statistics.stdev(scores):.2f}" if len(scores) > 1 else ""
        published = PAPER.get((network, mode, method if method in ("float", "nearest") else "AdaRound"), "-")
        seconds = statistics.fmean(entry["seconds"] for entry in group)
        cells = [TOPOLOGIES[network].title, mode, method, f"{score:.2f}{spread}", loss, published]
        lines.append(f"| {' | '.join([*cells, str(len(group)), f'{seconds:.0f}'])} |")
    return "\n".join(lines)
