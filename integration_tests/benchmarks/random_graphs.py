"""Networks drawn at random, and what must hold of every one of them after `adaround`, in FX and PT2E.

python -m integration_tests.benchmarks.random_graphs --count 300
"""

from __future__ import annotations

import argparse
import random
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from adaround_plugin import LayerWise, adaround, get_report
from adaround_plugin.hosts.learned import learned_weights
from adaround_plugin.report import Report
from integration_tests.models import assert_unchanged, call, keep_passes, run_stream, snapshot
from integration_tests.region_models import converted, prepared_by

__all__ = ["KINDS", "Drawn", "RandomNetwork", "check", "drawn"]

_SIZE = 6
_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "tanh": torch.tanh,
    "gelu": F.gelu,
    "hardswish": F.hardswish,
    "relu6": F.relu6,
}
# steps of a network: from values (N, C, 6, 6) to another
KINDS = (
    *("convolution", "convolution", "depthwise", "transposed", "linear", "shared", "functional", "computed"),
    *("activation", "add", "gate", "concatenate", "slice", "pool", "pruned", "experts", "written"),
)


@dataclass(frozen=True)
class _Step:
    """One operation.

    Attributes:
        kind: of `KINDS`.
        sources: the values that it takes.
        name: of its module or parameter.
        detail: of its activation function.
    """

    kind: str
    sources: tuple[int, ...]
    name: str = ""
    detail: str = ""


