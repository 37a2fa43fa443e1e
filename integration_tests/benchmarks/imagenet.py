"""AdaRound's experiment on ImageNet and Pascal VOC, if you have the data: one network, its table beside the paper's.

Every layer is quantized, first and last included, per tensor as in the paper. Every score is of the model that
`convert_to_reference_fx` made, on the whole validation set unless `--subset` is given. Each result is appended to a
file as it comes; a rerun goes on where the last one stopped.

    python -m integration_tests.benchmarks.imagenet resnet18 --data DIR --results results.jsonl
    python -m integration_tests.benchmarks.imagenet deeplabv3plus --data DIR/VOC2012 --state-dict FILE --results ...
"""

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import Any, Final, Literal

import torch
from torch import Tensor, fx, nn
from torch.ao.quantization.backend_config import BackendConfig
from torch.ao.quantization.quantize_fx import convert_to_reference_fx, prepare_fx
from tqdm import tqdm

from adaround_plugin import (
    METHODS,
    BlockWise,
    Paper,
    adaround,
    get_adaround_qconfig_mapping,
    get_report,
    get_weight_only_backend_config,
)
from adaround_plugin.equalization.equalize import equalize
from adaround_plugin.errors import AdaRoundError
from adaround_plugin.learning.methods import Preset
from integration_tests.benchmarks.imagenet_data import VOC, check_classes, draw, image_folder, loader, mean_iou, top1
from integration_tests.benchmarks.imagenet_models import TOPOLOGIES, load, weights_of
from integration_tests.benchmarks.imagenet_results import FLOAT, Key, Results, table

__all__ = ["COMPARED", "MODES", "Experiment", "main", "run"]

# bits of the weights, and of the activations
MODES: Final[Mapping[str, tuple[int, int | None]]] = {
    "W4A32": (4, None),
    "W4A8": (4, 8),
    "W3A32": (3, None),
    "W2A32": (2, None),
}
# the methods that are measured if none are named
COMPARED: Final = {name: METHODS[name] for name in ("nearest", "paper", "default", "blocks")}
_CALIBRATION_BATCH: Final = 32


@dataclass(frozen=True)
class Experiment:
    """A network, its data, and how it is quantized.

    Args:
        network: name in `TOPOLOGIES`.
        data: folder in ImageNet's layout or, for a network that segments, in Pascal VOC's.
        state_dict: file with weights; torchvision's own without.
        images: calibration images, drawn from the training images by the seed of the run.
        subset: images to score, drawn once for all; None for the whole validation set.
        crop: side of the images instead of the network's own.
        per_channel: a scale for each output channel instead of each weight.
        equalize: equalize the ranges of neighbouring layers first, as the paper does for MobileNetV2: what becomes of
            ReLU6 then, `"replace"` (by ReLU, as in the paper) or `"cap"`. The float score is of the network before.
        iterations: steps of the methods that learn on samples, instead of their own.
        options: plain arguments of `adaround` for every method.
        batch: images at once in scoring.
        workers: processes that read images.
        device: where everything is computed.
    """

    network: str
    data: Path
    state_dict: Path | None = None
    images: int = 1024
    subset: int | None = None
    crop: int | None = None
    per_channel: bool = False
    equalize: Literal["replace", "cap"] | None = None
    iterations: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    batch: int = 64
    workers: int = 4
    device: str = "cpu"

    def settings(self) -> dict[str, Any]:
        """What two results must share to stand in one table."""
        return {
            "weights": weights_of(self.network, self.state_dict),
            "images": self.images,
            "subset": self.subset,
            "crop": self.crop,
            "per_channel": self.per_channel,
            "equalize": self.equalize,
            "iterations": self.iterations,
            "options": json.loads(json.dumps(dict(self.options))),
        }

    def arguments(self, preset: Preset, seed: int) -> dict[str, Any]:
        """The arguments of `adaround` for a method and a seed."""
        if self.iterations is not None and isinstance(preset.method, BlockWise | Paper):
            preset = replace(preset, method=replace(preset.method, iterations=self.iterations))
        return {**self.options, "method": preset, "seed": seed}


