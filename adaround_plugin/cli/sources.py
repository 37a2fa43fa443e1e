"""Models and data as a command line names them: `module:function`, or files."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import numpy as np
import torch
from torch import Tensor, nn

from adaround_plugin.errors import InvalidBatchError, InvalidModelError, InvalidOptionError, MissingDependencyError
from adaround_plugin.files import check_file

__all__ = ["Images", "importing_from_here", "load_data", "load_model"]

# samples in a batch from files
_BATCH = 32
_PROGRAM = "Pass what torch.export.save wrote."
_IMAGES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp"}


@dataclass(frozen=True)
class Images:
    """How image files become samples: RGB `(3, H, W)` in [0, 1], less the mean, over the standard deviation.

    Attributes:
        size: `(H, W)` that all are resized to; None where all have the same already.
        mean, std: of each channel.

    Raises:
        InvalidOptionError: a standard deviation is not positive.
    """

    size: tuple[int, int] | None = None
    mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    std: tuple[float, ...] = (1.0, 1.0, 1.0)

    def __post_init__(self) -> None:
        if not all(value > 0 for value in self.std):
            raise InvalidOptionError("--std", f"{self.std} divides by what is not above 0", "Pass positive numbers.")


def load_model(source: str) -> Callable[[], nn.Module]:
    """What makes a model anew at each call.

    Args:
        source: a `.pt2` file, or `module:function` of a function without arguments that returns a model.

    Raises:
        InvalidOptionError: nothing of that name, or no file that torch.export wrote.
    """
    if ":" not in source or source.endswith(".pt2"):
        path = check_file("model", source)
        if not is_zipfile(path):
            raise InvalidOptionError("model", f"{source!r} is no exported program", _PROGRAM)

        def loaded() -> nn.Module:
            try:
                return torch.export.load(path).module()
            except (RuntimeError, ValueError, AssertionError, KeyError) as error:
                raise InvalidOptionError("model", f"{source!r} is no exported program ({error})", _PROGRAM) from error

        return loaded
    function = _attribute("model", source)

    def made() -> nn.Module:
        model = function() if callable(function) and not isinstance(function, nn.Module) else function
        if not isinstance(model, nn.Module):
            problem = f"{source!r} gives a {type(model).__name__}"
            raise InvalidModelError("model", problem, "Return a torch.nn.Module in eval mode.")
        return model

    return made


def load_data(source: str, batch_size: int | None, images: Images) -> list[Any]:
    """Batches.

    Args:
        source: `module:function` of a function without arguments that returns batches as `adaround` takes them; or a
            folder of `.npy` files, each of samples along its leading axis, or of images.
        batch_size: of samples from files; None for 32.
        images: how image files are read.

    Raises:
        InvalidOptionError: nothing of that name, a folder of no such files or of both kinds, or an option that is for
            other data.
        InvalidBatchError: files do not fit together.
        MissingDependencyError: Pillow is not there to read images.
    """
    if ":" in source and not Path(source).exists():
        found = _attribute("--data", source)
        data = found() if callable(found) else found
        # all of these can be gone through, but not batch by batch
        if not isinstance(data, Iterable) or isinstance(data, Tensor | np.ndarray | Mapping | str | bytes):
            raise InvalidOptionError(
                "--data", f"{source!r} gives a {type(data).__name__}", "Return a list of batches or a DataLoader."
            )
        if batch_size is not None:
            raise InvalidOptionError("--batch-size", f"{source!r} makes the batches itself", "Leave it out.")
        _check_plain(images, source)
        return list(data)
    folder = Path(source)
    if not folder.is_dir():
        problem = f"{source!r} is no folder and no module:function"
        raise InvalidOptionError("--data", problem, "Pass one of these.")
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in {".npy", *_IMAGES})
    kinds = {path.suffix.lower() == ".npy" for path in files}
    if len(kinds) != 1:
        told = "both arrays and images" if kinds else "neither .npy files nor images"
        raise InvalidOptionError("--data", f"{source!r} has {told}", "Pass a folder of one kind.")
    if kinds == {True}:
        _check_plain(images, source)
    samples = _arrays(files) if kinds == {True} else _pictures(files, images)
    return list(torch.split(samples, batch_size or _BATCH))


def _check_plain(images: Images, source: str) -> None:
    if images != Images():
        raise InvalidOptionError(
            "--image-size, --mean and --std", f"are for folders of images, and {source!r} is none", "Leave them out."
        )


def _arrays(files: Sequence[Path]) -> Tensor:
    """The samples of all files, one after the other; floating-point numbers as float32."""
    parts = []
    for path in files:
        try:
            array = np.load(path, allow_pickle=False)
        except (OSError, EOFError, ValueError) as error:
            raise InvalidBatchError(path.name, f"cannot be read ({error})", "Save it with numpy.save.") from None
        if not isinstance(array, np.ndarray):
            raise InvalidBatchError(path.name, "holds several arrays", "Save each with numpy.save.")
        if array.dtype.kind not in "fiub" or not array.ndim:
            problem = f"holds {array.dtype} of shape {array.shape}"
            raise InvalidBatchError(path.name, problem, "Save an array of numbers with samples along its leading axis.")
        native = np.float32 if array.dtype.kind == "f" else array.dtype.newbyteorder("=")
        parts.append(torch.from_numpy(array.astype(native)))
    return _joined(files, parts)


def _pictures(files: Sequence[Path], images: Images) -> Tensor:
    """A sample of each file."""
    try:
        from PIL import Image
    except ImportError as error:
        raise MissingDependencyError.of("Pillow", "cli", error) from error
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (images.mean, images.std))
    parts = []
    for path in files:
        try:
            with Image.open(path) as opened:
                if opened.mode.startswith(("I", "F")):
                    problem = f"has pixels of mode {opened.mode}, which would be cut off at 255"
                    raise InvalidBatchError(path.name, problem, "Save it with 8 bits, or as an array of samples.")
                picture = opened.convert("RGB")
        except (OSError, SyntaxError) as error:
            raise InvalidBatchError(path.name, f"cannot be read ({error})", "Take it out of the folder.") from None
        if images.size is not None:
            picture = picture.resize((images.size[1], images.size[0]), Image.Resampling.BILINEAR)
        pixels = torch.from_numpy(np.array(picture, dtype=np.float32) / 255).permute(2, 0, 1)
        parts.append((pixels.unsqueeze(0) - mean) / std)
    return _joined(files, parts)


def _joined(files: Sequence[Path], parts: Sequence[Tensor]) -> Tensor:
    first = parts[0]
    for path, part in zip(files, parts, strict=True):
        if part.shape[1:] != first.shape[1:] or part.dtype != first.dtype:
            raise InvalidBatchError(
                path.name,
                f"has samples of {part.dtype} {tuple(part.shape[1:])}, {files[0].name} of {first.dtype} "
                f"{tuple(first.shape[1:])}",
                "Make them alike (--image-size resizes images).",
            )
    return torch.cat(list(parts))


def _attribute(argument: str, source: str) -> Any:
    """What `module:name` names."""
    module, _, name = source.partition(":")
    if not module or module.startswith("."):
        raise InvalidOptionError(argument, f"{source!r} names no module", "Pass module:function.")
    try:
        found: Any = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise
        raise InvalidOptionError(argument, f"there is no module {error.name!r}", "Pass module:function.") from None
    for part in name.split("."):
        if not hasattr(found, part):
            raise InvalidOptionError(argument, f"{module!r} has no {name!r}", "Pass module:function.")
        found = getattr(found, part)
    return found


@contextmanager
def importing_from_here() -> Iterator[None]:
    """Let modules of the working directory be imported, by functions that are called later too."""
    sys.path.insert(0, "")
    try:
        yield
    finally:
        sys.path.remove("")
