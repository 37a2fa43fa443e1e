"""An exported program through Neural Compressor's own PT2E flow, with learned integers."""

from __future__ import annotations

import copy
import functools
from pathlib import Path

import pytest
import torch
from neural_compressor.torch.export import export
from neural_compressor.torch.quantization import (
    StaticQuantConfig,
    TuningConfig,
    autotune,
    convert,
    prepare,
    quantize,
)
from torch import Tensor, fx, nn
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import X86InductorQuantizer

from adaround_plugin import get_report
from adaround_plugin.errors import InvalidBatchError, InvalidModelError, InvalidOptionError
from adaround_plugin.hosts.pt2e import get_adaround_x86_inductor_config
from adaround_plugin.inc import AdaRoundConfig
from integration_tests.inc_models import RECIPE, calibrate, data, network, run_afresh
from integration_tests.models import assert_unchanged, learn, snapshot

NAMES = ["0.0", "3", "5"]


@functools.cache
def _exported() -> fx.GraphModule:
    return export(network(), (data()[0],))


def program() -> fx.GraphModule:
    """The exported `network`, as INC exports it; its transposed convolution stays float in torchao."""
    copied = copy.deepcopy(_exported())
    # a copy loses what INC's export leaves in a program
    vars(copied).update(_exported=True, dynamic_shapes=None)
    return copied


def weights(model: nn.Module) -> dict[str, tuple[Tensor, int, int]]:
    """Integers and range of each quantized weight of a converted program, by the parameter's name."""
    found = {}
    for node in model.graph.nodes:
        if "quantize_per_channel" in str(node.target) and "dequantize" not in str(node.target):
            values = [_attribute(model, arg.target) if isinstance(arg, fx.Node) else arg for arg in node.args]
            found[str(node.args[0].target)] = (node.target(*values), values[4], values[5])
    return found


def _attribute(model: nn.Module, target: str) -> Tensor:
    path, _, leaf = target.rpartition(".")
    return getattr(model.get_submodule(path), leaf).detach()


@functools.cache
def output_by_hand() -> Tensor:
    """What `network` with weights of 3 bits, through torchao's own flow, makes of the first batch."""
    prepared = prepare_pt2e(
        torch.export.export(network(), (data()[0],), strict=True).module(),
        X86InductorQuantizer().set_global(get_adaround_x86_inductor_config(3)),
    )
    calibrate(data())(prepared)
    return convert_pt2e(learn(prepared, data()), fold_quantize=False)(data()[0])


@pytest.mark.parametrize("entry", ["quantize", "prepare and convert"])
def test_it_is_what_the_pt2e_flow_gives(entry: str) -> None:
    model, batches = network(), data()
    before = snapshot(model)
    config = AdaRoundConfig(bits=3, **RECIPE)
    exported = export(model, (batches[0],))
    if entry == "quantize":
        quantized = quantize(exported, config, run_fn=calibrate(batches))
    else:
        prepared = prepare(exported, config)
        calibrate(batches)(prepared)
        quantized = convert(prepared, inplace=False)
    assert torch.equal(quantized(batches[0]), output_by_hand())
    assert [layer.name for layer in get_report(quantized).layers] == NAMES
    for integers, low, high in weights(quantized).values():
        assert (low, high) == (-4, 3)
        assert low <= int(integers.min())
        assert int(integers.max()) <= high
    assert_unchanged(before, model)


def test_parts_reach_their_layers() -> None:
    config = AdaRoundConfig(bits=3, **RECIPE).set_local("0", AdaRoundConfig(bits=8))
    config.set_local("3", AdaRoundConfig(dtype="fp32"))
    quantized = quantize(program(), config, run_fn=calibrate(data()))
    assert {layer.name: layer.bits for layer in get_report(quantized).layers} == {"0.0": 8, "5": 3}
    assert {name: high for name, (_, _, high) in weights(quantized).items()} == {"0.0.weight": 127, "5.weight": 3}


