"""Digests of what learned models hold, to show that a change of the code changes no integer, and by how much losses.

Models are learned on fixed data by fixed seeds: the demo's and the three glyph networks at 4, 3 and 2 bits by the
default method, and a few images by the other methods and hosts. A digest is taken of every tensor of the model that
the host converted, and of the numbers in its graph. The loss of a layer is the error of its output on held-out samples;
where the code before wrote no losses, run this module there. Float sums depend on the processor and on the version of
torch: run both sides on one machine.

    python -m integration_tests.benchmarks.integers before.json
    python -m integration_tests.benchmarks.integers after.json --against before.json
    python -m integration_tests.benchmarks.integers after.json --against before.json --default-only
    python -m integration_tests.benchmarks.integers some.json --against before.json --cases demo "vit W2"
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import cache, partial
from pathlib import Path
from statistics import geometric_mean
from typing import Any, Final

import torch
from torch import Tensor, fx, nn
from torch.ao.quantization.quantize_fx import convert_to_reference_fx, prepare_fx
from torch.fx.node import map_aggregate

from adaround_plugin import BlockWise, Finetune, LayerWise, Paper, adaround, demo, get_report
from adaround_plugin.hosts.fx.qconfig import get_adaround_qconfig_mapping
from adaround_plugin.learning.methods import Method
from adaround_plugin.report import Report
from integration_tests.benchmarks import glyphs, networks
from integration_tests.benchmarks.accuracy import Case

__all__ = ["CASES", "differing", "digests", "main"]

# the converted model, and the report on it
Learned = tuple[fx.GraphModule, Report]

_NETWORKS: Final = ("resnet20", "mobilenet", "vit")
_BITS: Final = (4, 3, 2)
# calibration images
_MANY, _FEW = 1024, 256


def digests(model: nn.Module) -> dict[str, str]:
    """SHA-256 of every tensor of the state dict by its name, and of the numbers that the graph's nodes are given."""
    found = {name: _digest(value) for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    if isinstance(model, fx.GraphModule):
        found["(numbers of the graph)"] = hashlib.sha256(repr(_numbers(model.graph)).encode()).hexdigest()
    return found


def _digest(value: Tensor) -> str:
    # an integer is told from the float of the same bytes, and a row from a column
    found = hashlib.sha256(f"{value.dtype} {tuple(value.shape)}".encode())
    found.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def _numbers(graph: fx.Graph) -> list[float]:
    """Literals in order, such as the scales of activations in a program of PT2E."""
    numbers: list[float] = []

    def keep(value: Any) -> Any:
        if isinstance(value, int | float):
            numbers.append(value)
        return value

    for node in graph.nodes:
        map_aggregate((node.args, node.kwargs), keep)
    return numbers


def differing(ours: Mapping[str, str], theirs: Mapping[str, str]) -> list[str]:
    """Names whose digests are not the same on both sides, or are on one side only."""
    return sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))


@cache
def _digits() -> tuple[nn.Module, list[Tensor]]:
    """The demo's network, trained, and its calibration batches."""
    data = demo.load()
    return demo.train(demo.network(), data), list(torch.split(data.images[:512], 64))


def _demo(bits: int) -> Learned:
    network, batches = _digits()
    prepared = prepare_fx(network, get_adaround_qconfig_mapping("x86", weight_bits=bits), (batches[0],))
    for batch in batches:
        prepared(batch)
    learned = adaround(prepared, batches, progress=False)
    return convert_to_reference_fx(learned), get_report(learned)


@cache
def _glyphs() -> Tensor:
    return glyphs.load("train", _MANY, seed=1)[0]


def _network(
    name: str,
    bits: int,
    activation_bits: int | None = None,
    *,
    affine: bool = False,
    host: str = "fx",
    images: int = _FEW,
    method: str | Method = "default",
    finetune: Finetune | None = None,
) -> Learned:
    case = Case(networks.load(name), bits, activation_bits, affine, host)
    batches = list(torch.split(_glyphs()[:images], 64))
    learned = adaround(case.prepare(batches), batches, method, finetune=finetune, progress=False)
    return case.convert(learned), get_report(learned)


