"""Interrupted in the middle: a model or a folder is written as a whole, or is as it was."""

from __future__ import annotations

import copy
import functools
import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from neural_compressor.torch import quantization as inc
from torch import nn
from torch.ao.quantization.quantize_fx import convert_to_reference_fx

from adaround_plugin import InvalidModelError, NonFiniteError, get_report
from adaround_plugin.hosts.fx import host as fx_host
from adaround_plugin.hosts.pt2e import host as pt2e_host
from adaround_plugin.inc import AdaRoundConfig, load, save
from adaround_plugin.paper.weights import round_weights
from integration_tests.inc_models import RECIPE, Layers, calibrate, data, network
from integration_tests.models import assert_unchanged, images, learn, prepared_net, snapshot
from integration_tests.pt2e_models import Unchanged, convert
from integration_tests.pt2e_models import prepared_net as prepared_pt2e_net

# torch's own warning while it saves and loads quantized tensors
pytestmark = pytest.mark.filterwarnings("ignore:TypedStorage is deprecated:UserWarning")


def interrupted(monkeypatch: pytest.MonkeyPatch, module: Any, name: str, error: BaseException, after: int = 1) -> None:
    """Let a function of a module raise after some calls, each of which does what it does."""
    plain, calls = getattr(module, name), []

    def write(*args: Any, **kwargs: Any) -> Any:
        calls.append(name)
        result = plain(*args, **kwargs)
        if len(calls) > after:
            raise error
        return result

    monkeypatch.setattr(module, name, write)


# --- models

HOSTS = {
    "fx": (lambda: prepared_net("Residual")[1:], fx_host),
    "pt2e": (lambda: prepared_pt2e_net("Residual"), pt2e_host),
}


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("full disk")], ids=["interrupt", "error"])
@pytest.mark.parametrize("after", [0, 1, 2])
@pytest.mark.parametrize("kind", HOSTS)
def test_a_model_is_as_it_was_where_writing_is_interrupted(kind, after, error, monkeypatch):
    make, host = HOSTS[kind]
    prepared, given = make()
    before, modules = Unchanged(prepared), dict(prepared.named_modules())
    expected = prepared(given[0])
    with monkeypatch.context() as patch:
        interrupted(patch, host, "_write", error, after)
        with pytest.raises(type(error)):
            learn(prepared, given, solver="nearest", inplace=True)
    before.check()
    assert dict(prepared.named_modules()) == modules
    assert torch.equal(prepared(given[0]), expected)
    # and it can be learned afterwards
    result = learn(prepared, given, solver="nearest", inplace=True)
    assert result is prepared
    assert get_report(prepared).layers


@pytest.mark.parametrize("kind", HOSTS)
def test_a_scheme_is_written_as_a_whole(kind, monkeypatch):
    make, host = HOSTS[kind]
    prepared, _ = make()
    before = Unchanged(prepared)
    with monkeypatch.context() as patch:
        interrupted(patch, host, "_write", KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            round_weights(prepared, "floor", inplace=True)
    before.check()


def test_what_is_changed_in_place_keeps_hooks_and_what_no_node_reads():
    _, prepared, given = prepared_net("Residual")
    seen, prepared.meta["note"] = [], object()
    note = prepared.meta["note"]
    prepared.register_forward_pre_hook(lambda module, args: seen.append(module))
    prepared.extra, prepared.note = nn.Linear(2, 2), "mine"
    extra = prepared.extra
    learn(prepared, given, inplace=True)
    seen.clear()
    prepared(given[0])
    assert seen == [prepared]
    assert torch.equal(prepared.extra.weight, extra.weight)
    assert prepared.note == "mine"
    assert prepared.meta["note"] is note
    report = get_report(prepared)
    learn(prepared, given, inplace=True)
    assert get_report(prepared) is not report
    round_weights(prepared, "floor", inplace=True)
    with pytest.raises(InvalidModelError, match="no AdaRound report"):
        get_report(prepared)


@pytest.mark.parametrize("kind", HOSTS)
def test_what_is_changed_in_place_runs_and_converts_like_the_copy(kind):
    make, _ = HOSTS[kind]
    prepared, given = make()
    apart = learn(prepared, given)
    assert learn(prepared, given, inplace=True) is prepared
    assert torch.equal(prepared(given[0]), apart(given[0]))
    converted = convert_to_reference_fx if kind == "fx" else convert
    assert torch.equal(converted(copy.deepcopy(prepared))(given[0]), converted(apart)(given[0]))


def test_layers_are_packed_all_or_none(monkeypatch):
    model = Layers().eval()
    config = AdaRoundConfig(act_dtype="fp32", **RECIPE)
    prepared = inc.prepare(model, config, inplace=True)
    calibrate([images(4, 48)])(prepared)
    modules, weights = dict(model.named_modules()), snapshot(model)
    plain, calls = nn.Module.set_submodule, []

    def set_submodule(module: nn.Module, *args: Any, **kwargs: Any) -> None:
        plain(module, *args, **kwargs)
        if module is model:
            calls.append(args)
            if len(calls) == 2:
                raise KeyboardInterrupt

    monkeypatch.setattr(nn.Module, "set_submodule", set_submodule)
    with pytest.raises(KeyboardInterrupt):
        inc.convert(prepared)
    assert len(calls) > 2
    assert dict(model.named_modules()) == modules
    assert_unchanged(weights, model)


# --- folders


@functools.cache
def quantized(bits: int = 3) -> nn.Module:
    """`network` with weights of few bits; not to be changed."""
    return inc.quantize(network(), AdaRoundConfig(bits=bits, **RECIPE), run_fn=calibrate(data()))


def output(folder: Path, model: nn.Module | None = None) -> torch.Tensor:
    return load(folder, network() if model is None else model)(data()[0])


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError("No space left on device")], ids=["interrupt", "full"])
def test_a_save_that_is_interrupted_leaves_the_folder_as_it_was(tmp_path, error, monkeypatch):
    folder = tmp_path / "model"
    for before in ([], ["adaround_model.pt"]):
        with monkeypatch.context() as patch:
            interrupted(patch, os, "fsync", error, after=0)
            with pytest.raises(type(error)):
                save(quantized(4), folder)
        assert os.listdir(folder) == before
        save(quantized(3), folder)
    assert torch.equal(output(folder), quantized(3)(data()[0]))


