"""Glyph classification: printable ASCII, rendered from the TrueType fonts that matplotlib ships.

The 94 classes are the characters ``!`` to ``~``. Every glyph is rendered once per font; `load` then warps,
blurs and shades randomly chosen glyphs, all from one local generator, so the same arguments give the same
images. The fonts of the test split are never seen in training.
"""

from functools import lru_cache
from pathlib import Path
from typing import Final, Literal

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

Split = Literal["train", "test"]

CLASSES: Final = tuple(chr(code) for code in range(ord("!"), ord("~") + 1))
IMAGE_SIZE: Final = 28

TRAIN_FONTS: Final = (
    "DejaVuSans",
    "DejaVuSans-Bold",
    "DejaVuSans-Oblique",
    "DejaVuSansMono",
    "DejaVuSansMono-Bold",
    "DejaVuSansMono-Oblique",
    "DejaVuSerif",
    "DejaVuSerif-Bold",
    "DejaVuSerif-BoldItalic",
    "STIXGeneral",
    "STIXGeneralItalic",
    "STIXGeneralBolIta",
)
TEST_FONTS: Final = (
    "DejaVuSans-BoldOblique",
    "DejaVuSansMono-BoldOblique",
    "DejaVuSerif-Italic",
    "STIXGeneralBol",
    "cmtt10",
)
# Every other font file of matplotlib 3.x. `cmb10`, `cmmi10`, `cmr10`, `cmss10`, `cmsy10`, `cmti10` and `cmex10`
# map all 94 codes, but TeX's encodings put other glyphs there ("<" is an inverted "!", "{" a dash, ...);
# `LastResortHE-Regular` draws a box for each; the remaining ones lack some of the codes.
SKIPPED_FONTS: Final = (
    "DejaVuSansDisplay",
    "DejaVuSerifDisplay",
    "LastResortHE-Regular",
    "STIXNonUni",
    "STIXNonUniBol",
    "STIXNonUniBolIta",
    "STIXNonUniIta",
    "STIXSizFiveSymReg",
    "STIXSizFourSymBol",
    "STIXSizFourSymReg",
    "STIXSizOneSymBol",
    "STIXSizOneSymReg",
    "STIXSizThreeSymBol",
    "STIXSizThreeSymReg",
    "STIXSizTwoSymBol",
    "STIXSizTwoSymReg",
    "cmb10",
    "cmex10",
    "cmmi10",
    "cmr10",
    "cmss10",
    "cmsy10",
    "cmti10",
)

_SUPERSAMPLING = 2
_CANVAS = _SUPERSAMPLING * IMAGE_SIZE
_EM = 42  # font size on the canvas, in pixels
_BASELINE = 38  # row of the baseline on the canvas
_CHUNK = 2048  # images warped at a time, which bounds the memory

# Distortions, each drawn uniformly: from -x to x where one number is given, from low to high where two are.
_LOG_SIZE = 0.2  # overall size, natural logarithm
_LOG_ASPECT = 0.15  # width against height, natural logarithm
_ROTATION = 0.25  # radians
_SHEAR = 0.25
_SHIFT = 0.12  # of half the image
_BLUR = (0.0, 1.0)  # share of the smoothed image
_CONTRAST = (0.4, 1.0)  # difference of ink and paper
_NOISE = (0.02, 0.12)  # standard deviation, where black is 0 and white is 1


def font_path(font: str) -> Path:
    """Return the file of one of matplotlib's TrueType fonts."""
    return Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{font}.ttf"


@lru_cache(maxsize=2)
def atlas(split: Split) -> Tensor:
    """Render each glyph of a split's fonts once, as ink between 0 and 1: (fonts, classes, canvas, canvas)."""
    fonts = TRAIN_FONTS if split == "train" else TEST_FONTS
    rendered = np.zeros((len(fonts), len(CLASSES), _CANVAS, _CANVAS), dtype=np.float32)
    for row, font in enumerate(fonts):
        face = ImageFont.truetype(font_path(font), _EM)
        for column, character in enumerate(CLASSES):
            image = Image.new("L", (_CANVAS, _CANVAS))
            ImageDraw.Draw(image).text((_CANVAS / 2, _BASELINE), character, font=face, fill=255, anchor="ms")
            rendered[row, column] = np.asarray(image, dtype=np.float32) / 255
    return torch.from_numpy(rendered)


