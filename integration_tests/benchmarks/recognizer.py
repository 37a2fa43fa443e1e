"""A pretrained text recognizer: PP-OCRv4's SVTR-LCNet through FX, weight-only, scored by the characters it reads right.

The PyPI package rapidocr-onnxruntime carries the weights as an ONNX file, which the onnx package reads; neither
OpenCV nor onnxruntime is needed, and nothing is downloaded when this runs. Lines of text are words of the standard
library's documentation, rendered with matplotlib's fonts; calibration and test have neither a font nor a word in
common. All layers are quantized, first and last included, per channel.

    pip install --no-deps rapidocr-onnxruntime==1.4.4 onnx protobuf ml_dtypes
    python -m integration_tests.benchmarks.recognizer --bits 4 3 2
    python -m integration_tests.benchmarks.recognizer --bits 2 --affine --methods default --seeds 0 1 2
"""

from __future__ import annotations

import argparse
import importlib.util
import random
import re
import time
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from pydoc_data.topics import topics
from statistics import median
from typing import Any, Final, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

from adaround_plugin import adaround, get_report
from adaround_plugin.learning.methods import Preset
from integration_tests.benchmarks.accuracy import Case, add_common_options, layers_of, preset_of
from integration_tests.benchmarks.floor_models import Workload
from integration_tests.benchmarks.glyphs import TEST_FONTS, TRAIN_FONTS, Split, font_path
from integration_tests.benchmarks.svtr import Recognizer

__all__ = [
    "Recognizer",
    "Scores",
    "alphabet",
    "characters_right",
    "decode",
    "edit_distance",
    "lines",
    "load",
    "logits",
    "score",
    "workload",
]

HEIGHT: Final = 48
WIDTH: Final = 320
LINES: Final = 192
BATCH: Final = 32
# scores of 6,625 characters take memory: fewer at once are faster
_SCORED: Final = 8
# index of the class that stands for no character
BLANK: Final = 0

# Distortions, each drawn uniformly between low and high.
_SIZE = (26.0, 36.0)  # of the font, in pixels
_SHIFT = (-3.0, 3.0)  # of the middle of the line, in pixels
_CONTRAST = (0.4, 1.0)  # difference of ink and paper
_NOISE = (0.0, 0.08)  # standard deviation, where black is 0 and white is 1
_MARGIN = 6  # paper left and right of the text, in pixels


@lru_cache(maxsize=1)
def _file() -> Any:
    """The ONNX model of the installed package."""
    # the tests of the pure functions are without it
    import onnx

    spec = importlib.util.find_spec("rapidocr_onnxruntime")
    if spec is None or spec.origin is None:
        raise SystemExit("pip install --no-deps rapidocr-onnxruntime==1.4.4 onnx protobuf ml_dtypes")
    return onnx.load(Path(spec.origin).parent / "models" / "ch_PP-OCRv4_rec_infer.onnx")


def _trained() -> list[Tensor]:
    """The file's weights and statistics in the order in which the graph uses them."""
    from onnx import numpy_helper

    nodes = _file().graph.node
    constants = {node.output[0]: node.attribute[0].t for node in nodes if node.op_type == "Constant"}
    used = dict.fromkeys(name for node in nodes for name in node.input if name in constants)
    # all others are numbers that the conversion to ONNX wrote down
    trained = [name for name in used if not name.startswith(("p2o.", "fill_constant"))]
    return [torch.from_numpy(numpy_helper.to_array(constants[name]).copy()) for name in trained]


def load() -> Recognizer:
    """The pretrained network in eval mode."""
    network = Recognizer().eval()
    own = [value for name, value in network.state_dict().items() if not name.endswith("num_batches_tracked")]
    for value, trained in zip(own, _trained(), strict=True):
        # MatMul takes (in, out)
        value.copy_(trained.T if trained.dim() == 2 else trained)
    return network


