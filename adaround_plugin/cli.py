"""The `adaround` command."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Sequence

from adaround_plugin.errors import AdaRoundError
from adaround_plugin.rounding.grid import check_bits

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="adaround", description="Learned weight rounding for PyTorch's quantization.")
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser(
        "demo", help="train a small network on handwritten digits and compare nearest with learned rounding"
    )
    demo.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2], help="weight bits to compare (2 to 8)")
    demo.add_argument("--backend", default="x86", help="x86, fbgemm, onednn or qnnpack")
    demo.add_argument("--report", action="store_true", help="print each layer's report as well")
    options = parser.parse_args(argv)
    try:
        for bits in options.bits:
            check_bits(bits, "--bits")
        return _demo(options)
    except AdaRoundError as error:
        parser.error(str(error))


def _demo(options: argparse.Namespace) -> int:
    try:
        # scikit-learn is an extra: only the demo's data need it
        from adaround_plugin.demo import run
    except ModuleNotFoundError as error:
        print(f"The demo needs {error.name}: pip install 'adaround_plugin[demo]'")
        return 1
    with warnings.catch_warnings():
        # torch's advice on its own quantization flow, at every call of it
        warnings.simplefilter("ignore")
        for text in run(options.bits, options.backend, options.report):
            print(text, flush=True)
    return 0
