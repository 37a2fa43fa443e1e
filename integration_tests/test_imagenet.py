"""The experiment on ImageNet and VOC on tiny generated folders and random weights: every topology, resuming, table."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.ao.quantization.quantize_fx import convert_to_reference_fx

from adaround_plugin import METHODS, InvalidOptionError, LayerWise, Paper, adaround, get_report
from adaround_plugin.hosts import weight_observers
from adaround_plugin.learning.methods import Preset
from adaround_plugin.rounding.ranges import min_max_grid
from integration_tests.benchmarks import deeplab
from integration_tests.benchmarks.imagenet import Bench, Experiment, main, run
from integration_tests.benchmarks.imagenet_data import VOC, Preprocessing, draw, image_folder, loader, mean_iou
from integration_tests.benchmarks.imagenet_models import TOPOLOGIES, Topology, load
from integration_tests.benchmarks.imagenet_results import FLOAT, PAPER, Results, table
from integration_tests.benchmarks.torchvision_cpu import models
from integration_tests.devices import every_device

CLASSES = 3
SIDE = 40

# a weight, and its classes' name, of each network's state dict; the side of images that its topology allows
_HEADS = {"mobilenet_v2": "classifier.1.weight", "deeplabv3plus": "decoder.classify.weight"}
_CROPS = {"inception_v3": 75, "deeplabv3plus": 33}
# the moments of a layer with long rows take seconds
_LONGEST_ROWS = {"resnet18": 600}


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ImageNet's layout: 3 classes of 4 images, to train and to validate."""
    root = tmp_path_factory.mktemp("imagenet")
    generator = np.random.default_rng(0)
    for split in ("train", "val"):
        for index in range(CLASSES):
            folder = root / split / f"n{index}"
            folder.mkdir(parents=True)
            for image in range(4):
                pixels = generator.integers(0, 256, (SIDE, SIDE + 6, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{image}.JPEG")
    return root


@pytest.fixture(scope="module")
def voc(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """VOC's layout: 6 images of noise to train and to validate, masks with a palette and void."""
    root = tmp_path_factory.mktemp("voc")
    generator = np.random.default_rng(0)
    for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (root / folder).mkdir(parents=True)
    for split in ("train", "val"):
        names = [f"{split}_{index}" for index in range(6)]
        (root / "ImageSets" / "Segmentation" / f"{split}.txt").write_text("\n".join(names) + "\n")
        for name in names:
            pixels = generator.integers(0, 256, (SIDE, SIDE + 6, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / "JPEGImages" / f"{name}.jpg")
            mask = Image.fromarray(generator.choice([*range(21), 255], (SIDE, SIDE + 6)).astype(np.uint8))
            mask.putpalette(generator.integers(0, 256, 768, dtype=np.uint8).tobytes())
            mask.save(root / "SegmentationClass" / f"{name}.png")
    return root


def _saved(name: str, folder: Path, classes: int = CLASSES) -> Path:
    """Random weights of the network in a file."""
    file = folder / f"{name}.pt"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network, _ = TOPOLOGIES[name].build({_HEADS.get(name, "fc.weight"): torch.empty(classes)})
    torch.save(network.state_dict(), file)
    return file


@every_device
@pytest.mark.parametrize("name", list(TOPOLOGIES))
def test_topology_is_prepared_learned_and_converted(
    name: str, device: str, imagenet: Path, voc: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # the search for the scale of tens of millions of weights takes most of the time, and is tested elsewhere
    monkeypatch.setitem(weight_observers._GRID_OF, "mse", min_max_grid)
    segments = TOPOLOGIES[name].segments
    file = _saved(name, tmp_path, 21 if segments else CLASSES)
    data = voc if segments else imagenet
    experiment = Experiment(name, data, file, crop=_CROPS.get(name, 32), workers=0, images=6, batch=6, device=device)
    bench = Bench(experiment)
    weighted = {n: m for n, m in bench.network.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    long = [n for n, module in weighted.items() if module.weight[0].numel() > _LONGEST_ROWS.get(name, 200)]
    batches = bench.calibration(seed=0)
    prepared = bench.prepare("W4A8", batches)
    method = Paper(iterations=10, learning_rate=0.01, batch_size=4, max_columns=16)
    learned = adaround(prepared, batches, method, exclude=long, progress=False)
    report = get_report(learned)
    skipped = {n for n, _, reason in report.skipped if "excluded" in reason}
    assert {layer.name for layer in report.layers} | skipped == set(weighted)
    assert len(report.layers) == len(weighted) - len(long) >= 6
    assert any(layer.flipped > 0 for layer in report.layers)
    converted = convert_to_reference_fx(learned)
    integers = {n: m.get_quantized_weight().int_repr() for n, m in converted.named_modules() if _is_reference(m)}
    assert len(integers) == len(weighted)
    assert all(int(q.min()) >= -8 and int(q.max()) <= 7 for q in integers.values())
    assert 0 <= bench.score(converted) <= 100


def _is_reference(module: nn.Module) -> bool:
    return hasattr(module, "get_quantized_weight")


# --- results: resuming, refusing, the table


def _tiny(state: Mapping[str, Tensor]) -> tuple[nn.Module, dict[str, Tensor]]:
    layers = [nn.Conv2d(3, 4, 3, 2, bias=False), nn.BatchNorm2d(4), nn.ReLU6(), nn.Conv2d(4, 4, 3), nn.ReLU6()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, CLASSES)), dict(state)


@pytest.fixture
def tiny(imagenet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Experiment:
    """An experiment on a network of three layers, which the catalogue holds for the time of the test."""
    monkeypatch.setitem(TOPOLOGIES, "tiny", Topology("Tiny", _tiny, Preprocessing(24, 20), None))
    network, _ = _tiny({})
    torch.save(network.state_dict(), tmp_path / "tiny.pt")
    return Experiment("tiny", imagenet, tmp_path / "tiny.pt", images=8, workers=0, options={"progress": False})


# nothing left open, so nothing to try
_GPTQ = LayerWise(solver="gptq", propagate_error=True, correct_bias=True, column_weighting="none", damping=0.1)
_CHEAP = {"nearest": METHODS["nearest"], "default": Preset(_GPTQ)}


def test_a_second_run_computes_nothing(tiny: Experiment, tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    run(tiny, Results(path), ["W4A32", "W4A8"], _CHEAP, seeds=[0, 1])
    text = path.read_text()
    assert len(text.splitlines()) == 1 + 2 * 2 * 2
    # there is nothing left to compute with
    run(replace(tiny, data=tmp_path / "nowhere"), Results(path), ["W4A32", "W4A8"], _CHEAP, seeds=[0, 1])
    assert path.read_text() == text


def test_an_interrupted_run_goes_on_to_the_same_results(tiny: Experiment, tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    run(tiny, Results(whole), ["W4A32", "W2A32"], _CHEAP)
    lines = whole.read_text().splitlines(keepends=True)
    # stopped in the middle of writing the third result
    cut.write_text("".join(lines[:2]) + lines[2][:17])
    run(tiny, Results(cut), ["W4A32", "W2A32"], _CHEAP)
    resumed = [json.loads(line) for line in cut.read_text().splitlines()]
    expected = [json.loads(line) for line in lines]
    for one, other in zip(resumed, expected, strict=True):
        assert {**one, "seconds": 0} == {**other, "seconds": 0}
    assert cut.read_text().startswith("".join(lines[:2]))


def test_another_setting_is_refused(tiny: Experiment, tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    run(tiny, Results(path), ["W4A32"], {"nearest": _CHEAP["nearest"]})
    text = path.read_text()
    for changed in (replace(tiny, images=4), replace(tiny, per_channel=True), replace(tiny, equalize="cap")):
        with pytest.raises(InvalidOptionError, match=r"instead of.*Name another file"):
            run(changed, Results(path), ["W4A32"], _CHEAP)
    network, _ = _tiny({})
    torch.save(network.state_dict(), tmp_path / "tiny.pt")
    with pytest.raises(InvalidOptionError, match="weights 'sha256"):
        run(tiny, Results(path), ["W4A32"], _CHEAP)
    assert path.read_text() == text


@pytest.mark.parametrize("line", ["{", "[]", '{"network": "resnet18"}', "1"])
def test_a_file_of_something_else_is_refused(line: str, tmp_path: Path) -> None:
    path = tmp_path / "other"
    path.write_text(line + "\n")
    with pytest.raises(InvalidOptionError, match=r"line 1, is no result"):
        Results(path)
    assert path.read_text() == line + "\n"


@pytest.mark.parametrize("equalize", ["cap", "replace"])
def test_equalized_network_is_quantized_and_the_float_one_scored(equalize: Any, tiny: Experiment) -> None:
    equalized = Bench(replace(tiny, equalize=equalize))
    plain = Bench(tiny)
    batches = plain.calibration(0)
    weights = [bench.prepare("W4A32", batches).get_submodule("7").weight for bench in (plain, equalized)]
    assert not torch.allclose(*weights)
    for one, other in zip(plain.network.parameters(), equalized.network.parameters(), strict=True):
        assert torch.equal(one, other)
    assert plain.score(plain.network) == equalized.score(equalized.network)


def test_iterations_and_seed_reach_the_methods(tiny: Experiment) -> None:
    short = replace(tiny, iterations=7)
    for preset in METHODS.values():
        assert tiny.arguments(preset, seed=3) == {"progress": False, "method": preset, "seed": 3}
        method = replace(preset.method, iterations=7) if hasattr(preset.method, "iterations") else preset.method
        expected = {"progress": False, "method": Preset(method, preset.finetune), "seed": 3}
        assert short.arguments(preset, seed=3) == expected


def test_table_has_means_losses_and_the_papers_figures() -> None:
    def entry(mode: str, method: str, seed: int, score: float, network: str = "resnet18") -> dict[str, Any]:
        return {"network": network, "mode": mode, "method": method, "seed": seed, "score": score, "seconds": 10 * seed}

    entries = [
        entry(*FLOAT, 0, 70.0),
        entry("W4A32", "nearest", 0, 20.0),
        entry("W4A32", "paper", 1, 68.0),
        entry("W4A32", "paper", 2, 69.0),
        entry("W3A32", "default", 0, 60.0),
        entry("W4A8", "blocks", 0, 65.0, "deeplabv3plus"),
    ]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table(entries).splitlines()]
    assert rows[0][3:6] == ["score %", "loss", "the paper's %"]
    assert rows[2:] == [
        ["ResNet-18", "W32A32", "float", "70.00", "-", "69.68", "1", "0"],
        ["ResNet-18", "W4A32", "nearest", "20.00", "50.00", "23.99", "1", "0"],
        ["ResNet-18", "W4A32", "paper", "68.50 ± 0.71", "1.50", "68.71 ± 0.06", "2", "15"],
        ["ResNet-18", "W3A32", "default", "60.00", "10.00", "-", "1", "0"],
        ["DeepLabV3+ MobileNetV2", "W4A8", "blocks", "65.00", "-", "70.86", "1", "0"],
    ]
    assert {network for network, _, _ in PAPER} == set(TOPOLOGIES)


def test_command_line_writes_the_table(tiny: Experiment, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["tiny", "--state-dict", str(tiny.state_dict), "--results", str(tmp_path / "r"), "--workers", "0"]
    chosen = ["--modes", "W4A32", "--methods", "nearest", "--images", "4", "--subset", "5"]
    main([*common, "--data", str(tiny.data), *chosen])
    assert "| Tiny | W4A32 | nearest |" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main([*common, "--data", str(tiny.data), *chosen[:-1], "6"])
    assert "subset 5 instead of 6" in capsys.readouterr().err


# --- data


def test_calibration_images_are_drawn_by_their_own_generator(imagenet: Path) -> None:
    data = image_folder(imagenet, "train", Preprocessing(24, 20))
    state = torch.get_rng_state()
    first, again, other = (torch.cat(draw(data, 9, seed, batch_size=4)) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert first.shape == (9, 3, 20, 20)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert len({image.numpy().tobytes() for image in first}) == 9


def test_preprocessing_of_inception_is_what_torchvision_does_in_the_graph() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    usual = replace(
        TOPOLOGIES["inception_v3"].preprocessing, mean=Preprocessing(1, 1).mean, std=Preprocessing(1, 1).std
    )
    rescaled = models.Inception3._transform_input(SimpleNamespace(transform_input=True), usual.image(image)[None])[0]
    torch.testing.assert_close(TOPOLOGIES["inception_v3"].preprocessing.image(image), rescaled)


@pytest.mark.parametrize("size", [(40, 64), (64, 40), (23, 31)])
def test_mask_and_image_keep_to_each_other(size: tuple[int, int]) -> None:
    classes = np.zeros(size[::-1], dtype=np.uint8)
    classes[: size[1] // 2, : size[0] // 3] = 255
    preprocessing = Preprocessing(32, 28, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    mask = preprocessing.mask(Image.fromarray(classes))
    image = preprocessing.image(Image.fromarray(np.repeat(classes[..., None], 3, 2)))
    assert mask.shape == image.shape[1:] == (28, 28)
    assert set(mask.unique().tolist()) == {0, 255}
    # apart from the edge, which one of the two blurs
    assert ((image[0] > 0.5) == (mask == 255)).float().mean() > 0.9


def test_mean_iou_agrees_with_counting_pixels() -> None:
    generator = torch.Generator().manual_seed(0)
    classes = 5
    # class 4 is in neither; 3 is predicted only
    labels = torch.randint(0, 3, (6, 7, 8), generator=generator)
    labels[torch.rand(labels.shape, generator=generator) < 0.2] = 255
    logits = torch.randn(6, classes, 7, 8, generator=generator)
    logits[:, 4] = -100

    predicted = logits.argmax(1)
    ratios = []
    for index in range(4):
        both = either = 0
        for guess, truth in zip(predicted.flatten().tolist(), labels.flatten().tolist(), strict=True):
            if truth != 255:
                both += guess == index and truth == index
                either += index in (guess, truth)
        ratios.append(both / either)

    class Replay(nn.Module):
        def forward(self, index: Tensor) -> Tensor:
            return logits[index]

    batches = loader([(torch.tensor(i), labels[i]) for i in range(6)], batch_size=4)  # type: ignore[arg-type]
    assert mean_iou(Replay(), batches, classes) == pytest.approx(100 * sum(ratios) / 4)


# --- DeepLabV3+


def test_deeplab_has_output_stride_16_and_dilation_after_it() -> None:
    network = deeplab.DeepLabV3Plus().eval()
    with torch.no_grad():
        x = torch.zeros(1, 3, 65, 97)
        low_level = network.low_level(x)
        assert low_level.shape == (1, 24, 17, 25)
        assert network.high_level(low_level).shape == (1, 320, 5, 7)
        assert network(x).shape == (1, 21, 65, 97)
    depthwise = [m for m in network.high_level.modules() if isinstance(m, nn.Conv2d) and m.groups > 1]
    assert [m.stride[0] for m in depthwise].count(2) == 2
    assert [m.dilation[0] for m in depthwise] == [1] * 11 + [2] * 3
    rates = [m.dilation[0] for m in network.pyramid.modules() if isinstance(m, nn.Conv2d) and m.groups > 1]
    assert rates == [6, 12, 18]


def _port_name(name: str) -> list[str]:
    """The names that the public port has for a tensor of ours."""
    part, rest = name.split(".", 1)
    if part in ("low_level", "high_level"):
        index, inner = rest.split(".", 1)
        offset = 0 if part == "low_level" else 4
        return [f"backbone.{part}_features.{rest}", f"backbone.features.{int(index) + offset}.{inner}"]
    pieces = name.split(".")
    layer = {"0": "conv1", "1": "bn1"}
    if pieces[:2] == ["pyramid", "branches"]:
        return [f"aspp.aspp{int(pieces[2]) + 1}.{('atrous_conv', 'bn')[int(pieces[3])]}.{pieces[4]}"]
    if pieces[:2] == ["pyramid", "pool"]:
        return [f"aspp.global_avg_pool.{'.'.join(pieces[2:])}"]
    if pieces[1] in ("project", "reduce"):
        return [f"{'aspp' if part == 'pyramid' else 'decoder'}.{layer[pieces[2]]}.{pieces[3]}"]
    if pieces[1] == "refine":
        return [f"decoder.last_conv.{ {'0': 0, '1': 1, '3': 4, '4': 5}[pieces[2]] }.{pieces[3]}"]
    return [f"decoder.last_conv.8.{pieces[2]}"]


def test_checkpoint_of_the_public_port_is_read(tmp_path: Path) -> None:
    original = deeplab.DeepLabV3Plus(classes=4, port=True).eval()
    state = {other: value for name, value in original.state_dict().items() for other in _port_name(name)}
    assert "backbone.features.17.conv.7.weight" in state
    torch.save({"epoch": 3, "state_dict": state}, tmp_path / "port.pth")
    network, classes = load("deeplabv3plus", tmp_path / "port.pth")
    assert classes == 4
    x = torch.randn(1, 3, 33, 33)
    with torch.no_grad():
        assert torch.equal(network(x), original(x))


# --- bad input


def test_empty_folders_are_named(tmp_path: Path) -> None:
    preprocessing = Preprocessing(24, 20)
    with pytest.raises(InvalidOptionError, match=r"train has no images .*ImageNet's layout"):
        image_folder(tmp_path, "train", preprocessing)
    (tmp_path / "train" / "n0").mkdir(parents=True)
    with pytest.raises(InvalidOptionError, match=r"train has no images .*n0"):
        image_folder(tmp_path, "train", preprocessing)
    with pytest.raises(InvalidOptionError, match=r"val.txt names no images"):
        VOC(tmp_path, "val", preprocessing)


def test_a_missing_mask_is_named(voc: Path, tmp_path: Path) -> None:
    listing = tmp_path / "ImageSets" / "Segmentation" / "val.txt"
    listing.parent.mkdir(parents=True)
    listing.write_text("val_0\n")
    (tmp_path / "JPEGImages").symlink_to(voc / "JPEGImages")
    with pytest.raises(InvalidOptionError, match=r"SegmentationClass.val_0.png is missing"):
        VOC(tmp_path, "val", Preprocessing(24, 20))


def test_more_images_than_there_are(tiny: Experiment) -> None:
    with pytest.raises(InvalidOptionError, match="100 of 12 images"):
        Bench(replace(tiny, images=100)).calibration(0)
    with pytest.raises(InvalidOptionError, match="0 of 12 images"):
        Bench(replace(tiny, subset=0))


def test_weights_that_do_not_fit(tiny: Experiment, tmp_path: Path) -> None:
    file = tmp_path / "weights.pt"
    state = {**torch.load(tmp_path / "tiny.pt", weights_only=True)}
    torch.save({name: value for name, value in state.items() if name != "3.bias"}, file)
    with pytest.raises(InvalidOptionError, match=r'does not fit tiny .*"3.bias"'):
        load("tiny", file)
    torch.save({"state_dict": {"lr": 0.1}}, file)
    with pytest.raises(InvalidOptionError, match="holds no state dict"):
        load("tiny", file)
    torch.save(_tiny({})[0], file)
    with pytest.raises(InvalidOptionError, match="holds more than tensors"):
        load("tiny", file)
    file.write_text("nothing")
    with pytest.raises(InvalidOptionError, match="is damaged"):
        load("tiny", file)
    with pytest.raises(InvalidOptionError, match="is no file"):
        load("tiny", tmp_path / "absent.pt")
    with pytest.raises(InvalidOptionError, match=r"no weights of deeplabv3plus.*--state-dict"):
        load("deeplabv3plus", None)


def test_data_of_other_classes(tiny: Experiment, tmp_path: Path) -> None:
    for split in ("train", "val"):
        (tmp_path / split).mkdir()
        (tmp_path / split / "n0").symlink_to(tiny.data / split / "n0")
    with pytest.raises(InvalidOptionError, match="has 1 folders of classes, and the network 3"):
        Bench(replace(tiny, data=tmp_path))
