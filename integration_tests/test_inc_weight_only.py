"""An eager model with its linear layers packed by Neural Compressor, holding learned integers."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from neural_compressor.torch.algorithms.weight_only.modules import INCWeightOnlyLinear
from neural_compressor.torch.export import export
from neural_compressor.torch.quantization import (
    RTNConfig,
    TuningConfig,
    autotune,
    convert,
    prepare,
    quantize,
)
from torch import Tensor, nn
from torchao.quantization.pt2e.quantize_pt2e import prepare_pt2e

from adaround_plugin import get_report
from adaround_plugin.errors import InvalidBatchError, InvalidModelError, InvalidOptionError
from adaround_plugin.hosts.learned import learned_weights
from adaround_plugin.hosts.pt2e import AdaRoundWeightOnlyQuantizer
from adaround_plugin.inc import AdaRoundConfig
from integration_tests.inc_models import RECIPE, Tokens, calibrate, run_afresh
from integration_tests.models import assert_unchanged, learn, snapshot

OPTIONS: dict[str, Any] = {"act_dtype": "fp32", **RECIPE}


class Untied(nn.Module):
    """Two linear layers on inputs with strongly correlated columns, where rounding can be learned."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(5)
            self.first, self.second = nn.Linear(32, 48), nn.Linear(48, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x)))