class Bench:
    """What an experiment works with: its network, calibration images and score.

    Raises:
        InvalidOptionError: data or weights are missing, or do not fit each other.
    """

    def __init__(self, experiment: Experiment) -> None:
        self.experiment = experiment
        self.topology = TOPOLOGIES[experiment.network]
        self.device = torch.device(experiment.device)
        network, self.classes = load(experiment.network, experiment.state_dict)
        preprocessing = self.topology.preprocessing.scaled(experiment.crop or self.topology.preprocessing.crop)
        read = VOC if self.topology.segments else image_folder
        self.train = read(experiment.data, "train", preprocessing)
        validation = read(experiment.data, "val", preprocessing)
        check_classes(validation, self.classes)
        self.scored = loader(validation, experiment.batch, experiment.workers, experiment.subset)
        self.network = network.to(self.device)
        self.source = self.network
        if experiment.equalize is not None:
            example = torch.zeros(1, 3, preprocessing.crop, preprocessing.crop, device=self.device)
            self.source = equalize(self.network, (example,), relu6=experiment.equalize)

    def score(self, model: nn.Module) -> float:
        """Mean IoU or top-1, in percent."""
        return mean_iou(model, self.scored, self.classes) if self.topology.segments else top1(model, self.scored)

    def calibration(self, seed: int) -> list[Tensor]:
        """Images without labels, on the device."""
        drawn = draw(self.train, self.experiment.images, seed, _CALIBRATION_BATCH, self.experiment.workers)
        return [batch.to(self.device) for batch in drawn]

    def prepare(self, mode: str, batches: list[Tensor]) -> fx.GraphModule:
        """Prepare and calibrate for the bits of the mode."""
        weight_bits, activation_bits = MODES[mode]
        # qnnpack's activation observer has 8 full bits; that of x86 keeps one spare for a kernel that does not run here
        mapping = get_adaround_qconfig_mapping(
            "qnnpack", weight_bits, activation_bits, per_channel=self.experiment.per_channel
        )
        prepared = prepare_fx(self.source, mapping, (batches[0],), backend_config=_backend(mode))
        with torch.no_grad():
            for batch in tqdm(batches, desc="calibration", unit="batch", leave=False):
                prepared(batch)
        return prepared


def _backend(mode: str) -> BackendConfig | None:
    return get_weight_only_backend_config() if MODES[mode][1] is None else None


def run(
    experiment: Experiment,
    results: Results,
    modes: Sequence[str] = tuple(MODES),
    methods: Mapping[str, Preset] = COMPARED,
    seeds: Sequence[int] = (0,),
) -> None:
    """Measure what `results` lacks: the float network, then each mode and method by each seed.

    Raises:
        InvalidOptionError: data, weights or the results file do not fit the experiment.
    """
    settings = experiment.settings()
    results.check(experiment.network, settings)
    exact: Key = (experiment.network, *FLOAT, 0)
    planned = [(experiment.network, mode, method, seed) for seed in seeds for mode in modes for method in methods]
    missing = [key for key in (exact, *planned) if key not in results.lines]
    if not missing:
        return
    bench = Bench(experiment)
    if exact in missing:
        results.append(exact, score=bench.score(bench.network), seconds=0.0, recipe="", settings=settings)
        missing.remove(exact)
    for seed, of_seed in groupby(missing, key=lambda key: key[3]):
        batches = bench.calibration(seed)
        for mode, keys in groupby(of_seed, key=lambda key: key[1]):
            prepared = bench.prepare(mode, batches)
            for key in keys:
                start = time.perf_counter()
                learned = adaround(prepared, batches, **experiment.arguments(methods[key[2]], seed))
                seconds = time.perf_counter() - start
                model = convert_to_reference_fx(learned, backend_config=_backend(mode))
                recipe = get_report(learned).recipe
                results.append(key, score=bench.score(model), seconds=seconds, recipe=recipe, settings=settings)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run and print a Markdown table of the results file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network", choices=list(TOPOLOGIES))
    parser.add_argument("--data", type=Path, required=True, help="folder in ImageNet's layout, or in Pascal VOC's")
    parser.add_argument("--results", type=Path, required=True, help="file of JSON lines to append to")
    parser.add_argument("--state-dict", type=Path, help="file with weights, instead of torchvision's")
    parser.add_argument("--modes", nargs="+", choices=list(MODES), default=list(MODES))
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(COMPARED))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="each draws its calibration images")
    parser.add_argument("--images", type=int, default=1024, help="calibration images, from the training images")
    parser.add_argument("--subset", type=int, help="score so many validation images, drawn at random, instead of all")
    parser.add_argument("--crop", type=int, help="side of the images, instead of the network's own")
    parser.add_argument("--per-channel", action="store_true", help="a scale for each output channel")
    parser.add_argument("--equalize", choices=["replace", "cap"], help="equalize across layers first; then of ReLU6")
    parser.add_argument("--iterations", type=int, help="steps of methods that learn on samples, instead of their own")
    parser.add_argument("--batch", type=int, default=64, help="images at once in scoring")
    parser.add_argument("--workers", type=int, default=4, help="processes that read images")
    parser.add_argument("--device", default="cpu")
    given = vars(parser.parse_args(arguments))
    chosen = {name: given.pop(name) for name in ("results", "modes", "methods", "seeds")}
    try:
        results = Results(chosen["results"])
        run(Experiment(**given), results, chosen["modes"], {n: METHODS[n] for n in chosen["methods"]}, chosen["seeds"])
    except AdaRoundError as error:
        parser.error(str(error))
    print(table(results.lines.values()))


if __name__ == "__main__":
    main()
