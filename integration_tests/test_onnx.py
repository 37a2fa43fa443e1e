"""Learned models in ONNX Runtime: the same outputs, the same integers, and fewer bytes where they are packed."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, numpy_helper
from onnx.helper import make_graph, make_model, make_node, make_opsetid, make_tensor, make_tensor_value_info
from torch import Tensor, fx, nn
from torch.ao.quantization.quantize_fx import convert_to_reference_fx
from torch.utils._pytree import tree_map

from adaround_plugin import InvalidModelError, InvalidOptionError
from adaround_plugin.deployment.decomposed import convert_to_decomposed_fx
from adaround_plugin.deployment.onnx_translations import get_onnx_translations
from adaround_plugin.deployment.onnx_weights import pack_onnx_weights
from adaround_plugin.hosts.learned import learned_weights
from adaround_plugin.hosts.pt2e import AdaRoundWeightOnlyQuantizer
from integration_tests import models
from integration_tests.models import batches, learn, prepared_model
from integration_tests.pt2e_models import calibrated, convert, exported, x86

BATCH = torch.export.Dim("batch", min=1, max=64)


class Net(nn.Module):
    """Convolutions, one with a batch norm and one depthwise, and linear layers; every weight has a shape of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8)
        self.hidden, self.head = nn.Linear(32, 48), nn.Linear(48, 9)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.max_pool2d(torch.relu(self.norm(self.conv(x))), 2)
        return self.head(torch.relu(self.hidden(self.depthwise(x).flatten(1))))


DATA = batches(3, 8, 8)
# how a model is learned: in FX or with a quantizer of PT2E
CASES: dict[str, dict[str, Any] | Callable[[], Any]] = {
    "fx W4A8": {"weight_bits": 4},
    "fx W2": {"weight_bits": 2, "activation_bits": None},
    "W4A8": lambda: x86(weight_bits=4),
    "W4": lambda: AdaRoundWeightOnlyQuantizer(weight_bits=4),
    "W2": lambda: AdaRoundWeightOnlyQuantizer(weight_bits=2),
    "W3 per tensor": lambda: AdaRoundWeightOnlyQuantizer(weight_bits=3, per_channel=False),
    "W4 groups": lambda: AdaRoundWeightOnlyQuantizer(weight_bits=4, group_size=16, symmetric=False),
    "W8 head": lambda: AdaRoundWeightOnlyQuantizer({"head": {"weight_bits": 8}}, weight_bits=4),
}
# where a step is large, a bias that a kernel rounds shows
FEW_BITS: dict[str, dict[str, Any] | Callable[[], Any]] = {
    "fx W4A4": {"weight_bits": 4, "activation_bits": 4},
    "W4A4": lambda: x86(weight_bits=4, activation_bits=4),
}


@functools.cache
def _program() -> tuple[nn.Module, fx.GraphModule]:
    torch.manual_seed(2)
    model = Net().eval()
    return model, exported(model, DATA[0], ({0: BATCH},))


@functools.cache
def _learned(case: str) -> fx.GraphModule:
    model, program = _program()
    how = (CASES | FEW_BITS)[case]
    prepared = prepared_model(model, DATA, **how) if isinstance(how, dict) else calibrated(program, DATA, how())
    return learn(prepared, DATA, search_scale=False)


@functools.cache
def _converted(case: str) -> fx.GraphModule:
    result = _learned(case)
    return convert_to_decomposed_fx(result) if case.startswith("fx") else convert(copy.deepcopy(result))


def to_onnx(model: nn.Module, data: Tensor, opset: int = 21) -> onnx.ModelProto:
    program = torch.export.export(model, (data,), dynamic_shapes=({0: BATCH},), strict=True)
    table = get_onnx_translations()
    result = torch.onnx.export(program, dynamo=True, verbose=False, opset_version=opset, custom_translation_table=table)
    assert result is not None
    return result.model_proto


@functools.cache
def _onnx(case: str, opset: int = 21) -> onnx.ModelProto:
    return to_onnx(_converted(case), DATA[0], opset)


def run(
    model: onnx.ModelProto, options: onnxruntime.SessionOptions | None = None, data: Tensor | None = DATA[1]
) -> np.ndarray:
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    (result,) = session.run(None, {} if data is None else {session.get_inputs()[0].name: data.numpy()})
    return result


def constants(model: onnx.ModelProto) -> dict[str, TensorProto]:
    """Integers of weights: constants with more than one axis that are not in float."""
    return {
        one.name: one for one in model.graph.initializer if len(one.dims) > 1 and one.data_type != TensorProto.FLOAT
    }


def weights(model: onnx.ModelProto) -> dict[tuple[int, ...], TensorProto]:
    """Integers of weights by shape; those of the scales' zero points have smaller ones."""
    shapes = {tuple(integers.shape) for integers, _ in learned_weights(_learned("W4")).values()}
    return {tuple(one.dims): one for one in constants(model).values() if tuple(one.dims) in shapes}