def tokens() -> list[tuple[Tensor, Tensor]]:
    """Ids and masks, of several batch sizes and lengths."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((6, 7), (4, 7), (6, 9))
    return [(torch.randint(0, 24, shape, generator=generator), torch.ones(shape)) for shape in shapes]


def run_tokens(model: nn.Module) -> None:
    """Calls with positional and keyword arguments."""
    for ids, mask in tokens():
        model(ids, mask=mask)


def rows(count: int, seed: int) -> Tensor:
    """Correlated inputs for `Untied`."""
    basis = torch.randn(8, 32, generator=torch.Generator().manual_seed(9))
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 8, generator=generator) @ basis + 0.1 * torch.randn(count, 32, generator=generator)


CALIBRATION = [rows(64, seed) for seed in range(4)]


def error(model: nn.Module) -> float:
    """Relative error of the output on inputs that nobody has seen."""
    with torch.no_grad():
        expected = Untied()(rows(256, 99))
        return float((model(rows(256, 99)) - expected).norm() / expected.norm())


@pytest.mark.parametrize(("symmetric", "group_size"), [(True, -1), (False, 8)])
def test_packed_layers_hold_the_integers_that_were_learned(symmetric: bool, group_size: int) -> None:
    config = AdaRoundConfig(bits=3, use_sym=symmetric, group_size=group_size, **OPTIONS)
    quantized = quantize(Untied().eval(), config, run_fn=calibrate(CALIBRATION))
    program = torch.export.export(Untied().eval(), (CALIBRATION[0],), strict=True).module()
    size = None if group_size == -1 else group_size
    quantizer = AdaRoundWeightOnlyQuantizer(
        weight_bits=3, symmetric=symmetric, group_size=size, scale_dtype=torch.float16
    )
    prepared = prepare_pt2e(program, quantizer)
    prepared(CALIBRATION[0])
    expected = learned_weights(learn(prepared, CALIBRATION))
    assert list(expected) == ["first", "second"]
    for name, (integers, grid) in expected.items():
        packed = quantized.get_submodule(name)
        unpacked = packed.unpack()
        assert torch.equal(unpacked["int_weight"].long() - 4, integers)
        assert torch.equal(unpacked["scales"].float().flatten(), grid.scale)
        assert torch.equal(unpacked["zp"].long().flatten() - 4, grid.zero_point)
        assert torch.equal(packed.recover().float(), grid.dequantize(integers).half().float())


def test_it_beats_the_round_to_nearest_of_inc() -> None:
    settings = {"bits": 3, "use_sym": False, "group_size": 8}
    learned = quantize(Untied().eval(), AdaRoundConfig(act_dtype="fp32", **settings), run_fn=calibrate(CALIBRATION))
    nearest = quantize(Untied().eval(), RTNConfig(use_layer_wise=False, **settings))
    assert error(learned) < 0.5 * error(nearest)


def test_tied_weights_keywords_and_lengths_that_vary() -> None:
    model = Tokens().eval()
    config = AdaRoundConfig(bits=4, group_size=8, **OPTIONS).set_local("down", AdaRoundConfig(bits=8))
    quantized = quantize(model, config, run_fn=run_tokens)
    assert quantized is model
    packed = {name: module.bits for name, module in model.named_modules() if isinstance(module, INCWeightOnlyLinear)}
    assert packed == {"up": 4, "twin": 4, "down": 8, "head": 4}
    assert torch.equal(model.up.unpack()["int_weight"], model.twin.unpack()["int_weight"])
    report = get_report(quantized)
    assert ("mix", "Conv1d") in [(name, kind) for name, kind, _ in report.skipped]
    assert get_report(copy.deepcopy(quantized)) == report
    # the embedding is as it was
    assert_unchanged(snapshot(Tokens().embedding), model.embedding)
    x = tokens()[2]
    with torch.no_grad():
        expected, found = Tokens()(*x), model(*x)
    assert float((found - expected).norm() / expected.norm()) < 0.1


def test_a_fresh_process_loads_the_same_model_by_the_stock_load(tmp_path: Path) -> None:
    config = AdaRoundConfig(bits=4, group_size=8, **OPTIONS).set_local("down", AdaRoundConfig(bits=2))
    config.set_local("head", AdaRoundConfig(dtype="fp32"))
    quantized = quantize(Tokens().eval(), config, run_fn=run_tokens)
    quantized.save(str(tmp_path))
    torch.save({"x": tokens()[2], "expected": quantized(*tokens()[2])}, tmp_path / "case.pt")
    run_afresh(
        "from neural_compressor.torch.quantization import load\n"
        "from integration_tests.inc_models import Tokens\n"
        "case = torch.load(f'{folder}/case.pt')\n"
        "model = load(folder, original_model=Tokens().eval())\n"
        "assert torch.equal(model(*case['x']), case['expected'])\n"
        "assert type(model.head) is torch.nn.Linear\n",
        tmp_path,
    )


def test_converting_a_copy_keeps_the_float_model() -> None:
    model = Untied().eval()
    before = snapshot(model)
    prepared = prepare(model, AdaRoundConfig(**OPTIONS))
    calibrate(CALIBRATION)(prepared)
    copied = convert(prepared, inplace=False)
    assert_unchanged(before, model)
    quantized = convert(prepared)
    assert quantized is model
    assert torch.equal(copied(CALIBRATION[0]), quantized(CALIBRATION[0]))
    # it records no more
    assert not quantized._forward_pre_hooks
    assert not copied._forward_pre_hooks


def test_autotune_chooses_among_weight_only_algorithms() -> None:
    configs = [
        RTNConfig(bits=2, group_size=-1, use_layer_wise=False),
        AdaRoundConfig(bits=[2, 4], **OPTIONS),
        RTNConfig(bits=8, group_size=-1, use_layer_wise=False),
    ]
    tuning = TuningConfig(configs, tolerable_loss=0.1)
    best = autotune(Untied().eval(), tuning, eval_fn=lambda model: 1 - error(model), run_fn=calibrate(CALIBRATION))
    assert {layer.bits for layer in get_report(best).layers} == {4}


def test_an_exported_program_gets_quantize_and_dequantize_operators() -> None:
    config = AdaRoundConfig(bits=3, use_sym=False, group_size=8, white_list=["first"], **OPTIONS)
    program = export(Untied(), (CALIBRATION[0],))
    quantized = quantize(program, config, run_fn=calibrate(CALIBRATION))
    packed = quantize(Untied().eval(), config, run_fn=calibrate(CALIBRATION))
    assert [layer.name for layer in get_report(quantized).layers] == ["first"]
    # INC's packed layers round the product of integer and scale, and the bias, to float16
    torch.testing.assert_close(quantized(CALIBRATION[0]), packed(CALIBRATION[0]), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"bits": 8, "use_sym": False}, "overflow"),
        ({"white_list": [nn.Conv1d]}, "no layer is a Conv1d"),
        ({"white_list": ["mix"]}, "'mix' matches none"),
        ({"group_size": 8, "w_granularity": "per_tensor"}, "group_size"),
    ],
)
def test_what_the_layers_cannot_hold_is_refused(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(InvalidOptionError, match=reason):
        quantize(Tokens().eval(), AdaRoundConfig(**options, **OPTIONS), run_fn=run_tokens)


def test_groups_need_float_activations_and_whole_rows() -> None:
    with pytest.raises(InvalidOptionError, match="group_size"):
        quantize(Untied().eval(), AdaRoundConfig(group_size=8), run_fn=calibrate(CALIBRATION))
    with pytest.raises(InvalidModelError, match=r"first.*group_size 7"):
        quantize(Untied().eval(), AdaRoundConfig(group_size=7, **OPTIONS), run_fn=calibrate(CALIBRATION))


class Branching(nn.Module):
    """Control flow that depends on the data."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) if float(x.sum()) > 0 else x


