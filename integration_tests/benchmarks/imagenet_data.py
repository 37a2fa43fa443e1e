"""ImageNet and Pascal VOC from folders in their own layout: preprocessing, calibration images, scores.

ImageNet  DIR/train/<class>/*.JPEG, DIR/val/<class>/*.JPEG
VOC       DIR/JPEGImages/*.jpg, DIR/SegmentationClass/*.png, DIR/ImageSets/Segmentation/{train,val}.txt
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm import tqdm

from adaround_plugin.errors import InvalidOptionError
from integration_tests.benchmarks.torchvision_cpu import datasets, transforms

__all__ = ["VOC", "Preprocessing", "check_classes", "confusion", "draw", "image_folder", "loader", "mean_iou", "top1"]

VOID: Final = 255  # pixels of VOC's borders and difficult objects, which no score counts

Split = Literal["train", "val"]
# pairs of an image (3, H, W) and a class: an int, or a map (H, W) of int64
Labelled = Dataset[tuple[Tensor, Any]]
Batches = DataLoader[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Preprocessing:
    """The shorter side to `resize` pixels, the square of `crop` in the middle, then `(value - mean) / std`."""

    resize: int
    crop: int
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)

    def scaled(self, crop: int) -> "Preprocessing":
        """The same for another size of square, the margin in proportion."""
        return replace(self, resize=round(self.resize * crop / self.crop), crop=crop)

    def image(self, image: Image.Image) -> Tensor:
        """(3, crop, crop), float32."""
        steps = [
            *(transforms.Resize(self.resize), transforms.CenterCrop(self.crop), transforms.PILToTensor()),
            *(transforms.ConvertImageDtype(torch.float32), transforms.Normalize(self.mean, self.std)),
        ]
        result: Tensor = transforms.Compose(steps)(image.convert("RGB"))
        return result

    def mask(self, mask: Image.Image) -> Tensor:
        """(crop, crop) of int64: the classes of the same pixels."""
        nearest = transforms.InterpolationMode.NEAREST
        steps = [transforms.Resize(self.resize, nearest), transforms.CenterCrop(self.crop), transforms.PILToTensor()]
        result: Tensor = transforms.Compose(steps)(mask)[0].long()
        return result


def image_folder(root: Path, split: Split, preprocessing: Preprocessing) -> Labelled:
    """ImageNet's images with the indices of their classes, which are those of the sorted folder names."""
    folder = root / split
    try:
        return datasets.ImageFolder(str(folder), preprocessing.image)  # type: ignore[no-any-return]
    except FileNotFoundError as error:
        raise InvalidOptionError(
            "data", f"{folder} has no images in folders of classes ({error})", "Pass a folder in ImageNet's layout."
        ) from error


class VOC(Dataset[tuple[Tensor, Tensor]]):
    """Pascal VOC's images with the class of each pixel, 255 for void.

    Raises:
        InvalidOptionError: the list of the split is missing or empty, or a file that it names is missing.
    """

    def __init__(self, root: Path, split: Split, preprocessing: Preprocessing) -> None:
        listing = root / "ImageSets" / "Segmentation" / f"{split}.txt"
        names = listing.read_text(encoding="ascii").split() if listing.is_file() else []
        if not names:
            raise InvalidOptionError("data", f"{listing} names no images", "Pass a folder in Pascal VOC's layout.")
        self.pairs = [
            (root / "JPEGImages" / f"{name}.jpg", root / "SegmentationClass" / f"{name}.png") for name in names
        ]
        for path in (path for pair in self.pairs for path in pair):
            if not path.is_file():
                raise InvalidOptionError(
                    "data", f"{path} is missing", f"Take the image from {listing.name}, or add it."
                )
        self.preprocessing = preprocessing

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image, mask = self.pairs[index]
        with Image.open(image) as opened, Image.open(mask) as classes:
            return self.preprocessing.image(opened), self.preprocessing.mask(classes)


def check_classes(dataset: Labelled, classes: int) -> None:
    """Raise `InvalidOptionError` unless a dataset of folders has as many as the network has classes."""
    if isinstance(dataset, datasets.ImageFolder) and len(dataset.classes) != classes:
        raise InvalidOptionError(
            "data",
            f"{dataset.root} has {len(dataset.classes)} folders of classes, and the network {classes} classes",
            "Pass the data that the weights were trained on.",
        )


def loader(dataset: Labelled, batch_size: int, workers: int = 0, subset: int | None = None, seed: int = 0) -> Batches:
    """Batches in a fixed order: of all, or of `subset` items drawn without replacement by `seed`."""
    if subset is not None:
        total = len(dataset)  # type: ignore[arg-type]  # torch's Dataset does not promise a length
        if not 0 < subset <= total:
            raise InvalidOptionError(
                "images, subset",
                f"{subset} of {total} images cannot be drawn",
                "Pass a number from 1 to all.",
            )
        generator = torch.Generator().manual_seed(seed)
        dataset = Subset(dataset, torch.randperm(total, generator=generator)[:subset].tolist())
    # a generator of its own: iterating draws from the global one otherwise
    return DataLoader(dataset, batch_size, num_workers=workers, generator=torch.Generator())


def draw(dataset: Labelled, count: int, seed: int, batch_size: int, workers: int = 0) -> list[Tensor]:
    """`count` calibration images drawn by `seed`, without their labels: batches (batch_size, 3, H, W)."""
    return [images for images, _ in loader(dataset, batch_size, workers, count, seed)]


def _predictions(network: nn.Module, batches: Batches) -> Iterable[tuple[Tensor, Tensor]]:
    """The classes (n, ...) that the network sees in each batch, and the true ones, on its device."""
    device = next((tensor.device for tensor in (*network.parameters(), *network.buffers())), torch.device("cpu"))
    with torch.inference_mode():
        for images, labels in tqdm(batches, desc="evaluation", unit="batch", leave=False):
            yield network(images.to(device)).argmax(1), labels.to(device)


def top1(network: nn.Module, batches: Batches) -> float:
    """Percent of the images whose class the network names first."""
    right = total = 0
    for predicted, labels in _predictions(network, batches):
        right += int((predicted == labels).sum())
        total += len(labels)
    return 100 * right / total


def confusion(predicted: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Counts of pixels by true class (rows) and predicted class: (classes, classes), without void."""
    counted = labels != VOID
    index = labels[counted] * classes + predicted[counted]
    return torch.bincount(index, minlength=classes**2).view(classes, classes)


def mean_iou(network: nn.Module, batches: Batches, classes: int) -> float:
    """Mean over the classes of intersection over union of all pixels, in percent.

    A class that neither the labels nor the predictions hold does not count; all of VOC's occur in its val.
    """
    counts = torch.zeros(classes, classes, dtype=torch.int64)
    for predicted, labels in _predictions(network, batches):
        counts += confusion(predicted, labels, classes).cpu()
    hits = counts.diagonal()
    union = counts.sum(0) + counts.sum(1) - hits
    return 100 * float((hits[union > 0] / union[union > 0]).mean())
