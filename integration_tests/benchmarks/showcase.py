"""The showcase: a pretrained text recognizer with weights of 4 bits, in the files that devices run.

PP-OCRv4's recognizer (see `recognizer`) goes through PT2E with XNNPACK's quantizer: weights of 4 bits, activations of
8, every layer. The nearest and the learned model are written as a `.pte` file, with which ExecuTorch's runtime reads
lines of text, and as an ONNX file with packed weights, with which ONNX Runtime reads them. The picture shows a few
lines, and what the float network and the two `.pte` files read there.

    pip install -e '.[test]'
    pip install --no-deps rapidocr-onnxruntime==1.4.4
    python -m integration_tests.benchmarks.showcase --out showcase
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, fx, nn
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

from adaround_plugin import adaround
from adaround_plugin.deployment import widen_weight_ranges
from adaround_plugin.hosts.pt2e import AdaRoundQuantizer
from integration_tests.benchmarks.executorch_backends import lowered
from integration_tests.benchmarks.quiet import quiet
from integration_tests.benchmarks.recognizer import BATCH, LINES, alphabet, characters_right, decode, lines, load
from integration_tests.benchmarks.vendor_quantizers import VENDORS

__all__ = ["Reader", "draw", "onnx_reader", "pte_reader", "to_onnx"]

# what reads one line: (1, 3, 48, 320) to shares (1, 40, classes)
Reader = Callable[[Tensor], Tensor]

_SHOWN = 5
_RIGHT, _WRONG = "#1a7f37", "#cf222e"


def pte_reader(file: Path) -> Reader:
    """A `.pte` file in ExecuTorch's runtime."""
    from executorch.runtime import Runtime

    method = Runtime.get().load_program(file).load_method("forward")
    # the next call writes over the tensors of this one
    return lambda line: method.execute([line.contiguous()])[0].clone()


def to_onnx(converted: nn.Module, example: Tensor) -> bytes:
    """A converted program as an ONNX file that stores weights of up to 4 bits in 4."""
    from adaround_plugin.deployment.onnx_weights import pack_onnx_weights

    program = torch.export.export(converted, (example,), strict=True)
    exported = torch.onnx.export(program, dynamo=True, verbose=False, opset_version=21)
    assert exported is not None
    packed: bytes = pack_onnx_weights(exported.model_proto).SerializeToString()
    return packed


def onnx_reader(file: Path) -> Reader:
    """An ONNX file in ONNX Runtime."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # it moves int8 activations over reshapes as uint8 (github.com/microsoft/onnxruntime/issues/25526)
    session = onnxruntime.InferenceSession(file, options, disabled_optimizers=["QDQPropagationTransformer"])
    (entry,) = session.get_inputs()
    return lambda line: torch.from_numpy(session.run(None, {entry.name: line.numpy()})[0])


def _prepared(network: nn.Module, batches: Sequence[Tensor]) -> fx.GraphModule:
    """Calibrated for XNNPACK with weights of 4 bits; the number of lines at once is free."""
    shapes = ({0: torch.export.Dim("lines", min=1, max=2 * BATCH)},)
    program = torch.export.export(network, (batches[0],), dynamic_shapes=shapes, strict=True).module()
    prepared: fx.GraphModule = prepare_pt2e(program, AdaRoundQuantizer(VENDORS["XNNPACK"](), weight_bits=4))
    with torch.no_grad():
        for batch in batches:
            prepared(batch)
    return prepared


@dataclass(frozen=True)
class Reading:
    """What one model read: its name, the size of its file in bytes, and its text for each line."""

    name: str
    size: int
    texts: list[str]


def _read(reader: Reader, images: Tensor, characters: Sequence[str]) -> list[str]:
    """Line by line, as a device does."""
    with torch.no_grad():
        return [text for line in torch.split(images, 1) for text in decode(reader(line).argmax(2), characters)]


def draw(file: Path, images: Tensor, texts: Sequence[str], columns: Mapping[str, Sequence[str]]) -> None:
    """Draw lines (n, 3, 48, W), from -1 to 1, with what was read there beside them: green where it is right.

    Args:
        file: where the picture goes.
        images, texts: the lines, and what is written there.
        columns: what was read, by the head of the column.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 0.5 + 0.6 * len(texts)), dpi=120)
    widths = [2, *[1.2] * len(columns)]
    axes = figure.subplots(len(texts) + 1, len(widths), squeeze=False, gridspec_kw={"width_ratios": widths})
    for one in axes.flat:
        one.axis("off")
    for axis, head in zip(axes[0], ["", *columns], strict=True):
        axis.text(0, 0.3, head, fontsize=11, fontweight="bold")
    for row, (image, text) in enumerate(zip(images, texts, strict=True)):
        # nothing is drawn right of the paper, where pixels are 0
        paper = image[0].masked_fill((image[0] == 0).all(0), torch.nan)
        axes[row + 1][0].imshow(paper.numpy(), cmap="gray", vmin=-1, vmax=1)
        for axis, read in zip(axes[row + 1][1:], columns.values(), strict=True):
            colour = _RIGHT if read[row] == text else _WRONG
            axis.text(0, 0.4, read[row] or "(nothing)", fontsize=11, color=colour, parse_math=False)
    figure.tight_layout(pad=0.4)
    figure.savefig(file)


@quiet()
def main() -> None:
    """Quantize, write the files, read with them; print the table and draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("showcase"), help="folder for the files and the picture")
    parser.add_argument("--lines", type=int, default=LINES, help="to calibrate with")
    parser.add_argument("--test-lines", type=int, default=200)
    parser.add_argument("--float-biases", action="store_true", help="let the runtimes round the biases")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    network, characters = load(), alphabet()
    batches = list(torch.split(lines(options.lines, "train")[0], BATCH))
    images, texts = lines(options.test_lines, "test")
    size = sum(value.nbytes for value in network.state_dict().values())
    readings = [Reading("float", size, _read(network, images, characters))]
    prepared = _prepared(network, batches)
    for name, method in (("nearest", "nearest"), ("learned", "default")):
        start = time.perf_counter()
        converted = convert_pt2e(adaround(prepared, batches, method, integer_biases=not options.float_biases))
        print(f"{name}: {time.perf_counter() - start:.0f} s")
        files = {suffix: options.out / f"{name}.{suffix}" for suffix in ("pte", "onnx")}
        files["pte"].write_bytes(lowered(widen_weight_ranges(converted, linear_bits=4), images[:1]))
        files["onnx"].write_bytes(to_onnx(converted, images[:1]))
        for suffix, read in (("pte", pte_reader), ("onnx", onnx_reader)):
            file = files[suffix]
            readings.append(Reading(f"{name}, .{suffix}", file.stat().st_size, _read(read(file), images, characters)))
    print("\n| model | bytes | characters right % |\n|---|---|---|")
    for reading in readings:
        print(f"| {reading.name} | {reading.size:,} | {characters_right(reading.texts, texts):.1f} |")
    shown = {reading.name: reading.texts[:_SHOWN] for reading in readings if not reading.name.endswith("onnx")}
    heads = ("float", "nearest, 4 bits", "learned, 4 bits")
    columns = dict(zip(heads, shown.values(), strict=True))
    draw(options.out / "showcase.png", images[:_SHOWN], texts[:_SHOWN], columns)


if __name__ == "__main__":
    main()
