"""Top-1 of the glyph networks at few bits: nearest, coordinate descent and annealing, by number of images.

Every figure is of the model the host converted: `convert_to_reference_fx` with float activations (weight-only), and
with 8-bit activations of the x86 backend (W/A8). All layers are quantized, first and last included, per channel.

    python -m integration_tests.benchmarks.accuracy resnet20 mobilenet vit

`--activation-bits 4` gives W/A4 instead. FX quantizes every value between layers; the logits, which enter no layer,
keep 8 bits then. `--host pt2e` takes `convert_pt2e` for X86InductorQuantizer, which quantizes the inputs of layers.
`--ends 8` keeps the first and the last layer at 8 bits (with PT2E their inputs too), as the papers on BRECQ and QDrop
do in all their tables. `--equalize` scales channels first. `--mixed 3` adds three mixed images for each to calibrate
with, `--blocks features` learns everything in `features` as one block (with the method "blocks").
"""

import argparse
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import mean
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.ao.quantization.quantize_fx import convert_to_reference_fx, prepare_fx
from torch.export import Dim
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import X86InductorQuantizer

from adaround_plugin import (
    METHODS,
    BlockWise,
    Finetune,
    LayerWise,
    adaround,
    equalize,
    get_adaround_qconfig_mapping,
    get_report,
    get_weight_only_backend_config,
)
from adaround_plugin.hosts.pt2e import get_adaround_x86_inductor_config
from adaround_plugin.learning.methods import Preset
from integration_tests.benchmarks import glyphs, networks

TEST_IMAGES = 10_000
# no choice in the making of the method has seen the images of this seed
TEST_SEED = 1
IMAGES = (1024, 256, 64)
# images that run at once: values of more leave the processor's caches, and take several times as long
_AT_ONCE = 100
# options of layers that the command line has
_LAYERS = ("max_columns", "column_weighting", "damping", "output_hessian")


def accuracy(network: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor, at_once: int = _AT_ONCE) -> float:
    """Top-1 in percent."""
    batches = zip(torch.split(images, at_once), torch.split(labels, at_once), strict=True)
    with torch.no_grad():
        right = sum(int((network(x).argmax(1) == y).sum()) for x, y in batches)
    return 100 * right / len(labels)


def divergence(network: nn.Module, other: nn.Module, images: Tensor) -> float:
    """Mean Kullback-Leibler divergence of another network's predictions from a network's, in nats."""
    total = 0.0
    with torch.no_grad():
        for x in torch.split(images, _AT_ONCE):
            ours, theirs = (model(x).log_softmax(1) for model in (network, other))
            total += float(F.kl_div(theirs, ours, log_target=True, reduction="sum"))
    return total / len(images)


def mixed(images: Tensor, times: int, seed: int = 0) -> Tensor:
    """The images `(n, ...)` and, `times` for each, convex combinations of two, shuffled: `((1 + times) n, ...)`.

    The shares are uniform, as in mixup (Zhang et al. 2018, arXiv 1710.09412) of weight 1, here without labels.
    """
    generator = torch.Generator().manual_seed(seed)
    parts = [images]
    for _ in range(times):
        one, other = (images[torch.randperm(len(images), generator=generator)] for _ in range(2))
        parts.append(torch.lerp(one, other, torch.rand((len(images), 1, 1, 1), generator=generator)))
    every = torch.cat(parts)
    return every[torch.randperm(len(every), generator=generator)] if times else images