def test_models_that_cannot_be_used_are_refused() -> None:
    with pytest.raises(InvalidModelError, match=r"torch\.export fails"):
        quantize(Branching().eval(), AdaRoundConfig(**OPTIONS), run_fn=calibrate(CALIBRATION))
    with pytest.raises(InvalidModelError, match="train mode"):
        quantize(Untied().train(), AdaRoundConfig(**OPTIONS), run_fn=calibrate(CALIBRATION))
    with pytest.raises(InvalidBatchError, match="run_fn"):
        quantize(Untied().eval(), AdaRoundConfig(**OPTIONS))
    with pytest.raises(InvalidModelError, match="Call prepare first"):
        convert(Untied().eval(), AdaRoundConfig(**OPTIONS))


def test_a_second_attempt_begins_anew() -> None:
    """What an attempt that failed has hung into the caller's model is gone, and so is what it saw."""

    def fail(model: nn.Module) -> None:
        model(CALIBRATION[0])
        raise RuntimeError("no more data")

    model, other = Untied().eval(), Untied().eval()
    for failing, error in ((fail, RuntimeError), (lambda _: None, InvalidBatchError)):
        with pytest.raises(error):
            quantize(model, AdaRoundConfig(**OPTIONS), run_fn=failing)
        assert not model._forward_pre_hooks
    packed = quantize(model, AdaRoundConfig(**OPTIONS), run_fn=calibrate(CALIBRATION))
    once = quantize(other, AdaRoundConfig(**OPTIONS), run_fn=calibrate(CALIBRATION))
    assert not packed._forward_pre_hooks
    assert torch.equal(packed(CALIBRATION[0]), once(CALIBRATION[0]))


class Convolved(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.linear = nn.Conv1d(32, 32, 1), nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(torch.relu(self.conv(x.unsqueeze(2)).squeeze(2)))


def test_a_second_attempt_with_activations_sees_all_layers() -> None:
    model = Convolved().eval()
    with pytest.raises(ZeroDivisionError):
        quantize(model, AdaRoundConfig(**OPTIONS), run_fn=lambda _: 1 / 0)
    config = AdaRoundConfig(**RECIPE)
    config.set_local("conv", AdaRoundConfig(bits=8))
    report = get_report(quantize(model, config, run_fn=calibrate(CALIBRATION)))
    assert {layer.name: layer.bits for layer in report.layers} == {"conv": 8, "linear": 4}


class Writing(Untied):
    """Shifts its inputs in place."""

    def forward(self, x: Tensor) -> Tensor:
        x.sub_(0.5)
        return super().forward(x)


class Shifting(Untied):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x - 0.5)


