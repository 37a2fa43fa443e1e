"""What each backend of ExecuTorch stores and runs: learned weights of 8, 4, 3 and 2 bits, lowered by its own code.

Three ways to a file: a partitioner gives parts of a program to a backend, the passes of Cortex-M rewrite it, and
without either it runs on the portable kernels. *Taken* is how many of the layers the backend takes. Bytes are those of
the whole file, beside the same network in float on the portable kernels. *Runs* is what ExecuTorch's runtime for Python
says.

    python -m integration_tests.benchmarks.executorch_storage
    python -m integration_tests.benchmarks.executorch_storage XNNPACK Vulkan --bits 4
"""

from __future__ import annotations

import argparse
import contextlib
import io
import multiprocessing
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from adaround_plugin.deployment import widen_weight_ranges
from adaround_plugin.errors import InvalidModelError
from adaround_plugin.hosts.pt2e import AdaRoundQuantizer
from integration_tests.benchmarks.executorch_backends import run_program
from integration_tests.benchmarks.quiet import quiet
from integration_tests.benchmarks.vendor_quantizers import VENDORS, Linears, Net, learn, samples

__all__ = ["BACKENDS"]

# linear layers that declare 4 bits where the backend has them
_NARROW = ("XNNPACK", "Vulkan")


def _xnnpack() -> Any:
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner

    return XnnpackPartitioner()


def _vulkan() -> Any:
    from executorch.backends.vulkan.partitioner.vulkan_partitioner import VulkanPartitioner

    return VulkanPartitioner()


def _tosa() -> Any:
    from executorch.backends.arm.tosa.compile_spec import TosaCompileSpec
    from executorch.backends.arm.tosa.partitioner import TOSAPartitioner

    return TOSAPartitioner(TosaCompileSpec("TOSA-1.0+INT"))


def _ethos_u() -> Any:
    from executorch.backends.arm.ethosu import EthosUCompileSpec, EthosUPartitioner

    return EthosUPartitioner(EthosUCompileSpec("ethos-u55-128"))


def _vgf() -> Any:
    from executorch.backends.arm.vgf import VgfCompileSpec, VgfPartitioner

    return VgfPartitioner(VgfCompileSpec())


# name of a backend -> the quantizer that it goes with, and its partitioner; None for the portable kernels
BACKENDS: dict[str, tuple[str, Callable[[], Any] | None]] = {
    "portable kernels": ("XNNPACK", None),
    "XNNPACK": ("XNNPACK", _xnnpack),
    "Vulkan": ("Vulkan", _vulkan),
    "Vulkan, with XNNPACK's quantizer": ("XNNPACK", _vulkan),
    "TOSA": ("TOSA", _tosa),
    "Ethos-U": ("Ethos-U", _ethos_u),
    "VGF": ("VGF", _vgf),
    "Cortex-M": ("Cortex-M", None),
}


def _lowered(backend: str, converted: fx.GraphModule, example: Tensor) -> tuple[int, bytes]:
    """How many layers a backend takes, and the file."""
    from adaround_plugin.deployment.executorch_programs import lower_to_executorch

    layers = len([node for node in converted.graph.nodes if "linear" in node.name or "conv2d" in node.name])
    if backend == "Cortex-M":
        return layers, _for_cortex_m(converted, example)
    _, partitioner = BACKENDS[backend]
    if partitioner is None:
        return 0, lower_to_executorch(converted, (example,)).buffer
    program = lower_to_executorch(converted, (example,), [partitioner()], partial=True)
    left = [node for node in program.exported_program().graph.nodes if _multiplies(node)]
    return layers - len(left), program.buffer


def _multiplies(node: fx.Node) -> bool:
    name = getattr(node.target, "__name__", "")
    return node.op == "call_function" and any(part in name for part in ("convolution", "addmm", "linear"))