def alphabet() -> tuple[str, ...]:
    """The character of each class; that of `BLANK` is empty."""
    (entry,) = (entry for entry in _file().metadata_props if entry.key == "character")
    return ("", *entry.value.splitlines(), " ")


@lru_cache(maxsize=2)
def words(split: Split) -> list[str]:
    """Words of 2 to 12 printable ASCII characters from the documentation; the two splits have none in common."""
    # quotes mark code there
    text = " ".join(topics.values()).replace('"', "")
    found = sorted(set(re.findall(r"(?<!\S)[!-~]{2,12}(?!\S)", text)))
    random.Random(0).shuffle(found)
    return found[::2] if split == "train" else found[1::2]


def _line(split: Split, generator: np.random.Generator) -> tuple[np.ndarray, str]:
    """One to three words, as many as fit, and their picture: (HEIGHT, WIDTH), from -1 to 1; 0 right of the paper."""
    fonts = TRAIN_FONTS if split == "train" else TEST_FONTS
    face = ImageFont.truetype(font_path(fonts[generator.integers(len(fonts))]), generator.uniform(*_SIZE))
    chosen = [words(split)[index] for index in generator.integers(len(words(split)), size=generator.integers(1, 4))]
    while face.getlength(" ".join(chosen)) > WIDTH - 2 * _MARGIN and len(chosen) > 1:
        chosen.pop()
    text = " ".join(chosen)
    width = min(WIDTH, round(face.getlength(text)) + 2 * _MARGIN)
    image = Image.new("L", (width, HEIGHT))
    middle = HEIGHT / 2 + generator.uniform(*_SHIFT)
    ImageDraw.Draw(image).text((_MARGIN, middle), text, font=face, fill=255, anchor="lm")
    ink = np.asarray(image, dtype=np.float32) / 255
    contrast = generator.uniform(*_CONTRAST)
    darkest = generator.uniform(0, 1 - contrast)
    grey = darkest + contrast * (ink if generator.random() < 0.5 else 1 - ink)
    grey += generator.uniform(*_NOISE) * generator.standard_normal(grey.shape)
    line = np.zeros((HEIGHT, WIDTH), dtype=np.float32)
    # 256 levels, as of a picture
    line[:, :width] = (np.round(grey.clip(0, 1) * 255) / 255 - 0.5) / 0.5
    return line, text


def lines(count: int, split: Split, seed: int = 0) -> tuple[Tensor, list[str]]:
    """Draw lines of text: images (count, 3, HEIGHT, WIDTH) with three equal channels, and what is written there.

    They depend on the arguments alone; the global generators are neither read nor changed.
    """
    generator = np.random.default_rng([("train", "test").index(split), seed])
    drawn = [_line(split, generator) for _ in range(count)]
    images = torch.from_numpy(np.stack([line for line, _ in drawn]))
    return images.unsqueeze(1).repeat(1, 3, 1, 1), [text for _, text in drawn]


def workload(case: Case, count: int = LINES, seed: int = 0) -> Workload:
    """The case's network prepared and calibrated with lines of the training split, which it is to learn from."""
    batches = list(torch.split(lines(count, "train", seed)[0], BATCH))
    return Workload(case.network, case.prepare(batches), batches, case.convert)


def decode(classes: Tensor, characters: Sequence[str]) -> list[str]:
    """Greedy CTC: merge equal neighbours among the best classes (n, positions), then drop blanks."""
    merged = [[index for index, _ in groupby(line)] for line in classes.tolist()]
    return ["".join(characters[index] for index in line if index != BLANK) for line in merged]


def edit_distance(one: str, other: str) -> int:
    """Levenshtein's distance: the fewest characters to insert, delete or replace that make one text the other."""
    above = list(range(len(other) + 1))
    for row, ours in enumerate(one, 1):
        current = [row]
        for column, theirs in enumerate(other, 1):
            replaced = above[column - 1] + (ours != theirs)
            current.append(min(replaced, above[column] + 1, current[-1] + 1))
        above = current
    return above[-1]