def test_a_later_save_replaces_an_earlier_one(tmp_path):
    save(quantized(3), tmp_path)
    save(quantized(4), tmp_path)
    assert torch.equal(output(tmp_path), quantized(4)(data()[0]))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda content: b"", "is empty"),
        (lambda content: content[:100], "is cut off"),
        (lambda content: content[: len(content) // 2], "is cut off"),
        (lambda content: content[:-1], "is cut off"),
        (lambda content: content.replace(b"structure", b"structuro", 1), "is damaged in '.*data.pkl'"),
        (lambda content: content.replace(b"PK\x01\x02", b"PK\x01\x03", 1), r"is damaged \(.*\)"),
    ],
    ids=["empty", "head", "half", "short by one", "changed", "list of entries"],
)
def test_a_damaged_file_is_refused_with_the_reason(tmp_path, damage, reason):
    save(quantized(), tmp_path)
    (file,) = tmp_path.iterdir()
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(InvalidModelError, match=rf"file '.*adaround_model.pt': {reason}\. .*save it again"):
        output(tmp_path)


def test_another_file_is_refused(tmp_path):
    save(quantized(), tmp_path)
    (file,) = tmp_path.iterdir()
    torch.save({"state": {}}, file)
    with pytest.raises(InvalidModelError, match="is not what save writes"):
        output(tmp_path)


def rewritten(file: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change what is in a file."""
    content = torch.load(io.BytesIO(file.read_bytes()), weights_only=True)
    change(content["state"])
    torch.save(content, file)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["0.0.scale", "1.scale", "3.scale"])
def test_a_scale_that_is_no_number_is_refused(tmp_path, name, value):
    save(quantized(), tmp_path)
    (file,) = tmp_path.iterdir()
    rewritten(file, lambda state: state.update({name: torch.tensor(value)}))
    with pytest.raises(NonFiniteError, match=rf"'{name}' in file .*NaN or infinity"):
        output(tmp_path)


@pytest.mark.parametrize("scale", [float("nan"), float("inf")])
def test_a_scale_of_a_weight_that_is_no_number_is_refused(tmp_path, scale):
    save(quantized(), tmp_path)
    (file,) = tmp_path.iterdir()

    def spoil(state: dict[str, Any]) -> None:
        weight = state["0.0.weight"]
        scales = weight.q_per_channel_scales().clone()
        scales[1] = scale
        zero_points, axis = weight.q_per_channel_zero_points(), weight.q_per_channel_axis()
        state["0.0.weight"] = torch._make_per_channel_quantized_tensor(weight.int_repr(), scales, zero_points, axis)

    rewritten(file, spoil)
    with pytest.raises(NonFiniteError, match=r"'0\.0\.weight' in file"):
        output(tmp_path)


def changed(change: Callable[[nn.Sequential], None]) -> nn.Sequential:
    model = network()
    change(model)
    return model


@pytest.mark.parametrize(
    ("model", "match"),
    [
        (lambda: changed(lambda net: setattr(net[0][0], "stride", (2, 2))), r"\['0\.0'\]"),
        (lambda: changed(lambda net: setattr(net[0][0], "padding", (1, 1))), r"\['0\.0'\]"),
        (lambda: changed(lambda net: setattr(net[1], "dilation", (2, 2))), r"\['1'\]"),
        (lambda: changed(lambda net: net.__setitem__(4, nn.ReLU6())), "has other settings"),
        (lambda: changed(lambda net: net.__setitem__(2, nn.Flatten(2))), "has other settings"),
    ],
    ids=["stride", "padding", "dilation", "activation function", "flatten"],
)
def test_a_model_with_other_settings_is_refused_by_name(tmp_path, model, match):
    save(quantized(), tmp_path)
    with pytest.raises(InvalidModelError, match=f"original_model: .*{match}.*strides"):
        load(tmp_path, model())