class RandomNetwork(nn.Module):
    """A network of up to a dozen steps, each on values that steps before it left, with one head or two.

    Args:
        seed: of the steps and the weights.
        writes: whether steps write through views.
    """

    def __init__(self, seed: int, writes: bool = False) -> None:
        super().__init__()
        self._draw = random.Random(seed)
        self.steps: list[_Step] = []
        self.kinds: Counter[str] = Counter()
        self._layers: list[tuple[str, int, int]] = []
        # channels of each value
        self._channels = [3]
        self.parts = nn.ModuleDict()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self._append("convolution")
            for _ in range(self._draw.randint(3, 11)):
                kind = self._draw.choice(KINDS)
                if kind != "written" or writes:
                    self._append(kind)
            width = sum(self._channels[value] for value in self._ends())
            self.head = nn.Linear(width, 5)
            self.other = nn.Linear(width, 2) if self._draw.random() < 0.4 else None
            self.form = self._draw.choice(("tensor", "tuple", "dict"))

    def _ends(self) -> list[int]:
        """The values that no step takes."""
        taken = {source for step in self.steps for source in step.sources}
        return [value for value in range(len(self._channels)) if value not in taken]

    def _append(self, kind: str) -> None:
        """Draw a step of this kind, if the values allow one."""
        draw, number = self._draw, len(self.steps)
        source = draw.choice(range(max(0, len(self._channels) - 3), len(self._channels)))
        channels, name, detail = self._channels[source], f"{kind}{number}", ""
        out = channels
        sources: tuple[int, ...] = (source,)
        if kind in ("convolution", "transposed", "functional", "computed"):
            out = draw.choice((4, 6, 8))
        if kind == "convolution":
            groups = draw.choice([one for one in (1, 1, 2, 3) if channels % one == 0 and out % one == 0])
            kernel, bias = draw.choice((1, 3)), draw.random() < 0.7
            layer = nn.Conv2d(channels, out, kernel, padding=kernel // 2, groups=groups, bias=bias)
            with_norm = draw.random() < 0.5
            self.parts[name] = nn.Sequential(layer, _norm(out)) if with_norm else layer
            detail = draw.choice(("", *_ACTIVATIONS))
            self._layers.append((name, channels, out))
        elif kind == "depthwise":
            self.parts[name] = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
        elif kind == "transposed":
            self.parts[name] = nn.ConvTranspose2d(channels, out, 3, padding=1)
        elif kind == "linear":
            out = draw.choice((4, 8))
            self.parts[name] = nn.Linear(channels, out)
        elif kind == "shared":
            fitting = [one for one in self._layers if one[1] == channels]
            if not fitting:
                return
            name, _, out = draw.choice(fitting)
        elif kind == "functional":
            self._parameter(name, out, channels, 3, 3)
            self._parameter(f"{name}_bias", out)
        elif kind == "computed":
            self._parameter(name, out, channels)
            self._parameter(f"{name}_up", out, 2)
            self._parameter(f"{name}_down", 2, channels)
        elif kind == "activation":
            detail = draw.choice(tuple(_ACTIVATIONS))
        elif kind in ("add", "gate"):
            others = [value for value, count in enumerate(self._channels) if count == channels]
            sources = (source, draw.choice(others))
        elif kind == "concatenate":
            other = draw.randrange(len(self._channels))
            sources, out = (source, other), channels + self._channels[other]
        elif kind == "slice":
            if channels < 4:
                return
            out = channels // 2
        elif kind == "pruned":
            self.parts[name] = nn.ModuleList([nn.Linear(channels, 1), nn.Linear(channels, channels)])
        elif kind == "experts":
            experts = [nn.Linear(channels, channels) for _ in range(2)]
            self.parts[name] = nn.ModuleList([nn.Linear(channels, 2), *experts])
        self.steps.append(_Step(kind, sources, name, detail))
        self.kinds[kind] += 1
        self._channels.append(out)

    def _parameter(self, name: str, *shape: int) -> None:
        self.register_parameter(name, nn.Parameter(torch.randn(shape) / max(1, torch.Size(shape[1:]).numel()) ** 0.5))

    def _run(self, step: _Step, values: list[Tensor]) -> Tensor:
        x, name = values[step.sources[0]], step.name
        if step.kind in ("convolution", "shared", "depthwise", "transposed"):
            x = self.parts[name](x)
            return _ACTIVATIONS[step.detail](x) if step.detail else x
        if step.kind == "linear":
            last: Tensor = self.parts[name](x.permute(0, 2, 3, 1))
            return last.permute(0, 3, 1, 2)
        if step.kind == "functional":
            return F.conv2d(x, getattr(self, name), getattr(self, f"{name}_bias"), padding=1)
        if step.kind == "computed":
            weight = getattr(self, name) + getattr(self, f"{name}_up") @ getattr(self, f"{name}_down")
            return F.linear(x.permute(0, 2, 3, 1), weight).permute(0, 3, 1, 2)
        if step.kind == "activation":
            return _ACTIVATIONS[step.detail](x)
        if step.kind == "add":
            return x + values[step.sources[1]]
        if step.kind == "gate":
            return x * torch.sigmoid(values[step.sources[1]])
        if step.kind == "concatenate":
            return torch.cat([x, values[step.sources[1]]], 1)
        if step.kind == "slice":
            return x[:, : x.shape[1] // 2]
        if step.kind == "pool":
            return F.avg_pool2d(x, 3, 1, 1)
        if step.kind == "written":
            y = x * 1.0
            y[:, :1] = torch.relu(y[:, :1])
            return y
        tokens = x.flatten(2).transpose(1, 2)
        return self._pruned(name, x, tokens) if step.kind == "pruned" else self._experts(name, x, tokens)

    def _list(self, name: str) -> list[nn.Module]:
        found = self.parts[name]
        assert isinstance(found, nn.ModuleList)
        return list(found)

    def _pruned(self, name: str, x: Tensor, tokens: Tensor) -> Tensor:
        """The best tokens, transformed, say what all are scaled by."""
        score, layer = self._list(name)
        best = score(tokens).topk(4, 1).indices
        kept = torch.gather(tokens, 1, best.expand(-1, -1, tokens.shape[2]))
        return x * torch.sigmoid(layer(kept).mean(1)).unsqueeze(-1).unsqueeze(-1)

    def _experts(self, name: str, x: Tensor, tokens: Tensor) -> Tensor:
        """Each token goes to one of two linear layers."""
        router, *experts = self._list(name)
        flat = tokens.flatten(0, 1)
        choice, found = router(flat).argmax(1), torch.zeros_like(flat)
        for number, expert in enumerate(experts):
            rows = (choice == number).nonzero().squeeze(1)
            found = found.index_add(0, rows, expert(flat[rows]))
        return found.reshape(tokens.shape).transpose(1, 2).reshape(x.shape)

    def forward(self, image: Tensor) -> Any:
        values = [image]
        for step in self.steps:
            values.append(self._run(step, values))
        features = torch.cat([values[value].mean((2, 3)) for value in self._ends()], 1)
        first = self.head(features)
        outputs = (first,) if self.other is None else (first, self.other(features).sigmoid())
        if self.form == "tensor" and len(outputs) == 1:
            return first
        return {f"out{i}": one for i, one in enumerate(outputs)} if self.form == "dict" else outputs


def _norm(channels: int) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(channels)
    norm.running_mean = torch.randn(channels) * 0.2
    norm.running_var = torch.rand(channels) + 0.5
    return norm


@dataclass
class Drawn:
    """A case drawn at random.

    Attributes:
        seed: that it is drawn by.
        host, bits, activation_bits: how the network is prepared.
        network, data: the network and batches for it.
        report: of learning, once it is checked.
    """

    seed: int
    host: str
    bits: int
    activation_bits: int | None
    network: RandomNetwork
    data: list[Tensor]
    report: Report | None = field(default=None, repr=False)


def drawn(seed: int, host: str) -> Drawn:
    """The case of a seed."""
    draw = random.Random(seed + 1)
    network = RandomNetwork(seed, writes=host == "pt2e").eval()
    # indices and the rows of experts are not what hosts quantize activations of
    selects = network.kinds["pruned"] + network.kinds["experts"]
    activation_bits = None if selects else draw.choice((None, 8))
    count, size = draw.choice((24, 48, 96)), draw.choice((8, 12, 24))
    data = torch.randn(count, 3, _SIZE, _SIZE, generator=torch.Generator().manual_seed(seed))
    return Drawn(seed, host, draw.choice((2, 3, 4)), activation_bits, network, list(torch.split(data, size)))


def check(case: Drawn, method: LayerWise | str = "default") -> None:
    """Raise `AssertionError` unless learning is exact, repeatable, no worse than nearest, and changes nothing else."""
    prepared = prepared_by(case.host, case.activation_bits, case.network, case.data, case.bits)
    before, batches = snapshot(prepared), [batch.clone() for batch in case.data]
    with pytest.MonkeyPatch.context() as patch:
        passes = keep_passes(patch)
        learned, again = (adaround(prepared, case.data, method, progress=False) for _ in range(2))
    assert_unchanged(before, prepared)
    assert all(torch.equal(one, other) for one, other in zip(batches, case.data, strict=True))
    case.report = report = get_report(learned)
    assert report.output_error is not None
    assert report.nearest_output_error is not None
    assert report.output_error <= report.nearest_output_error
    _assert_same_integers(learned, again)
    # the host's conversion is the quantized stream with what was learned, to the last bit
    model = converted(case.host, case.activation_bits, learned)
    with torch.no_grad():
        expected = _flat(run_stream(passes[0].streams[1], [case.data[0]]))
        found = _flat(call(model, case.data[0]))
    assert len(expected) == len(found)
    assert all(torch.equal(one, other) for one, other in zip(expected, found, strict=True))


def _assert_same_integers(one: fx.GraphModule, other: fx.GraphModule) -> None:
    ours, theirs = learned_weights(one), learned_weights(other)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name][0], theirs[name][0]) for name in ours)