def characters_right(read: Sequence[str], texts: Sequence[str]) -> float:
    """In percent: 100 * (1 - edit distance / characters), over all lines together.

    Below 0 where far more was read than is written.
    """
    wrong = sum(edit_distance(*pair) for pair in zip(read, texts, strict=True))
    return 100 * (1 - wrong / sum(map(len, texts)))


def logits(network: nn.Module, images: Tensor) -> Tensor:
    """What enters the last softmax, of the network or of what FX made of it: (n, positions, classes)."""
    seen: list[Tensor] = []
    softmax = network.get_submodule("softmax")
    with torch.no_grad(), softmax.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0])):
        network(images)
    return seen[0]


class Scores(NamedTuple):
    """How a network reads lines.

    Attributes:
        right: characters right in percent.
        divergence: mean Kullback-Leibler divergence of its shares from the float network's at a position, in nats.
        error: squared error of its logits over the variance of the float network's, about the mean at each position,
            which a softmax does not see.
    """

    right: float
    divergence: float
    error: float


def score(network: nn.Module, other: nn.Module, images: Tensor, texts: Sequence[str]) -> Scores:
    """How `other` reads, and how far it is from the float network."""
    characters = alphabet()
    divergence = error = power = 0.0
    read: list[str] = []
    for batch in torch.split(images, _SCORED):
        ours, theirs = (logits(model, batch) for model in (network, other))
        read += decode(theirs.argmax(2), characters)
        divergence += float(F.kl_div(theirs.log_softmax(2), ours.log_softmax(2), log_target=True, reduction="sum"))
        ours, theirs = (values - values.mean(2, keepdim=True) for values in (ours, theirs))
        error += float((theirs - ours).square().sum())
        power += float(ours.square().sum())
        positions = ours.shape[1]
    return Scores(characters_right(read, texts), divergence / (len(texts) * positions), error / power)


def rows(case: Case, name: str, preset: Preset, options: argparse.Namespace) -> Iterator[list[str]]:
    """Table rows: weights, method, seed, characters right, divergence, errors, CPU seconds of `adaround`, recipe.

    One for each seed, and one of the medians where there are several.
    """
    test = lines(options.test_lines, "test")
    every: list[list[float]] = []
    for seed in options.seeds:
        made = workload(case, options.lines, seed)
        start = time.process_time()
        learned = adaround(made.prepared, made.batches, preset, progress=False)
        seconds = time.process_time() - start
        report = get_report(learned)
        assert report.output_error is not None
        every.append([*score(case.network, made.convert(learned), *test), report.output_error, seconds])
        yield [str(case), name, str(seed), *_figures(every[-1]), report.recipe]
    if len(every) > 1:
        yield [str(case), name, "median", *_figures([median(column) for column in zip(*every, strict=True)]), ""]


def _figures(values: Sequence[float]) -> list[str]:
    right, *errors, seconds = values
    return [f"{right:.1f}", *(f"{error:.4f}" for error in errors), f"{seconds:.0f}"]


def main() -> None:
    """Run and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    parser.add_argument("--methods", nargs="+", default=["nearest", "default"], help="methods, or solvers of layers")
    parser.add_argument("--lines", type=int, default=LINES, help="to calibrate with")
    parser.add_argument("--test-lines", type=int, default=400)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of the draw to calibrate with")
    add_common_options(parser)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    layers = layers_of(options)
    network = load()
    test = lines(options.test_lines, "test")
    right = score(network, network, *test).right
    print(f"float {right:.1f} % of {sum(map(len, test[1]))} characters, {options.lines} lines to calibrate\n")
    head = [
        *("weights", "method", "seed", "characters right %", "divergence", "logit error", "output error"),
        *("CPU s", "recipe"),
    ]
    print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}", flush=True)
    for bits in options.bits:
        case = Case(network, bits, activation_bits=None, affine=options.affine)
        for name in options.methods:
            for row in rows(case, name, preset_of(name, layers), options):
                print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