def _for_cortex_m(converted: fx.GraphModule, example: Tensor) -> bytes:
    """A file for Arm's microcontrollers, whose backend rewrites operators and has no partitioner."""
    from executorch.backends.cortex_m.edge_compile_config import cortex_m_edge_compile_config
    from executorch.backends.cortex_m.passes.cortex_m_pass_manager import CortexMPassManager
    from executorch.backends.cortex_m.target_config import CortexM, CortexMTargetConfig
    from executorch.exir import EdgeProgramManager, to_edge

    config = cortex_m_edge_compile_config()
    edge = to_edge(torch.export.export(converted, (example,), strict=True), compile_config=config)
    target = CortexMTargetConfig(cpu=CortexM.M55)
    rewritten = CortexMPassManager(edge.exported_program(), target_config=target).transform()
    buffer: bytes = EdgeProgramManager(rewritten, compile_config=config).to_executorch().buffer
    return buffer


def _float_bytes(build: Callable[[], nn.Module]) -> int:
    """The size of the float network, on the portable kernels."""
    from executorch.exir import to_edge_transform_and_lower

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        program = torch.export.export(build().eval(), (samples(count=1)[0],), strict=True)
    return len(to_edge_transform_and_lower(program).to_executorch().buffer)


def _cell(backend: str, bits: int, build: Callable[[], nn.Module]) -> tuple[str, str]:
    """Layers that are taken with the bytes of the file, and whether it runs."""
    data = samples(count=2)
    name, _ = BACKENDS[backend]
    found = learn(name, AdaRoundQuantizer(VENDORS[name](), weight_bits=bits), data, "nearest", build)
    converted = widen_weight_ranges(found.converted, linear_bits=4 if backend in _NARROW and bits <= 4 else 8)
    layout = torch.channels_last if name == "Cortex-M" else torch.contiguous_format
    example = data[0].to(memory_format=layout)
    try:
        taken, buffer = _lowered(backend, converted, example)
    except (InvalidModelError, ImportError, RuntimeError) as error:
        return f"fails: {str(error.__cause__ or error).splitlines()[0][:90]}", "-"
    layers = len(found.report.layers) + len(found.report.skipped)
    try:
        apart = float((run_program(buffer, example) - converted(example)).abs().max())
        ran = f"yes, within {apart:.1g}"
    except RuntimeError:
        ran = "not in this runtime"
    return f"{taken} of {layers}, {len(buffer):,}", ran


@quiet()
def _rows(backend: str, bits: list[int]) -> list[str]:
    """The rows of one backend, in a process of its own."""
    torch.set_num_threads(1)
    rows = []
    for count in bits:
        try:
            # Ethos-U's compiler prints a summary of each program
            with contextlib.redirect_stdout(io.StringIO()):
                cells = [_cell(backend, count, build) for build in (Net, Linears)]
        except ImportError as error:
            return [f"| {backend} | | cannot be imported: {error} | | |"]
        rows.append(f"| {backend} | {count} | {cells[0][0]} | {cells[1][0]} | {cells[0][1]} |")
    return rows


@quiet()
def main() -> None:
    """Print a row for each backend and number of bits."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("backends", nargs="*", metavar="backend", help=f"of {list(BACKENDS)}; all, if none is named")
    parser.add_argument("--bits", nargs="+", type=int, default=[8, 4, 3, 2], help="of the weights")
    options = parser.parse_args()
    sizes = [f"{_float_bytes(build):,}" for build in (Net, Linears)]
    print("| backend | bits | Net: layers taken, bytes | Linears: layers taken, bytes | runs here |")
    print("|---|---|---|---|---|")
    print(f"| float, portable kernels | 32 | {sizes[0]} | {sizes[1]} | |", flush=True)
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        for rows in pool.imap(partial(_rows, bits=options.bits), options.backends or BACKENDS, chunksize=1):
            print("\n".join(rows), flush=True)


if __name__ == "__main__":
    main()