def _flat(outputs: Any) -> list[Tensor]:
    if isinstance(outputs, Tensor):
        return [outputs]
    items: Sequence[Any] = list(outputs.values()) if isinstance(outputs, dict) else outputs
    return [tensor for item in items for tensor in _flat(item)]


def main() -> None:
    """Check many cases, and print a table of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--first", type=int, default=0, help="seed of the first")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    start = time.perf_counter()
    kinds: Counter[str] = Counter()
    learned = nearest = taken_back = skipped = 0
    ratios, failed = [], []
    for seed in range(options.first, options.first + options.count):
        case = drawn(seed, ("fx", "pt2e")[seed % 2])
        try:
            check(case)
        except Exception as error:
            failed.append(f"{seed} {case.host} {type(error).__name__}: {str(error).splitlines()[:1]}")
        if case.report is None:
            continue
        kinds += case.network.kinds
        learned += sum(layer.learned for layer in case.report.layers)
        nearest += sum(not layer.learned for layer in case.report.layers)
        taken_back += any("nearest: with it" in layer.note for layer in case.report.layers)
        skipped += len(case.report.skipped)
        if case.report.nearest_output_error:
            ratios.append((case.report.output_error or 0.0) / case.report.nearest_output_error)
    print(f"{options.count} graphs, {len(failed)} failed, in {time.perf_counter() - start:.0f} s")
    print(
        f"layers learned {learned}, nearest {nearest}, skipped {skipped}; networks with layers taken back {taken_back}"
    )
    ratios.sort()
    print(f"output error over that of nearest: median {ratios[len(ratios) // 2]:.3f}, largest {ratios[-1]:.3f}")
    print("steps: " + ", ".join(f"{kind} {count}" for kind, count in sorted(kinds.items())))
    for line in failed:
        print(line)


if __name__ == "__main__":
    main()
