"""Vendors' quantizers of ExecuTorch with learned rounding: what is learned, whether it is exact, and what runs.

A small network with random weights, so the errors say how much is won, nothing of accuracy. *Exact* is that the
converted program holds the learned integers. XNNPACK's programs are lowered and run; *steps* is how far the runtime's
output is at most from that of the converted program, in steps of its last activation.

    python -m integration_tests.benchmarks.executorch_backends
    python -m integration_tests.benchmarks.executorch_backends XNNPACK Vulkan --bits 4
    python -m integration_tests.benchmarks.executorch_backends --storage
"""

from __future__ import annotations

import argparse
import multiprocessing
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from adaround_plugin.deployment import widen_weight_ranges
from adaround_plugin.graph.compat import operator_name
from adaround_plugin.hosts.pt2e import AdaRoundQuantizer
from integration_tests.benchmarks.quiet import quiet
from integration_tests.benchmarks.vendor_quantizers import NEEDS, VENDORS, Linears, Net, learn, samples

__all__ = ["lowered", "run_program", "steps_apart"]


def lowered(converted: nn.Module, example: Tensor) -> bytes:
    """A `.pte` file of XNNPACK."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    program = torch.export.export(converted, (example,))
    buffer: bytes = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()]).to_executorch().buffer
    return buffer


def run_program(buffer: bytes, example: Tensor) -> Tensor:
    """What ExecuTorch's runtime makes of an example."""
    from executorch.runtime import Runtime

    output: Tensor = Runtime.get().load_program(buffer).load_method("forward").execute([example])[0]
    return output


def steps_apart(converted: fx.GraphModule, buffer: bytes, example: Tensor) -> Tensor:
    """How far the runtime's output is from that of the converted program, in steps of its last activation."""
    nodes: list[Any] = list(converted.graph.nodes)
    step = [node.args[1] for node in nodes if operator_name(node)[0] == "dequantize_per_tensor"][-1]
    apart: Tensor = (run_program(buffer, example) - converted(example)) / step
    return apart.abs()


@quiet()
def _rows(vendor: str, bits: list[int | None]) -> list[str]:
    """The rows of one quantizer, made in a process of its own: what one vendor's code leaves behind disturbs others."""
    torch.set_num_threads(1)
    # its own bits may be those that are asked for
    return list(dict.fromkeys(_row(vendor, count) for count in bits))


def _row(vendor: str, bits: int | None) -> str:
    data = samples()
    try:
        quantizer = VENDORS[vendor]()
    except ImportError:
        return f"| {vendor} | | needs {NEEDS.get(vendor, 'executorch')} | | | |"
    found = learn(vendor, AdaRoundQuantizer(quantizer, weight_bits=bits), data)
    report, ran = found.report, "-"
    if vendor == "XNNPACK":
        buffer = lowered(widen_weight_ranges(found.converted, linear_bits=4), data[0])
        ran = f"{steps_apart(found.converted, buffer, data[0]).max():.2f}"
    learned = f"{len(report.layers)} of {len(report.layers) + len(report.skipped)}"
    error = f"{report.nearest_output_error:.1e} -> {report.output_error:.1e}"
    return (
        f"| {vendor} | {report.layers[0].bits} | {learned} | {'yes' if found.exact else '**no**'} | {error} | {ran} |"
    )


def _storage_row(bits: int) -> str:
    """Sizes of two networks, with every way to declare the ranges of their weights."""
    cells = [str(bits)]
    for build in (Net, Linears):
        data = samples()
        converted = learn(
            "XNNPACK", AdaRoundQuantizer(VENDORS["XNNPACK"](), weight_bits=bits), data, build=build
        ).converted
        for model in (converted, *(widen_weight_ranges(converted, linear_bits=least) for least in (8, 4))):
            try:
                buffer = lowered(model, data[0])
            except AssertionError:
                cells.append("fails")
                continue
            steps = steps_apart(converted, buffer, data[0]).max()
            cells.append(f"{len(buffer):,} ({steps:.2f})")
    return f"| {' | '.join(cells)} |"


@quiet()
def main() -> None:
    """Print a row for each quantizer and number of bits, or for each number of bits."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("vendors", nargs="*", metavar="quantizer", help=f"of {list(VENDORS)}; all, if none is named")
    parser.add_argument(
        "--bits", nargs="+", type=int, help="of the weights; the quantizer's own and 4, if none is given"
    )
    parser.add_argument("--storage", action="store_true", help="sizes of XNNPACK's files instead")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.storage:
        print("| bits | Net: as converted | widened to 8 | linear to 4 | Linears: as converted | widened to 8 | to 4 |")
        print("|---|---|---|---|---|---|---|")
        for bits in options.bits or (8, 4, 3, 2):
            print(_storage_row(bits), flush=True)
        return
    print("| quantizer | bits | learned | exact | output error, nearest -> learned | .pte runs, steps |")
    print("|---|---|---|---|---|---|")
    vendors = options.vendors or VENDORS
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        for rows in pool.imap(partial(_rows, bits=options.bits or [None, 4]), vendors, chunksize=1):
            print("\n".join(rows), flush=True)


if __name__ == "__main__":
    main()