def test_a_model_that_writes_to_its_inputs_learns_from_what_came() -> None:
    config = AdaRoundConfig(bits=3, **OPTIONS)
    one, other = (
        quantize(kind().eval(), config, run_fn=calibrate([batch.clone() for batch in CALIBRATION[:1]]))
        for kind in (Writing, Shifting)
    )
    assert get_report(one).output_error == pytest.approx(get_report(other).output_error)
    for name, value in other.state_dict().items():
        assert torch.equal(one.state_dict()[name], value)


class Gained(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


@pytest.mark.parametrize("blocks", [None, "blocks"])
def test_a_batch_norm_that_would_be_applied_twice_is_refused(blocks: str | None) -> None:
    """`prepare_pt2e` folds it into the linear layer before it, and the packed model still has it."""
    block = nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16), nn.ReLU())
    nn.init.uniform_(block[1].weight, 0.5, 2)
    model = Listed(block).eval()
    before = snapshot(model)
    with pytest.raises(InvalidModelError, match="took in a batch norm"):
        quantize(model, AdaRoundConfig(blocks=blocks, **OPTIONS), run_fn=lambda run: run(torch.randn(8, 16)))
    assert_unchanged(before, model)


class Listed(nn.Module):
    """Blocks in a list."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def test_a_layer_that_computes_more_than_packed_ones_stays_in_float() -> None:
    model = Untied().eval()
    model.first = Gained(32, 48)
    expected = copy.deepcopy(model.first)
    packed: Any = quantize(model, AdaRoundConfig(**OPTIONS), run_fn=calibrate(CALIBRATION))
    report = get_report(packed)
    assert [layer.name for layer in report.layers] == ["second"]
    assert [name for name, _, _ in report.skipped] == ["first"]
    assert torch.equal(packed.first(CALIBRATION[0]), expected(CALIBRATION[0]))


class Twins(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.twin = nn.Linear(32, 32), nn.Linear(32, 32)
        self.twin.weight = self.up.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.twin(torch.relu(self.up(x)))


def test_layers_that_share_a_weight_share_their_part() -> None:
    config = AdaRoundConfig(bits=4, **OPTIONS)
    assert len(get_report(quantize(Twins().eval(), config, run_fn=calibrate(CALIBRATION))).layers) == 1
    config.set_local("twin", AdaRoundConfig(bits=8))
    with pytest.raises(InvalidOptionError, match=r"layers 'up' and 'twin': share a weight"):
        quantize(Twins().eval(), config, run_fn=calibrate(CALIBRATION))


class Wrapped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Convolved()

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        return self.inner(*args) * kwargs["scale"]


def test_inputs_without_a_name_beside_others_with_one_are_refused() -> None:
    def run(model: nn.Module) -> None:
        model(CALIBRATION[0], scale=torch.ones(1))

    with pytest.raises(InvalidBatchError, match=r"both inputs by name and inputs .*\*args"):
        quantize(Wrapped().eval(), AdaRoundConfig(**OPTIONS), run_fn=run)


@pytest.mark.parametrize("options", [OPTIONS, RECIPE], ids=["packed", "integer kernels"])
def test_an_interrupted_convert_can_be_called_again(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    config = AdaRoundConfig(**options)
    prepared = prepare(Untied().eval(), config)
    calibrate(CALIBRATION)(prepared)

    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("adaround_plugin.inc.weight_only.adaround", stop)
        patch.setattr("adaround_plugin.inc.native.adaround", stop)
        with pytest.raises(KeyboardInterrupt):
            convert(prepared)
    prepared(CALIBRATION[0])  # is not recorded any more
    expected = quantize(Untied().eval(), config, run_fn=calibrate(CALIBRATION))
    assert get_report(convert(prepared)).output_error == get_report(expected).output_error
