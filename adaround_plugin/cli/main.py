"""The commands, their options, what is printed where, and exit codes."""

from __future__ import annotations

import argparse
import math
import re
import sys
import warnings
from collections.abc import Sequence

from adaround_plugin._version import __version__
from adaround_plugin.cli.commands import analyze_model, compare_reports, demo, quantize_model, show_report
from adaround_plugin.cli.printing import show
from adaround_plugin.cli.sources import importing_from_here
from adaround_plugin.errors import AdaRoundError, InvalidOptionError
from adaround_plugin.learning.methods import METHODS

__all__ = ["main"]

_FAILED, _USAGE = 1, 2

_EPILOG = """\
Exit codes: 0, done; 1, failed; 2, an option or a name is wrong. Progress and errors go to stderr.

examples:
  adaround demo --html demo.html
  adaround quantize nets:make --data nets:batches --bits 4 --output net.pt2 --html report.html
  adaround analyze net.pt2 --data photos/ --image-size 224x224 --average-bits 3
  adaround report report.json --html report.html
  adaround compare before.json after.json
"""
_MODEL = """\
MODEL is `module:function`, a function without arguments that returns a model in eval mode, or a `.pt2` file of
torch.export. --data is `module:function` that returns batches, a folder of .npy files, each of samples along its
leading axis, or a folder of images. Modules are looked for in the working directory too. Read files of your own alone:
a module runs, and so may a .pt2 file.
"""
_QUANTIZE = """\
examples:
  adaround quantize nets:make --data nets:batches --bits 3 --layer-bits head=8 --output net.pt2 --json net.json
  adaround quantize net.pt2 --data photos/ --image-size 224x224 --mean 0.485 0.456 0.406 --std 0.229 0.224 0.225 \\
      --backend x86 --average-bits 4 --output quantized.pt2
"""
_ANALYZE = """\
examples:
  adaround analyze nets:make --data nets:batches --html bits.html
  adaround analyze net.pt2 --data arrays/ --widths 4 8 --size 2000000
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status."""
    options = _parser().parse_args(argv)
    try:
        with warnings.catch_warnings(), importing_from_here():
            # torch's advice on its own quantization flow, at every call of it
            warnings.simplefilter("ignore")
            for told in options.run(options):
                show(told)
    except AdaRoundError as error:
        print(f"adaround: {' '.join(str(error).split())}", file=sys.stderr)
        return _USAGE if isinstance(error, InvalidOptionError) else _FAILED
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="adaround",
        description="Learned weight rounding for PyTorch's quantization.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_demo(commands.add_parser("demo", help="train a small network and compare nearest with learned rounding"))
    for name, add, said, example in (
        ("quantize", _add_quantize, "learn the rounding of a model, and save the converted program", _QUANTIZE),
        ("analyze", _add_analyze, "what each layer loses at each width, and bits under a budget", _ANALYZE),
    ):
        add(
            commands.add_parser(
                name,
                help=said,
                description=f"{said}\n\n{_MODEL}",
                epilog=example,
                formatter_class=argparse.RawDescriptionHelpFormatter,
            )
        )
    report = commands.add_parser("report", help="show a report that was saved as JSON")
    report.add_argument("file", metavar="FILE", help="what quantize --json or report.to_json() wrote")
    report.add_argument("--html", metavar="PATH", help="write it as a page")
    report.set_defaults(run=show_report)
    compare = commands.add_parser("compare", help="two saved reports side by side")
    compare.add_argument("one", metavar="A")
    compare.add_argument("other", metavar="B")
    compare.set_defaults(run=compare_reports)
    return parser


def _add_demo(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2], help="weight bits to compare (2 to 8)")
    parser.add_argument("--backend", default="x86", help="x86, fbgemm, onednn or qnnpack")
    parser.add_argument("--report", action="store_true", help="print each layer's report as well")
    parser.add_argument(
        "--html",
        metavar="PATH",
        default="adaround-demo.html",
        help="the report of the last learned model, as a page (default adaround-demo.html)",
    )
    parser.set_defaults(run=demo)


def _add_quantize(parser: argparse.ArgumentParser) -> None:
    _add_model(parser)
    parser.add_argument("--bits", type=int, default=4, help="of the weights, 2 to 8 (default 4)")
    parser.add_argument(
        "--layer-bits",
        metavar="NAME=BITS",
        action="append",
        default=[],
        help="of single layers, by name, name of a parent, or regular expression; may be given several times",
    )
    parser.add_argument("--method", choices=list(METHODS), default="default")
    parser.add_argument("--finetune", action="store_true", help="then learn scales and biases by the network's output")
    parser.add_argument("--output", metavar="PATH", required=True, help="the converted program, a .pt2 file")
    parser.add_argument("--checkpoint", metavar="FOLDER", help="keep every decision here; a second run goes on from it")
    parser.add_argument(
        "--memory-budget",
        type=_bytes,
        default="auto",
        metavar="BYTES",
        help="for values between two layers; what is beyond goes to files (default: half of what is free)",
    )
    _add_budget(parser, "bits of each layer are suggested under this budget")
    parser.set_defaults(run=quantize_model)


def _add_analyze(parser: argparse.ArgumentParser) -> None:
    _add_model(parser)
    _add_budget(parser, "bits of each layer are suggested under this budget")
    parser.set_defaults(run=analyze_model)


def _add_model(parser: argparse.ArgumentParser) -> None:
    """The model, the data, and what both commands say and keep."""
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("--data", required=True, help="to calibrate and to learn from, without labels")
    parser.add_argument("--batch-size", type=_positive, help="of samples from files (default 32)")
    parser.add_argument("--image-size", type=_size, metavar="HxW", help="resize images to this")
    for name, default, said in (("--mean", 0.0, "of the channels, subtracted"), ("--std", 1.0, "divides then")):
        parser.add_argument(
            name,
            type=float,
            nargs=3,
            default=[default] * 3,
            metavar=("R", "G", "B"),
            help=f"of images in [0, 1]: {said}",
        )
    parser.add_argument(
        "--backend",
        choices=["weights", "x86", "xnnpack"],
        default="weights",
        help="weights alone (default), or with 8-bit activations for x86 (Inductor) or XNNPACK (ExecuTorch)",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--html", metavar="PATH", help="write the report as a page")
    parser.add_argument("--json", metavar="PATH", help="write it as data")
    parser.add_argument("--quiet", action="store_true", help="no progress")


def _add_budget(parser: argparse.ArgumentParser, said: str) -> None:
    parser.add_argument(
        "--widths", type=int, nargs="+", help="the bits to analyze, and to choose from (default 2 3 4 6 8)"
    )
    budget = parser.add_argument_group("budgets", said).add_mutually_exclusive_group()
    budget.add_argument("--average-bits", type=_amount, metavar="BITS", help="of a weight on the mean")
    budget.add_argument("--size", type=_amount, metavar="BYTES", help="of all weights with their scales")
    budget.add_argument("--max-loss", type=_amount, metavar="LOSS", help="the largest sum of the layers' losses")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def _bytes(text: str) -> int | str:
    if text != "auto" and not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of bytes, nor auto")
    return text if text == "auto" else int(text)


def _amount(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a finite number above 0")
    return value


def _size(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not HxW, such as 224x224")
    return int(found[1]), int(found[2])
