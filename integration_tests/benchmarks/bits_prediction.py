"""How well `analyze` predicts: expected losses beside those measured with one layer quantized alone, and with all.

Of each width the rank correlation over layers (Spearman), the geometric mean of predicted over measured and the factor
by which that scatters (its geometric standard deviation), and the sum of the losses of all layers beside the measured
loss of all layers together. Measured on other samples, with the roundings that were analysed; nothing is propagated.
Beside it the same of `tr(G E H E^T)`, with the second moments of the derivatives and of the inputs (Kronecker).

    python -m integration_tests.benchmarks.bits_prediction resnet20 mobilenet vit
    python -m integration_tests.benchmarks.bits_prediction minilm --samples 160
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

from adaround_plugin import analyze
from adaround_plugin.graph.ends import ends_of
from adaround_plugin.graph.streams import Stream, tensors
from adaround_plugin.guidance.candidates import candidates
from adaround_plugin.guidance.moments import InputMoments, weights_of_columns
from adaround_plugin.hosts.base import Host, WeightedNode, open_streams
from adaround_plugin.hosts.open import open_host
from adaround_plugin.learning.layerwise import LayerWise
from adaround_plugin.learning.output_error import OutputTally
from adaround_plugin.regions.binding import bind_batches
from adaround_plugin.regions.calibration import Sampling
from adaround_plugin.regions.derivatives import differentiate
from adaround_plugin.rounding.moments import Moments
from adaround_plugin.rounding.result import LayerRounding
from integration_tests.benchmarks import glyphs, networks
from integration_tests.benchmarks.accuracy import Case

BITS = (2, 3, 4, 6, 8)


class Measured:
    """The float network with some layers' weights replaced.

    Args:
        host: of a prepared model.
        data: batches.
    """

    def __init__(self, host: Host, data: Sequence[Any]) -> None:
        self._stream, _ = open_streams(host)
        self._batches = bind_batches(host.prepared, host.signature, host.flatten, data, None)
        self._sampling = Sampling.of(self._batches, 0, 1, 0)
        with torch.no_grad():
            self._exact = [self._outputs(batch, {}) for batch in self._batches]

    def error(self, roundings: Mapping[WeightedNode, LayerRounding]) -> float:
        """The error of the network's output over its variance."""
        sites = {site.float_node: (site.call, one) for node, one in roundings.items() for site in node.sites}
        tally = OutputTally(self._sampling)
        with torch.no_grad():
            for number, batch in enumerate(self._batches):
                tally.add(number, self._exact[number], self._outputs(batch, sites))
        return tally.finish().mean

    def _outputs(self, batch: list[Any], sites: Mapping[fx.Node, tuple[Any, LayerRounding]]) -> list[Tensor]:
        stream: Stream = self._stream
        values = stream.bind(batch)
        for node in stream.runnable(set()):
            if node not in sites:
                stream.run_nodes(values, [node])
                continue
            call, rounding = sites[node]
            args, kwargs = map_arg(call.arguments(node), lambda one: stream.value(one, values))
            values[node] = call.whole(args, kwargs, rounding.weight, rounding.bias_correction)
        return tensors([stream.value(end, values) for end in ends_of(stream)])


@dataclass(frozen=True)
class Prediction:
    """Losses by layer, `(layers,)` each, at one width of one kind of rounding; and of all layers together."""

    bits: int
    kind: str
    predicted: Tensor
    kronecker: Tensor
    measured: Tensor
    together: float

    def cells(self) -> list[str]:
        """The row of the table."""
        return [
            *(str(self.bits), self.kind, *self._quality(self.predicted)),
            *(f"{float(self.predicted.sum()):.3g}", f"{float(self.measured.sum()):.3g}", f"{self.together:.3g}"),
            *self._quality(self.kronecker),
        ]

    def _quality(self, predicted: Tensor) -> list[str]:
        ratio = (predicted / self.measured).log()
        rank = correlation(predicted, self.measured)
        return [f"{rank:.3f}", f"{float(ratio.mean().exp()):.2f}", f"{float(ratio.std().exp()):.2f}"]


def correlation(one: Tensor, other: Tensor) -> float:
    """Spearman's: of the ranks."""
    first, second = (values.argsort().argsort().double() for values in (one, other))
    return float(torch.corrcoef(torch.stack([first, second]))[0, 1])


@dataclass(frozen=True)
class Known:
    """What `analyze` looks at in a layer: by width nearest and learned roundings, and the moments of its input."""

    roundings: dict[int, tuple[LayerRounding, LayerRounding]]
    moments: Moments


def known(host: Host, data: Sequence[Any]) -> dict[str, Known]:
    """What `analyze` looks at, by layer."""
    stream, _ = open_streams(host)
    arguments = bind_batches(host.prepared, host.signature, host.flatten, data, None)
    sampling = Sampling.of(arguments, 0, LayerWise().max_columns, 0)

    def of_layer(node: WeightedNode, moments: Moments, damping: float) -> Known:
        found = candidates(node, moments, BITS, "observed", damping, weights.outputs.get(node.name))
        return Known({one.bits: (one.nearest, one.learned) for one in found}, moments)

    with torch.no_grad():
        weights = weights_of_columns(host, stream, host.nodes, arguments, sampling)
        moments = InputMoments(stream, arguments, sampling, weights)
        return {node.name: of_layer(node, of_node, damping) for node, of_node, damping in moments.of(host.nodes)}


