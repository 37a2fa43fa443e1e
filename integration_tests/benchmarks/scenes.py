"""Segmentation of scenes: glyphs of six families, overlapping, on a shaded background.

An object is a glyph with the two pixels around its ink; where objects overlap, the later one hides the earlier. The
fonts of the test split are never seen in training.
"""

from typing import Final

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from integration_tests.benchmarks import glyphs

# the characters of the classes 1, 2, ...; 0 is the background
FAMILIES: Final = ("AVWM", "OQCG", "BPRD", "EFHL", "2357", "&@%#")
CLASSES: Final = 1 + len(FAMILIES)
SCENE_SIZE: Final = 56

_OBJECTS = 3
_SIZE = (1.2, 1.8)  # of a glyph, where 1 is its size in the images of `glyphs`
_ROTATION = 0.3  # radians
_SHIFT = 0.6  # of half the scene
_CONTRAST = 0.35  # least difference of an object's shade and the background's mean
_NOISE = (0.02, 0.10)  # standard deviation, where black is 0 and white is 1
_MARGIN = 2  # pixels around the ink that belong to the object


def _objects(atlas: Tensor, n: int, generator: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Draw one object per scene: ink (n, 1, SCENE_SIZE, SCENE_SIZE) between 0 and 1, and classes (n,)."""
    family = generator.integers(len(FAMILIES), size=n)
    member = generator.integers(len(FAMILIES[0]), size=n)
    characters = [glyphs.CLASSES.index(FAMILIES[f][m]) for f, m in zip(family, member, strict=True)]
    ink = atlas[torch.from_numpy(generator.integers(len(atlas), size=n)), torch.tensor(characters)].unsqueeze(1)
    size = generator.uniform(*_SIZE, n)
    angle = generator.uniform(-_ROTATION, _ROTATION, n)
    cosine, sine = np.cos(angle), np.sin(angle)
    rotation = np.stack([np.stack([cosine, sine], -1), np.stack([-sine, cosine], -1)], -2)
    # from the scene's coordinates in [-1, 1] to the glyph's, whose image is half as large at size 1
    inverse = rotation * (SCENE_SIZE / glyphs.IMAGE_SIZE / size)[:, None, None]
    shift = generator.uniform(-_SHIFT, _SHIFT, (n, 2, 1))
    theta = torch.from_numpy(np.concatenate([inverse, -inverse @ shift], -1).astype(np.float32))
    grid = F.affine_grid(theta, [n, 1, SCENE_SIZE, SCENE_SIZE], align_corners=False)
    drawn = F.grid_sample(ink, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    return drawn, torch.from_numpy(family + 1)


def _background(n: int, generator: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Draw backgrounds with a linear shade (n, 1, SCENE_SIZE, SCENE_SIZE), and their means (n, 1, 1, 1)."""
    mean = torch.from_numpy(generator.uniform(0, 1, (n, 1, 1, 1)).astype(np.float32))
    slope = torch.from_numpy(generator.uniform(-0.15, 0.15, (n, 2, 1, 1)).astype(np.float32))
    axis = torch.linspace(-1, 1, SCENE_SIZE)
    return mean + slope[:, :1] * axis.view(1, 1, 1, -1) + slope[:, 1:] * axis.view(1, 1, -1, 1), mean


def load(split: glyphs.Split, n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Draw scenes at random; they depend on the arguments alone, and no global generator is read or changed.

    Args:
        split: "train" or "test"; the two have no font in common, and differ for equal seeds.
        n: Number of scenes.
        seed: Non-negative seed of the draw; distinct seeds give independent scenes.

    Returns:
        Normalised images (n, 1, SCENE_SIZE, SCENE_SIZE) of float32, and the class of each pixel
        (n, SCENE_SIZE, SCENE_SIZE) as int64, 0 for the background.
    """
    generator = np.random.default_rng([2 + ("train", "test").index(split), seed])
    atlas = glyphs.atlas(split)
    images, mean = _background(n, generator)
    labels = torch.zeros(n, SCENE_SIZE, SCENE_SIZE, dtype=torch.int64)
    for _ in range(_OBJECTS):
        ink, family = _objects(atlas, n, generator)
        # a shade at least _CONTRAST away from the background, around the circle of shades
        away = torch.from_numpy(generator.uniform(_CONTRAST, 1 - _CONTRAST, (n, 1, 1, 1)).astype(np.float32))
        images = images.lerp((mean + away) % 1.0, ink)
        covered = F.max_pool2d(ink, 2 * _MARGIN + 1, 1, _MARGIN).squeeze(1) > 0.5
        labels = torch.where(covered, family.view(n, 1, 1), labels)
    noise = torch.from_numpy(generator.standard_normal(tuple(images.shape), dtype=np.float32))
    strength = torch.from_numpy(generator.uniform(*_NOISE, (n, 1, 1, 1)).astype(np.float32))
    return (images + strength * noise - 0.5) / 0.25, labels


@torch.no_grad()
def mean_iou(network: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Mean over the classes, background included, of intersection over union of all pixels, in percent.

    Classes that neither the labels nor the predictions have do not count.

    Args:
        network: from images to logits (n, CLASSES, H, W).
        images: (n, 1, H, W).
        labels: (n, H, W), the class of each pixel.
    """
    confusion = torch.zeros(CLASSES, CLASSES, dtype=torch.int64)
    for part, truth in zip(torch.split(images, 100), torch.split(labels, 100), strict=True):
        predicted = network(part).argmax(1)
        confusion += torch.bincount(truth.flatten() * CLASSES + predicted.flatten(), minlength=CLASSES**2).view(
            CLASSES, CLASSES
        )
    hits = confusion.diagonal()
    union = confusion.sum(0) + confusion.sum(1) - hits
    return 100 * float((hits / union)[union > 0].mean())