@pytest.mark.parametrize("case", CASES)
def test_onnx_runtime_computes_what_the_converted_model_does(case):
    with torch.no_grad():
        expected = _converted(case)(DATA[1]).numpy()
    # where activations are quantized, another order of sums moves one of them by a step
    tolerance = 2e-2 if "A8" in case else 1e-6
    np.testing.assert_allclose(run(_onnx(case)), expected, atol=tolerance * np.abs(expected).max(), rtol=0)


@pytest.mark.parametrize("case", ["fx W4A8", "W4A8", "fx W4A4", "W4A4"])
def test_activations_end_where_their_range_does(case):
    """Those of 4 bits end at 15, and those of 7 bits, as FX has them for x86, at 255 like QuantizeLinear."""
    # kernels that round the bias to a product of scales would move a few activations by a step
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    # beyond what was calibrated
    data = 3 * DATA[1]
    with torch.no_grad():
        expected = _converted(case)(data).numpy()
    found = run(_onnx(case), options, data)
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max(), rtol=0)


@pytest.mark.parametrize("cast", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_packed_weights_hold_the_learned_integers_in_half_the_bytes(case, cast):
    before, model = _onnx(case).SerializeToString(), _onnx(case)
    packed = pack_onnx_weights(model, cast=cast)
    assert model.SerializeToString() == before
    onnx.checker.check_model(packed, full_check=True)
    assert np.array_equal(run(packed), run(model))
    found = weights(packed)
    for name, (integers, grid) in learned_weights(_learned(case)).items():
        one = found[tuple(integers.shape)]
        wide = grid.bits == 8
        assert one.data_type == (TensorProto.INT8 if wide else TensorProto.INT4), name
        assert len(one.raw_data) == (integers.numel() if wide else -(-integers.numel() // 2))
        assert np.array_equal(numpy_helper.to_array(one).astype(np.int64), integers.numpy()), name
    assert len(found) == 4
    assert len(packed.SerializeToString()) < len(before)


@pytest.mark.parametrize("cast", [True, False])
def test_two_bits_are_stored_in_two_from_opset_25_on(cast):
    model = _onnx("W2", 25)
    packed = pack_onnx_weights(model, cast=cast)
    assert np.array_equal(run(packed), run(model))
    assert {one.data_type for one in weights(packed).values()} == {TensorProto.INT2}
    for integers, _ in learned_weights(_learned("W2")).values():
        one = weights(packed)[tuple(integers.shape)]
        assert len(one.raw_data) == -(-integers.numel() // 4)
        assert np.array_equal(numpy_helper.to_array(one).astype(np.int64), integers.numpy())


@pytest.mark.parametrize("case", ["fx W4A8", "W4A8", "W4A4"])
def test_weights_that_are_cast_back_run_in_integer_kernels(case, tmp_path):
    """What docs/how-to/which-device.md says of ONNX Runtime; ranges of few bits, which a clip keeps, change nothing."""
    found = []
    for cast in (True, False):
        options = onnxruntime.SessionOptions()
        options.optimized_model_filepath, options.log_severity_level = str(tmp_path / "optimized.onnx"), 3
        run(pack_onnx_weights(_onnx(case), cast=cast), options)
        optimized = onnx.load(options.optimized_model_filepath)
        found.append({node.op_type for node in optimized.graph.node})
    assert "QLinearConv" in found[0]
    assert "QLinearConv" not in found[1]


def test_names_choose_weights():
    known = {shape: one.name for shape, one in weights(_onnx("W4")).items()}
    packed = pack_onnx_weights(_onnx("W4"), [known[(48, 32)], known[(9, 48)]])
    kinds = {shape: one.data_type for shape, one in weights(packed).items()}
    assert {shape for shape, kind in kinds.items() if kind == TensorProto.INT4} == {(48, 32), (9, 48)}
    assert np.array_equal(run(packed), run(_onnx("W4")))


def test_one_weight_for_two_readers_is_packed_once():
    layer = nn.Linear(8, 8)
    data = batches(8)
    program = exported(nn.Sequential(layer, nn.ReLU(), layer), data[0], ({0: BATCH},))
    result = learn(calibrated(program, data, AdaRoundWeightOnlyQuantizer()), data, search_scale=False)
    model = to_onnx(convert(result), data[0])
    for cast in (True, False):
        packed = pack_onnx_weights(model, cast=cast)
        assert [one.data_type for one in constants(packed).values()] == [TensorProto.INT4]
        assert np.array_equal(run(packed, data=data[1]), run(model, data=data[1]))


def dequantizing(values: Any, kind: int = TensorProto.INT8, opset: int = 21, zero_point: int = 0) -> onnx.ModelProto:
    """A model that dequantizes one constant."""
    values = np.asarray(values)
    graph = make_graph(
        [make_node("DequantizeLinear", ["weight", "scale", "zero"], ["y"])],
        "graph",
        [],
        [make_tensor_value_info("y", TensorProto.FLOAT, values.shape)],
        [
            make_tensor("weight", kind, values.shape, values.flatten()),
            make_tensor("scale", TensorProto.FLOAT, (), [0.5]),
            make_tensor("zero", kind, (), [zero_point]),
        ],
    )
    return make_model(graph, opset_imports=[make_opsetid("", opset)], ir_version=10)


def test_unsigned_integers_are_packed_too():
    model = dequantizing([[0, 15], [3, 7]], TensorProto.UINT8, zero_point=8)
    for cast in (True, False):
        packed = pack_onnx_weights(model, cast=cast)
        assert packed.graph.initializer[-1 if cast else -2].data_type == TensorProto.UINT4
        assert np.array_equal(run(packed, data=None), [[-4, 3.5], [-2.5, -0.5]])


def test_a_zero_point_that_does_not_fit_stays_with_weights_that_are_cast_back():
    model = dequantizing([[-8, 7]], zero_point=-20)
    assert constants(pack_onnx_weights(model))["weight.packed"].data_type == TensorProto.INT4
    with pytest.raises(InvalidModelError, match=r"weight 'weight'.*from -8 to 7 or zero points"):
        pack_onnx_weights(model, cast=False)


@pytest.mark.parametrize(
    ("model", "options", "error", "message"),
    [
        (b"", {}, InvalidOptionError, r"bytes is no onnx.ModelProto\. Pass onnx.load"),
        (dequantizing([[1, 2]]), {"cast": 1}, InvalidOptionError, "cast"),
        (dequantizing([[1, 2]]), {"names": "weight"}, InvalidOptionError, "names.*list"),
        (dequantizing([[1, 2]]), {"names": ["other"]}, InvalidOptionError, r"'other' matches none of \['weight'\]"),
        (dequantizing([[1, 2]], opset=20), {}, InvalidModelError, "opset 20.*opset_version=21"),
        (dequantizing([[1, 8]]), {}, InvalidModelError, "weight 'weight': has integers from 1 to 8.*weight_bits=4"),
        (dequantizing([[1, 8]]), {"names": ["weight"]}, InvalidModelError, "from 1 to 8"),
    ],
    ids=["bytes", "cast", "string", "name", "opset", "none fits", "named does not fit"],
)
def test_bad_calls_are_refused(model, options, error, message):
    with pytest.raises(error, match=message):
        pack_onnx_weights(model, **options)


def test_a_float_model_is_refused():
    with pytest.raises(InvalidModelError, match="no constant that DequantizeLinear reads"):
        pack_onnx_weights(to_onnx(_program()[0], DATA[0]))


def test_constants_in_another_file_are_refused(tmp_path: Path):
    path = tmp_path / "model.onnx"
    onnx.save(copy.deepcopy(_onnx("W4")), path, save_as_external_data=True, size_threshold=0)
    with pytest.raises(InvalidModelError, match=r"was not loaded.*onnx\.load"):
        pack_onnx_weights(onnx.load(path, load_external_data=False))
    assert np.array_equal(run(pack_onnx_weights(onnx.load(path))), run(_onnx("W4")))


def test_groups_along_two_axes_are_refused_by_the_translation():
    class Blocks(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            integers, scale = torch.ones(4, 4, dtype=torch.int8), torch.ones(2, 2)
            zero_point = torch.zeros(2, 2, dtype=torch.int8)
            return x @ torch.ops.torchao.dequantize_affine(integers, [2, 2], scale, zero_point, torch.int8, -8, 7)

    with pytest.raises(Exception, match="blocks along one axis") as caught:
        to_onnx(Blocks().eval(), torch.ones(2, 4))
    chain = [caught.value]
    while (cause := chain[-1].__cause__) is not None:
        chain.append(cause)
    assert any(isinstance(error, InvalidModelError) for error in chain)


@pytest.mark.parametrize("name", ["Residual", "FunctionalWeights", "Tied", "Normalized", "Tokens"])
@pytest.mark.parametrize("activation_bits", [8, 4])
def test_the_decomposed_conversion_computes_what_the_reference_does(name, activation_bits):
    _, prepared, data = models.prepared_net(name, activation_bits)
    result = learn(prepared, data, "nearest")
    with torch.no_grad():
        decomposed, reference = convert_to_decomposed_fx(result), convert_to_reference_fx(copy.deepcopy(result))
        # beyond what was calibrated, too: reference models end where the type does, even with ranges of 7 bits
        for batch in [*data, *(tree_map(lambda value: 3 * value if value.is_floating_point() else value, data))]:
            one, other = (models.call(model, copy.deepcopy(batch)) for model in (decomposed, reference))
            # torch quantizes a float tensor by division, the decomposed operator by multiplication: a step, rarely
            step = (other.max() - other.min()) / (2**activation_bits - 1)
            assert (one - other).abs().max() < max(1.5 * step, 0.05 * other.abs().max())
            assert (one - other).abs().median() < 1e-5 * other.abs().max()


def test_what_is_not_a_learned_fx_model_is_refused():
    _, prepared, _ = models.prepared_net("Residual")
    with pytest.raises(InvalidModelError, match="no AdaRound report"):
        convert_to_decomposed_fx(prepared)
    with pytest.raises(InvalidModelError, match="convert_pt2e"):
        convert_to_decomposed_fx(_learned("W4"))
    with pytest.raises(InvalidOptionError, match="backend_config"):
        convert_to_decomposed_fx(_learned("fx W4A8"), backend_config={})