def derivatives(host: Host, data: Sequence[Any]) -> dict[str, Tensor]:
    """By layer `G`, `(G, R, R)`: products of the derivatives of the relative error by a column's outputs, summed over
    the columns of a sample."""
    stream, _ = open_streams(host)
    arguments = bind_batches(host.prepared, host.signature, host.flatten, data, None)
    sampling = Sampling.of(arguments, 0, 1, 0)
    total: dict[str, Tensor] = {}

    def watch(site: fx.Node, node: WeightedNode, x: Tensor) -> Callable[[Tensor], None]:
        patches = node.op.patches(x.float(), node.weight.shape)
        index = torch.arange(patches.samples).repeat_interleave(patches.positions)
        position = torch.arange(patches.positions).repeat(patches.samples)

        def take(gradient: Tensor) -> None:
            columns = node.op.outputs_at(gradient, node.weight.shape, index, position).double()
            total[node.name] = total.get(node.name, 0.0) + columns.transpose(1, 2) @ columns

        return take

    with torch.no_grad():
        tally = OutputTally(sampling)
        for number, batch in enumerate(arguments):
            ends = tensors(stream.outputs(batch, ends_of(stream)))
            tally.add(number, ends, ends)
    variances = tally.finish().variances
    for number, batch in enumerate(arguments):
        differentiate(stream, host.nodes, stream.bind(batch), sampling.numbers(number), watch, variances)
    return {name: product / sampling.total for name, product in total.items()}


def kronecker(node: WeightedNode, rounding: LayerRounding, moments: Moments, sides: Tensor) -> float:
    """`tr(G E H E^T)`; `H` about the mean where the bias takes that up."""
    change = node.op.rows(rounding.weight.double() - node.weight.double())
    second = moments.terms(centred=rounding.bias_correction is not None)[0]
    return float(((sides @ change @ second) * change).sum())


def predictions(prepared: fx.GraphModule, data: Sequence[Any], others: Sequence[Any]) -> list[Prediction]:
    """Losses predicted from `data` beside losses measured on `others`."""
    analysis = analyze(prepared, data, bits=BITS, progress=False)
    host = open_host(prepared)
    of_layer, sides, measured = known(host, data), derivatives(host, data), Measured(host, others)
    layers = {layer.name: layer for layer in analysis.layers}
    nodes = [node for node in host.nodes if node.name in layers]
    found = []
    for bits in BITS:
        for number, kind in enumerate(("nearest", "learned")):
            of_kind = {node: of_layer[node.name].roundings[bits][number] for node in nodes}
            widths = [layers[node.name].at(bits) for node in nodes]
            expected = [one.nearest_loss if kind == "nearest" else one.learned_loss for one in widths]
            products = [
                kronecker(node, one, of_layer[node.name].moments, sides[node.name]) for node, one in of_kind.items()
            ]
            alone = [measured.error({node: one}) for node, one in of_kind.items()]
            first, second, third = (torch.tensor(every, dtype=torch.float64) for every in (expected, products, alone))
            found.append(Prediction(bits, kind, first, second, third, measured.error(of_kind)))
    return found


def glyph_network(name: str, samples: int) -> tuple[fx.GraphModule, list[Tensor], list[Tensor]]:
    """A prepared network, weights alone, with images to analyse and others to measure on."""
    images, _ = glyphs.load("train", samples, seed=1)
    others, _ = glyphs.load("train", 512, seed=7)
    batches = list(torch.split(images, 64))
    return Case(networks.load(name), 4, None).prepare(batches), batches, list(torch.split(others, 128))


def sentence_encoder(samples: int) -> tuple[fx.GraphModule, list[Any], list[Any]]:
    """all-MiniLM-L6-v2 through PT2E, weights alone, with sentences."""
    from torchao.quantization.pt2e.quantize_pt2e import prepare_pt2e
    from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import X86InductorQuantizer

    from adaround_plugin.hosts.pt2e import get_adaround_x86_inductor_config
    from integration_tests.benchmarks import minilm

    encoder, tokenizer = minilm.load()
    texts = minilm.sentences()
    batches, others = minilm.tokenized(tokenizer, texts[:samples]), minilm.tokenized(tokenizer, texts[-24:])
    quantizer = X86InductorQuantizer().set_global(get_adaround_x86_inductor_config(4, activation_bits=None))
    prepared: fx.GraphModule = prepare_pt2e(minilm.export(encoder, batches[0]), quantizer)
    with torch.no_grad():
        prepared(**batches[0])
    return prepared, batches, others


MODELS: dict[str, Callable[[int], tuple[fx.GraphModule, Sequence[Any], Sequence[Any]]]] = {
    "resnet20": lambda samples: glyph_network("resnet20", samples),
    "mobilenet": lambda samples: glyph_network("mobilenet", samples),
    "vit": lambda samples: glyph_network("vit", samples),
    "minilm": sentence_encoder,
}


def main() -> None:
    """Run and print Markdown tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="+", choices=list(MODELS))
    parser.add_argument("--samples", type=int, default=1024, help="to analyse with")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for name in options.models:
        prepared, data, others = MODELS[name](options.samples)
        print(f"\n{name}, {options.samples} samples\n")
        head = ["bits", "rounding", "rank correlation", "predicted / measured", "scatter", "sum predicted"]
        head += ["sum measured alone", "measured together", "Kronecker: rank", "ratio", "scatter"]
        print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}", flush=True)
        for one in predictions(prepared, data, others):
            print(f"| {' | '.join(one.cells())} |", flush=True)


if __name__ == "__main__":
    main()