def _warps(n: int, generator: np.random.Generator) -> Tensor:
    """Draw affine maps from output to input coordinates in [-1, 1]: (n, 2, 3)."""
    size = np.exp(generator.uniform(-_LOG_SIZE, _LOG_SIZE, n))
    aspect = np.exp(generator.uniform(-_LOG_ASPECT, _LOG_ASPECT, n) / 2)
    angle = generator.uniform(-_ROTATION, _ROTATION, n)
    shear = generator.uniform(-_SHEAR, _SHEAR, n)
    cosine, sine = np.cos(angle), np.sin(angle)
    rotation = np.stack([np.stack([cosine, -sine], -1), np.stack([sine, cosine], -1)], -2)
    zero = np.zeros(n)
    stretch = np.stack([np.stack([size * aspect, shear], -1), np.stack([zero, size / aspect], -1)], -2)
    shift = generator.uniform(-_SHIFT, _SHIFT, (n, 2, 1))
    inverse = np.linalg.inv(rotation @ stretch)
    return torch.from_numpy(np.concatenate([inverse, -inverse @ shift], -1).astype(np.float32))


def _smooth(images: Tensor) -> Tensor:
    """Smooth images (n, 1, H, W) by a binomial kernel of 5 by 5."""
    row = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0]) / 16
    padded = F.pad(images, (2, 2, 2, 2), mode="replicate")
    return F.conv2d(F.conv2d(padded, row.view(1, 1, 1, 5)), row.view(1, 1, 5, 1))


def _uniform(bounds: tuple[float, float], n: int, generator: np.random.Generator) -> Tensor:
    """Draw one number per image: (n, 1, 1, 1)."""
    return torch.from_numpy(generator.uniform(*bounds, (n, 1, 1, 1)).astype(np.float32))


def _distort(ink: Tensor, generator: np.random.Generator) -> Tensor:
    """Turn glyphs (n, 1, canvas, canvas) into distorted, normalised images (n, 1, IMAGE_SIZE, IMAGE_SIZE)."""
    n = len(ink)
    grid = F.affine_grid(_warps(n, generator), list(ink.shape), align_corners=False)
    warped = F.grid_sample(ink, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    ink = F.avg_pool2d(warped, _SUPERSAMPLING)
    ink = ink.lerp(_smooth(ink), _uniform(_BLUR, n, generator))
    contrast = _uniform(_CONTRAST, n, generator)
    darkest = _uniform((0.0, 1.0), n, generator) * (1 - contrast)
    inverted = _uniform((0.0, 1.0), n, generator) < 0.5
    images = darkest + contrast * torch.where(inverted, 1 - ink, ink)
    noise = torch.from_numpy(generator.standard_normal(tuple(images.shape), dtype=np.float32))
    images = images + _uniform(_NOISE, n, generator) * noise
    return (images - 0.5) / 0.25


def load(split: Split, n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Draw glyphs at random, with replacement over classes and fonts of the split.

    The images depend on the arguments alone; the global generators are neither read nor changed.

    Args:
        split: "train" or "test"; the two have no font in common, and differ for equal seeds.
        n: Number of images.
        seed: Non-negative seed of the draw; distinct seeds give independent images.

    Returns:
        Normalised images (n, 1, IMAGE_SIZE, IMAGE_SIZE) of float32 and labels (n,) of int64, indices to CLASSES.
    """
    if split not in ("train", "test"):
        raise ValueError(f'split must be "train" or "test", not {split!r}')
    generator = np.random.default_rng([("train", "test").index(split), seed])
    rendered = atlas(split)
    fonts = torch.from_numpy(generator.integers(len(rendered), size=n))
    labels = torch.from_numpy(generator.integers(len(CLASSES), size=n))
    images = torch.empty(n, 1, IMAGE_SIZE, IMAGE_SIZE)
    for start in range(0, n, _CHUNK):
        part = slice(start, start + _CHUNK)
        images[part] = _distort(rendered[fonts[part], labels[part]].unsqueeze(1), generator)
    return images, labels