@dataclass(frozen=True)
class Case:
    """A network, and how it is quantized.

    Attributes:
        bits: of the weights.
        activation_bits: None for weights alone.
        affine: whether weights have a zero point.
        host: `"fx"` or `"pt2e"`.
        ends: bits of the first and the last layer, None for the same as everywhere.
        equalized: `"weights"` or `"activations"`, whose ranges are made equal first.
        layers: bits of single layers' weights, by name, with FX alone.
    """

    network: nn.Module
    bits: int
    activation_bits: int | None = 8
    affine: bool = False
    host: str = "fx"
    ends: int | None = None
    equalized: str | None = None
    layers: Mapping[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        activations = "" if self.activation_bits is None else f"A{self.activation_bits}"
        ends = "" if self.ends is None else f", ends W{self.ends}"
        return f"W{self.bits}{activations}" + (" affine" if self.affine else "") + ends

    def _ends(self) -> dict[str, int]:
        """Bits of the layers that differ."""
        kinds = (nn.Linear, nn.Conv2d)
        names = [name for name, module in self.network.named_modules() if isinstance(module, kinds)]
        return {} if self.ends is None else dict.fromkeys((names[0], names[-1]), self.ends)

    def prepare(self, batches: list[Tensor]) -> fx.GraphModule:
        """Prepare and calibrate."""
        network = self.network
        if self.equalized is not None:
            activations = batches if self.equalized == "activations" else None
            network = equalize(network, (batches[0],), activations=activations)
        prepare = self._prepare_fx if self.host == "fx" else self._prepare_pt2e
        prepared = prepare(network, batches[0])
        with torch.no_grad():
            for batch in batches:
                prepared(batch)
        return prepared

    def _prepare_fx(self, network: nn.Module, example: Tensor) -> fx.GraphModule:
        backend = get_weight_only_backend_config() if self.activation_bits is None else None
        last = [name for name, module in network.named_modules() if isinstance(module, nn.Linear)][-1]
        logits = {} if self.activation_bits in (8, None) else {last: (self.bits, 8)}
        ends = {name: bits if self.activation_bits is None else (bits, 8) for name, bits in self._ends().items()}
        mapping = get_adaround_qconfig_mapping(
            "x86",
            weight_bits=self.bits,
            activation_bits=self.activation_bits,
            symmetric=not self.affine,
            layer_bits={**logits, **ends, **self.layers},
        )
        return prepare_fx(network, mapping, (example,), backend_config=backend)

    def _prepare_pt2e(self, network: nn.Module, example: Tensor) -> fx.GraphModule:
        config = get_adaround_x86_inductor_config(self.bits, self.activation_bits)
        program = torch.export.export(network, (example,), dynamic_shapes=({0: Dim.AUTO},), strict=True)
        quantizer = X86InductorQuantizer().set_global(config)
        for name, bits in self._ends().items():
            activation_bits = None if self.activation_bits is None else 8
            quantizer.set_module_name_qconfig(name, get_adaround_x86_inductor_config(bits, activation_bits))
        prepared: fx.GraphModule = prepare_pt2e(program.module(), quantizer)
        return prepared

    def convert(self, learned: fx.GraphModule) -> fx.GraphModule:
        """The host's converted model."""
        if self.host == "pt2e":
            program: fx.GraphModule = convert_pt2e(learned)
            return program
        backend = get_weight_only_backend_config() if self.activation_bits is None else None
        return convert_to_reference_fx(learned, backend_config=backend)


def preset_of(name: str, layers: Mapping[str, Any] | None = None, blocks: Sequence[str] | None = None) -> Preset:
    """The method of a name, which may be that of a solver, and what is finetuned after it.

    Args:
        layers: options of `LayerWise` to be set.
        blocks: modules to take as blocks.
    """
    preset = METHODS[name] if name in METHODS else Preset(LayerWise(solver=name))
    method = preset.method
    if isinstance(method, BlockWise) and blocks:
        method = replace(method, blocks=blocks)
    return replace(preset, method=method.with_layers(replace(method.layers, **layers)) if layers else method)


def rows(
    case: Case,
    exact: list[float],
    methods: dict[str, Preset],
    counts: list[int],
    finetune: Finetune | None,
    tests: list[tuple[Tensor, Tensor]],
    mixes: int = 0,
) -> Iterator[list[str]]:
    """Table rows: mode, method, images, top-1, loss against float, divergence, CPU seconds of `adaround`, recipe.

    With several sets of test images, figures are means, and loss and divergence on each set follow.
    """
    calibration, _ = glyphs.load("train", IMAGES[0], seed=1)
    for name, preset in methods.items():
        for count in counts if name == "default" else counts[:1]:
            batches = list(torch.split(mixed(calibration[:count], mixes), 64))
            prepared = case.prepare(batches)
            start = time.process_time()
            learned = adaround(prepared, batches, preset, finetune=finetune, progress=False)
            seconds = time.process_time() - start
            recipe = get_report(learned).recipe
            converted = case.convert(learned)
            scores = [accuracy(converted, *test) for test in tests]
            losses = [before - after for before, after in zip(exact, scores, strict=True)]
            apart = [divergence(case.network, converted, images) for images, _ in tests]
            figures = [f"{mean(scores):.2f}", _with_each(losses, 2), _with_each(apart, 4), f"{seconds:.0f}"]
            yield [str(case), name, str(count), *figures, recipe]


def _with_each(values: list[float], digits: int) -> str:
    """The mean, and the values behind it if there are several."""
    each = f" ({', '.join(f'{value:.{digits}f}' for value in values)})" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{each}"


def add_common_options(parser: argparse.ArgumentParser) -> None:
    """Options that benchmarks of accuracy have in common: the grid, options of layers, and threads."""
    parser.add_argument("--affine", action="store_true", help="affine weights, zero point searched with the scale")
    parser.add_argument("--max-columns", type=int)
    parser.add_argument("--column-weighting")
    parser.add_argument("--damping", type=float, help="ridge on the hessian, relative to its mean diagonal")
    parser.add_argument("--output-hessian", action=argparse.BooleanOptionalAction, help="rows make up for each other")
    parser.add_argument("--threads", type=int, default=1)


def layers_of(options: argparse.Namespace) -> dict[str, Any]:
    """The options of layers that were given."""
    given = {name: getattr(options, name) for name in _LAYERS}
    return {name: value for name, value in given.items() if value is not None}


def main() -> None:
    """Run and print Markdown tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("networks", nargs="+", choices=["resnet20", "mobilenet", "vit"])
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    parser.add_argument(
        "--methods", nargs="+", default=["nearest", "coordinate_descent", "default"], help="methods and solvers"
    )
    parser.add_argument(
        "--modes", nargs="+", choices=["weight-only", "activations"], default=["weight-only", "activations"]
    )
    parser.add_argument("--activation-bits", type=int, default=8, help="of the mode with activations")
    parser.add_argument("--host", choices=["fx", "pt2e"], default="fx")
    parser.add_argument("--ends", type=int, help="bits of the first and the last layer")
    parser.add_argument("--images", type=int, nargs="+", default=IMAGES, help="calibration images, at most 1024")
    parser.add_argument("--test-images", type=int, default=TEST_IMAGES, help="the first ones of each seed")
    parser.add_argument("--test-seeds", type=int, nargs="+", default=[TEST_SEED], help="10,000 images of each")
    parser.add_argument(
        "--finetune", type=int, nargs="?", const=300, help="steps in which scales and biases are learned in the end"
    )
    parser.add_argument("--finetune-integers", action="store_true", help="learn integers too in these steps")
    parser.add_argument("--equalize", choices=["weights", "activations"], help="what gets equal ranges before")
    parser.add_argument("--mixed", type=int, default=0, help="mixed images for each of the calibration images")
    parser.add_argument("--blocks", nargs="+", help="modules to take as blocks")
    add_common_options(parser)
    options = parser.parse_args()
    if options.finetune_integers and options.finetune is None:
        parser.error("--finetune-integers needs --finetune")
    torch.set_num_threads(options.threads)
    drawn = [glyphs.load("test", TEST_IMAGES, seed=seed) for seed in options.test_seeds]
    tests = [(images[: options.test_images], labels[: options.test_images]) for images, labels in drawn]
    layers = layers_of(options)
    methods = {name: preset_of(name, layers, options.blocks) for name in options.methods}
    finetune = None
    if options.finetune is not None:
        finetune = Finetune(iterations=options.finetune, integers=options.finetune_integers)
    for name in options.networks:
        network = networks.load(name)
        exact = [accuracy(network, *test) for test in tests]
        print(f"\n{name}: float {mean(exact):.2f} on {sum(len(test[0]) for test in tests)} test images\n")
        head = ["weights", "method", "images", "top-1 %", "loss", "divergence", "CPU s", "recipe"]
        print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}", flush=True)
        for mode in options.modes:
            activations = None if mode == "weight-only" else options.activation_bits
            for bits in options.bits:
                case = Case(network, bits, activations, options.affine, options.host, options.ends, options.equalize)
                for row in rows(case, exact, methods, options.images, finetune, tests, options.mixed):
                    print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