def _cases() -> Iterator[tuple[str, Callable[[], Learned]]]:
    for bits in _BITS:
        yield f"demo W{bits}A8", partial(_demo, bits)
    for name in _NETWORKS:
        for bits in _BITS:
            yield f"{name} W{bits}", partial(_network, name, bits, images=_MANY)
        yield f"{name} W2 affine", partial(_network, name, 2, affine=True, images=_MANY)
    blocks, paper, fisher = BlockWise(iterations=60), Paper(iterations=60), LayerWise(column_weighting="fisher")
    integers = Finetune(iterations=100, integers=True)
    for name in _NETWORKS:
        two, four = partial(_network, name, 2, affine=True), partial(_network, name, 4, 4, host="pt2e")
        yield f"{name} W3A8, PT2E", partial(_network, name, 3, 8, host="pt2e")
        yield f"{name} W2 affine, fisher", partial(two, method=fisher)
        yield f"{name} W2 affine, blocks", partial(two, method=blocks)
        yield f"{name} W2 affine, integers finetuned", partial(two, finetune=integers)
        yield f"{name} W4A4, PT2E, finetuned", partial(four, finetune=Finetune(iterations=30))
        yield f"{name} W4A8, paper", partial(_network, name, 4, 8, method=paper)


CASES: dict[str, Callable[[], Learned]] = dict(_cases())


def _versions() -> dict[str, str]:
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "processor": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
    }


def _entry(learned: Learned) -> dict[str, Any]:
    """What is written of a case."""
    model, report = learned
    losses = {
        layer.name: layer.learned_error if layer.learned_holdout is None else layer.learned_holdout
        for layer in report.layers
    }
    return {
        "digests": digests(model),
        "losses": losses,
        "output_error": report.output_error,
        "recipe": report.recipe,
        "trials": {trial.recipe: trial.output_error for trial in report.trials},
    }


def _ratios(ours: Mapping[str, float], theirs: Mapping[str, float]) -> str:
    """How the losses of layers compare; of layers that lose anything on both sides."""
    ratios = [ours[name] / theirs[name] for name in ours.keys() & theirs.keys() if min(ours[name], theirs[name]) > 0]
    if not ratios:
        return "losses of layers unknown"
    return f"losses of {len(ratios)} layers times {geometric_mean(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"


def _compared(ours: Mapping[str, Any], theirs: Mapping[str, Any] | None) -> tuple[bool, str]:
    """Whether a case is the same bit for bit on both sides, and what is to be said of it."""
    if theirs is None:
        return False, "not in the other file"
    names = differing(ours["digests"], theirs["digests"])
    if names:
        told = [
            f"output error {theirs['output_error']:.3g}, now {ours['output_error']:.3g}",
            _ratios(ours["losses"], theirs.get("losses", {})),
        ]
        return False, f"{'; '.join(told)}; {len(names)} of {len(ours['digests'])} tensors differ: {', '.join(names)}"
    # a report may be worded, or its sums ordered, in another way
    told = [key for key in ("output_error", "recipe", "trials") if ours[key] != theirs[key]]
    return True, "the same" + (f", but for the report's {', '.join(told)}" if told else "")


def main(arguments: list[str] | None = None) -> int:
    """Learn, write, and compare; 1 if anything is not the same."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="file of JSON to write")
    parser.add_argument("--against", type=Path, help="file that this command wrote before")
    parser.add_argument("--cases", nargs="+", metavar="START", help=f"only cases that begin so: {'; '.join(CASES)}")
    parser.add_argument("--default-only", action="store_true", help="only cases of the default method, on many images")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    chosen = [name for name in CASES if options.cases is None or name.startswith(tuple(options.cases))]
    if options.default_only:
        chosen = [name for name in chosen if "," not in name]
    if not chosen:
        parser.error(f"no case begins with one of {options.cases}")
    other = None if options.against is None else json.loads(options.against.read_text(encoding="utf-8"))
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    written: dict[str, Any] = {"versions": {**_versions(), "threads": str(options.threads)}, "cases": {}}
    if other is not None and other["versions"] != written["versions"]:
        print(f"made under {other['versions']}, now {written['versions']}: float sums may differ")
    same = True
    for name in chosen:
        start = time.perf_counter()
        entry = written["cases"][name] = _entry(CASES[name]())
        # what is done is kept if the rest is interrupted
        options.out.write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")
        text = f"output error {entry['output_error']:.6g}"
        if other is not None:
            is_same, text = _compared(entry, other["cases"].get(name))
            same = same and is_same
        print(f"{name}: {text} ({time.perf_counter() - start:.0f} s)", flush=True)
    return 0 if same else 1


if __name__ == "__main__":
    raise SystemExit(main())
