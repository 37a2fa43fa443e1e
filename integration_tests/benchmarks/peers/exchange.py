"""What goes into a peer's process and what comes out: a folder with a job, a network, samples, and weights in the end.

This file and the script of a peer run in the peer's own environment, so they import nothing of ours but the classes of
the networks. A folder holds

- `job.json`: the fields of `Job`,
- `network.pt`: the float network, batch norms folded into the layers before them,
- `samples.pt`: a list of batches to calibrate with,
- `weights.pt`, made by the peer: of each layer its weight as floats on the grid, and its bias,
- `bits.json`, made by a peer that is asked for bits for each layer instead: these by name,
- `result.json`, made by the peer: version, CPU seconds, memory.
"""

from __future__ import annotations

import json
import resource
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

__all__ = ["Job", "Weights", "layers", "memory", "read", "read_bits", "serve", "serve_bits", "weights_of", "write"]

T = TypeVar("T")

Weights = dict[str, tuple[Tensor, Tensor | None]]

# the layer of a language model that all tools leave in float by default
_HEAD = "lm_head"


@dataclass(frozen=True)
class Job:
    """One run of a peer.

    Attributes:
        peer: the tool.
        setting: the name of its options.
        network: what is quantized.
        bits: of the weights.
        samples: how many there are to calibrate with.
        seed: of the global generators, and of the draw of the samples.
        options: of the peer.
        group: columns of a row that share a scale; None for all of the output channel.
    """

    peer: str
    setting: str
    network: str
    bits: int
    samples: int
    seed: int = 1
    options: dict[str, Any] = field(default_factory=dict)
    group: int | None = None


def layers(network: nn.Module) -> Iterator[tuple[str, nn.Conv2d | nn.Linear]]:
    """The layers whose weights are quantized, by name."""
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear) and name != _HEAD:
            yield name, module


def weights_of(network: nn.Module) -> Weights:
    """Copies of the weights and biases of all layers."""
    found: Weights = {}
    for name, module in layers(network):
        bias = None if module.bias is None else module.bias.detach().clone()
        found[name] = module.weight.detach().clone(), bias
    return found


def write(folder: Path, job: Job, network: nn.Module, samples: list[Any]) -> None:
    """Lay out what the peer's process reads."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "job.json").write_text(json.dumps(asdict(job)), encoding="utf-8")
    torch.save(network, folder / "network.pt")
    torch.save(samples, folder / "samples.pt")


def read(folder: Path) -> tuple[Weights, dict[str, Any]]:
    """What the peer's process left: weights, and what it took."""
    made: Weights = torch.load(folder / "weights.pt", weights_only=True)
    result: dict[str, Any] = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    return made, result


def read_bits(folder: Path) -> tuple[dict[str, int], float]:
    """Bits by name of the layer that the peer's process left, and its CPU seconds."""
    bits: dict[str, int] = json.loads((folder / "bits.json").read_text(encoding="utf-8"))
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    return bits, float(result["seconds"])


def _cpu_seconds() -> float:
    """CPU seconds of this process and of those that it has waited for."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def memory(field: str) -> float:
    """MB that are in memory (`VmRSS`), or the most that ever were (`VmHWM`)."""
    # getrusage's peak is that of the process that started this one where that is larger
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    (kilobytes,) = (line.split()[1] for line in lines if line.startswith(f"{field}:"))
    return int(kilobytes) / 1024


def _plain(value: Tensor | None) -> Tensor | None:
    """Without the peer's own class of tensors."""
    return None if value is None else value.detach().as_subclass(Tensor).float().clone()


def serve(
    quantize: Callable[[Job, nn.Module, list[Any]], Weights], distribution: str, *, has_groups: bool = False
) -> None:
    """Do the job of the folder that the command line names: only `quantize` is timed, on one thread.

    Args:
        quantize: takes the job, the network and the samples; returns each layer's weight as floats, and its bias.
        distribution: the package whose version is written down.
        has_groups: whether `quantize` takes groups of columns that share a scale.

    Raises:
        ValueError: the job asks for groups, and there are none.
    """

    def work(job: Job, network: nn.Module, samples: list[Any]) -> Weights:
        if job.group is not None and not has_groups:
            raise ValueError(f"{job.peer} is run here with one scale for each channel")
        return quantize(job, network, samples)

    folder = Path(sys.argv[1])
    made = _timed(folder, work, distribution)
    torch.save({name: (_plain(weight), _plain(bias)) for name, (weight, bias) in made.items()}, folder / "weights.pt")


def serve_bits(allocate: Callable[[Job, nn.Module, list[Any]], dict[str, int]], distribution: str) -> None:
    """The same for a choice of bits for each layer, which `allocate` returns."""
    folder = Path(sys.argv[1])
    bits = _timed(folder, allocate, distribution)
    (folder / "bits.json").write_text(json.dumps(bits), encoding="utf-8")


def _timed(folder: Path, work: Callable[[Job, nn.Module, list[Any]], T], distribution: str) -> T:
    """What the work of the job in a folder gives; what it took is written into the folder."""
    job = Job(**json.loads((folder / "job.json").read_text(encoding="utf-8")))
    network: nn.Module = torch.load(folder / "network.pt", weights_only=False)
    samples: list[Any] = torch.load(folder / "samples.pt", weights_only=True)
    torch.set_num_threads(1)
    torch.manual_seed(job.seed)
    before = memory("VmRSS")
    start = _cpu_seconds()
    made = work(job, network.eval(), samples)
    seconds = _cpu_seconds() - start
    result = {
        "version": version(distribution),
        "torch": torch.__version__,
        "seconds": seconds,
        "memory": memory("VmHWM"),
        "memory_before": before,
    }
    (folder / "result.json").write_text(json.dumps(result), encoding="utf-8")
    return made