class Residual(nn.Module):
    """Operators that torchao quantizes together: a convolution with a sum and a ReLU, and pooling behind them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(2))
        self.head = nn.Linear(27, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        x = torch.max_pool2d(torch.relu(self.second(x) + x), 2)
        return self.head(x.flatten(1))


def test_operators_are_quantized_together_as_the_pt2e_flow_does() -> None:
    torch.manual_seed(0)
    model, batches = Residual().eval(), [torch.rand(6, 3, 6, 6) for _ in range(2)]
    quantizer = X86InductorQuantizer().set_global(get_adaround_x86_inductor_config(4))
    prepared = prepare_pt2e(torch.export.export(model, (batches[0],), strict=True).module(), quantizer)
    calibrate(batches)(prepared)
    expected = convert_pt2e(learn(prepared, batches), fold_quantize=False)(batches[0])
    config = AdaRoundConfig(bits=4, **RECIPE)
    quantized = quantize(export(model, (batches[0],)), config, run_fn=calibrate(batches))
    assert torch.equal(quantized(batches[0]), expected)
    config.set_local("head", AdaRoundConfig(bits=8))
    mixed = quantize(export(model, (batches[0],)), config, run_fn=calibrate(batches))
    assert {layer.name: layer.bits for layer in get_report(mixed).layers} == {"first": 4, "second": 4, "head": 8}


def test_a_white_list_of_types_leaves_the_rest_in_float() -> None:
    config = AdaRoundConfig(bits=2, white_list=[nn.Linear], **RECIPE)
    quantized = quantize(program(), config, run_fn=calibrate(data()))
    assert [layer.name for layer in get_report(quantized).layers] == ["3", "5"]
    with pytest.raises(InvalidOptionError, match="no layer is a Conv3d"):
        quantize(program(), AdaRoundConfig(white_list=[nn.Conv3d]), run_fn=calibrate(data()))


def test_adaround_by_hand_between_prepare_and_convert_of_inc() -> None:
    batches = data()
    prepared = prepare(program(), StaticQuantConfig())
    calibrate(batches)(prepared)
    # in place: a copy of a prepared model lacks the attributes that INC's convert reads
    quantized = convert(learn(prepared, batches, inplace=True))
    report = get_report(quantized)
    assert [(layer.name, layer.bits) for layer in report.layers] == [(name, 8) for name in NAMES]
    assert all(layer.learned_error <= layer.nearest_error for layer in report.layers if layer.learned)


def test_the_stock_load_returns_the_same_program_in_a_fresh_process(tmp_path: Path) -> None:
    """Exported for batches of any size, which a copy of the prepared model must not forget."""
    shapes = {"input": {0: torch.export.Dim("batch", min=2, max=64)}}
    prepared = prepare(export(network(), (data()[0],), shapes), AdaRoundConfig(bits=3, **RECIPE))
    calibrate(data())(prepared)
    quantized = convert(prepared, inplace=False)
    x = torch.cat(data())
    quantized.save(example_inputs=(data()[0],), output_dir=str(tmp_path))
    torch.save({"x": x, "expected": quantized(x)}, tmp_path / "case.pt")
    run_afresh(
        "from neural_compressor.torch.quantization import load\n"
        "case = torch.load(f'{folder}/case.pt')\n"
        "assert torch.equal(load(folder)(case['x']), case['expected'])\n"
        "assert not [name for name in sys.modules if name.startswith('adaround_plugin')]\n",
        tmp_path,
    )


def test_autotune_tries_it_beside_configurations_of_inc() -> None:
    expected = network()(data()[0])

    def score(model: nn.Module) -> float:
        with torch.no_grad():
            return 1 - float((model(data()[0]) - expected).norm() / expected.norm())

    configs = [AdaRoundConfig(bits=[2, 8], **RECIPE), StaticQuantConfig()]
    quantized = autotune(program(), TuningConfig(configs, tolerable_loss=0.02), eval_fn=score, run_fn=calibrate(data()))
    assert {layer.bits for layer in get_report(quantized).layers} == {8}


def test_a_program_of_torch_export_will_do() -> None:
    """Without the mark that INC's export puts on a program, INC's own configurations fail."""
    exported = torch.export.export(network(), (data()[0],), strict=True).module()
    quantized = quantize(exported, AdaRoundConfig(bits=3, **RECIPE), run_fn=calibrate(data()))
    assert torch.equal(quantized(data()[0]), output_by_hand())


def test_what_the_flow_does_not_take_is_refused() -> None:
    with pytest.raises(InvalidOptionError, match="use_sym"):
        quantize(program(), AdaRoundConfig(use_sym=False), run_fn=calibrate(data()))
    with pytest.raises(InvalidBatchError, match="run_fn"):
        quantize(program(), AdaRoundConfig())
    with pytest.raises(InvalidModelError, match="Call prepare first"):
        convert(program(), AdaRoundConfig())


def test_an_exported_program_object_is_refused() -> None:
    exported = torch.export.export(network(), (data()[0],), strict=True)
    with pytest.raises(InvalidModelError, match=r"\.module\(\)"):
        quantize(exported, AdaRoundConfig(), run_fn=calibrate(data()))
