"""The showcase's pieces, without the network that it downloads: its files, its readers, its picture."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e

from adaround_plugin import adaround
from adaround_plugin.deployment import widen_weight_ranges
from adaround_plugin.hosts.pt2e import AdaRoundQuantizer
from integration_tests.benchmarks import showcase
from integration_tests.benchmarks.executorch_backends import lowered
from integration_tests.benchmarks.vendor_quantizers import VENDORS, calibrated, samples
from integration_tests.models import QUICK


@pytest.mark.parametrize("suffix", ["pte", "onnx"])
def test_files_read_as_the_converted_model(suffix, tmp_path: Path):
    data = samples(count=2)
    prepared = calibrated("XNNPACK", AdaRoundQuantizer(VENDORS["XNNPACK"](), weight_bits=4), data)
    model = convert_pt2e(adaround(prepared, data, QUICK, integer_biases=True, progress=False))
    file = tmp_path / f"model.{suffix}"
    if suffix == "pte":
        file.write_bytes(lowered(widen_weight_ranges(model, 4), data[0]))
        reader = showcase.pte_reader(file)
    else:
        file.write_bytes(showcase.to_onnx(model, data[0]))
        reader = showcase.onnx_reader(file)
    first, second = reader(data[0]), reader(data[1])
    for found, batch in ((first, data[0]), (second, data[1])):
        expected = model(batch)
        # another order of sums moves an activation by a step, rarely
        assert (found - expected).abs().max() < 0.05 * expected.abs().max()
        assert (found - expected).abs().mean() < 1e-3 * expected.abs().max()


def test_the_picture_shows_right_and_wrong(tmp_path: Path):
    images = torch.zeros(2, 3, 48, 320)
    images[:, :, :, :100] = 1.0
    file = tmp_path / "picture.png"
    showcase.draw(file, images, ["$one", "two"], {"float": ["$one", "two"], "nearest": ["", "tw"]})
    pixels = np.asarray(Image.open(file).convert("RGB")).astype(int)
    green = (pixels[..., 1] - pixels[..., 0] > 40) & (pixels[..., 1] - pixels[..., 2] > 40)
    red = pixels[..., 0] - pixels[..., 1] > 60
    left, right = np.split(np.arange(pixels.shape[1]), [int(pixels.shape[1] * 0.72)])
    assert green[:, left].any()
    assert red[:, right].any()
    assert not red[:, left].any()
    assert not green[:, right].any()
