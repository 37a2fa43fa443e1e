"""Rows times columns of the design matrix is the operator itself, whatever the operator."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

from adaround_plugin.graph.operators import function_op, is_weighted_function, module_op
from adaround_plugin.rounding.linear_op import LinearOp

CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
EVEN_KERNEL = "ignore:Using padding='same' with even kernel:UserWarning"  # torch's advice about its own speed
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}


def by_design_matrix(op: LinearOp, weight: Tensor, x: Tensor, shape: torch.Size) -> Tensor:
    """The operator's output, of `shape`, as products of rows and columns."""
    patches = op.patches(x, weight.shape)
    samples, positions = patches.samples, patches.positions
    index, position = torch.arange(samples).repeat_interleave(positions), torch.arange(positions).repeat(samples)
    columns = patches.columns(index, position)  # (G, n, D)
    rows = op.rows(weight)
    assert columns.shape == (rows.shape[0], samples * positions, rows.shape[2])
    products = columns @ rows.transpose(1, 2)  # (G, n, R)
    y = products.permute(1, 0, 2).reshape(samples, positions, -1)  # channels in the bias's order
    y = y.reshape(shape) if op.kind == "linear" else y.transpose(1, 2).reshape(shape)
    assert torch.equal(op.outputs_at(y, weight.shape, index, position), products)
    return y


def assert_is_the_module(module: nn.Module, x: Tensor) -> None:
    module, x = module.double(), x.double()
    op = module_op(module)
    assert op is not None
    with torch.no_grad():
        expected = module(x)
        torch.testing.assert_close(by_design_matrix(op, module.weight, x, expected.shape), expected)
        assert torch.equal(op.unrows(op.rows(module.weight), module.weight.shape), module.weight)


def per_dimension(draw: st.DrawFn, spatial: int, low: int, high: int) -> tuple[int, ...]:
    return tuple(draw(st.integers(low, high)) for _ in range(spatial))


@st.composite
def convolutions(draw: st.DrawFn, transposed: bool) -> tuple[nn.Module, Tensor]:
    """A convolution without bias in 1 to 3 dimensions and an input it accepts, batched or not."""
    spatial = draw(st.integers(1, 3))
    groups = draw(st.integers(1, 3))
    inputs, outputs = groups * draw(st.integers(1, 2)), groups * draw(st.integers(1, 2))
    kernel, dilation = per_dimension(draw, spatial, 1, 3), per_dimension(draw, spatial, 1, 2)
    stride = per_dimension(draw, spatial, 1, 3)
    reach = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
    options: dict[str, Any] = {"groups": groups, "dilation": dilation, "bias": False}
    if transposed:
        padding = per_dimension(draw, spatial, 0, 3)
        extra = tuple(draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True))
        # long enough to leave something of the output
        size = [
            max(1, (2 * p - r - o) // s + 2) + draw(st.integers(0, 2))
            for p, r, o, s in zip(padding, reach, extra, stride, strict=True)
        ]
        options |= {"stride": stride, "padding": padding, "output_padding": extra}
        module = TRANSPOSED[spatial](inputs, outputs, kernel, **options)
    else:
        mode = draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
        padding = draw(st.sampled_from(["same", "valid"]) | st.just(per_dimension(draw, spatial, 0, 2)))
        if padding == "same":
            stride = (1,) * spatial
        # reflecting pads by less than the input's length, wrapping by no more than it
        size = [max(r, 3) + 1 + draw(st.integers(0, 2)) for r in reach]
        options |= {"stride": stride, "padding": padding, "padding_mode": mode}
        module = CONVOLUTIONS[spatial](inputs, outputs, kernel, **options)
    batch = draw(st.sampled_from([(), (1,), (2,)]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    return module, torch.randn(*batch, inputs, *size, generator=generator)


@pytest.mark.filterwarnings(EVEN_KERNEL)
@settings(max_examples=120)
@given(convolutions(transposed=False))
def test_convolutions(case):
    assert_is_the_module(*case)


@settings(max_examples=120)
@given(convolutions(transposed=True))
def test_transposed_convolutions(case):
    assert_is_the_module(*case)


@given(leading=st.lists(st.integers(1, 4), max_size=3), inputs=st.integers(1, 5), outputs=st.integers(1, 5))
def test_linear_layers_of_one_to_four_dimensions(leading, inputs, outputs):
    x = torch.randn(*leading, inputs, generator=torch.Generator().manual_seed(0))
    assert_is_the_module(nn.Linear(inputs, outputs, bias=False), x)


@pytest.mark.parametrize("kernel", [(2, 2), (4, 3), (2, 5)])
@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.filterwarnings(EVEN_KERNEL)
def test_same_padding_of_even_kernels_has_the_odd_side_after(kernel, mode):
    assert_is_the_module(
        nn.Conv2d(2, 3, kernel, padding="same", padding_mode=mode, bias=False), torch.randn(2, 2, 7, 8)
    )


@pytest.mark.parametrize("multiplier", [1, 2])
def test_depthwise(multiplier):
    assert_is_the_module(nn.Conv2d(6, 6 * multiplier, 3, 2, 1, groups=6, bias=False), torch.randn(2, 6, 7, 7))
    assert_is_the_module(nn.ConvTranspose2d(6, 6 * multiplier, 3, 2, 1, groups=6, bias=False), torch.randn(2, 6, 5, 5))


def test_inputs_that_are_not_contiguous():
    conv = nn.Conv2d(4, 3, 3, bias=False)
    assert_is_the_module(conv, torch.randn(2, 4, 6, 7).contiguous(memory_format=torch.channels_last))
    assert_is_the_module(conv, torch.randn(2, 7, 6, 4).permute(0, 3, 2, 1))
    assert_is_the_module(conv, torch.randn(2, 8, 12, 7)[:, ::2, ::2])
    assert_is_the_module(nn.Conv2d(1, 3, 3, bias=False), torch.randn(2, 7, 6, 1).permute(0, 3, 1, 2))
    assert_is_the_module(nn.Linear(4, 3, bias=False), torch.randn(4, 5, 2).permute(2, 1, 0))


def test_an_input_is_left_as_it_was():
    x = torch.randn(2, 4, 6, 6)
    before = x.clone()
    patches = LinearOp("conv", (1, 1), ((0, 0), (0, 0)), (1, 1)).patches(x, torch.Size((3, 4, 3, 3)))
    patches.columns(torch.tensor([0]), torch.tensor([0])).zero_()
    assert torch.equal(x, before)


def test_any_subset_of_columns_can_be_asked_for():
    conv = nn.ConvTranspose2d(4, 6, 3, 2, groups=2, bias=False)
    op, x = module_op(conv), torch.randn(3, 4, 5, 6)
    patches = op.patches(x, conv.weight.shape)
    sample = torch.arange(patches.samples).repeat_interleave(patches.positions)
    position = torch.arange(patches.positions).repeat(patches.samples)
    every = patches.columns(sample, position)
    chosen = torch.randperm(len(sample), generator=torch.Generator().manual_seed(0))[:20]
    assert torch.equal(patches.columns(sample[chosen], position[chosen]), every[:, chosen])


@pytest.mark.parametrize("build", [nn.Conv2d, nn.ConvTranspose2d])
def test_rows_are_in_the_order_of_the_bias(build):
    conv = build(4, 6, 3, groups=2)
    op, x = module_op(conv), torch.zeros(1, 4, 6, 6)
    value = torch.arange(6.0).reshape(op.rows(conv.weight).shape[:2])
    conv.bias.data = op.outputs(value)
    with torch.no_grad():
        assert conv(x)[0, :, 0, 0].tolist() == [0, 1, 2, 3, 4, 5]
        # a row zeroed is that output gone
        for g, r in ((0, 1), (1, 2)):
            rows = op.rows(conv.weight).clone()
            rows[g, r] = 0
            y = torch.func.functional_call(
                conv, {"weight": op.unrows(rows, conv.weight.shape)}, (torch.randn(1, 4, 6, 6),)
            )
            assert [c for c in range(6) if (y[0, c] == c).all()] == [3 * g + r]


@pytest.mark.parametrize(("kind", "axis"), [("linear", 0), ("conv", 0), ("conv_transpose", 1)])
def test_output_axis(kind, axis):
    assert LinearOp(kind).output_axis == axis


@pytest.mark.parametrize("module", [nn.ReLU(), nn.Embedding(3, 4), nn.LSTM(2, 3), nn.Bilinear(2, 2, 2)])
def test_modules_of_another_kind_have_no_op(module):
    assert module_op(module) is None


CALLS = {
    "linear": (lambda x, w: F.linear(x, w), (3, 5), (4, 5)),
    "linear_keywords": (lambda x, w: F.linear(input=x, weight=w, bias=None), (3, 5), (4, 5)),
    "conv1d": (lambda x, w: F.conv1d(x, w, None, 2, 1), (2, 4, 9), (3, 4, 3)),
    "conv2d": (lambda x, w: F.conv2d(x, w), (2, 4, 5, 6), (3, 4, 3, 2)),
    "conv2d_positional": (lambda x, w: F.conv2d(x, w, None, (2, 1), (1, 0), (1, 2), 2), (2, 4, 7, 7), (6, 2, 3, 2)),
    "conv2d_lists": (lambda x, w: F.conv2d(x, w, stride=[2], padding=[1], groups=2), (2, 4, 7, 7), (6, 2, 3, 3)),
    "conv2d_same": (lambda x, w: F.conv2d(x, w, padding="same", dilation=2), (2, 4, 7, 7), (6, 4, 3, 3)),
    "conv2d_valid": (lambda x, w: torch.conv2d(x, w, padding="valid"), (2, 4, 7, 7), (6, 4, 3, 3)),
    "conv3d": (lambda x, w: F.conv3d(x, w, None, 1, (0, 1, 2)), (1, 2, 4, 4, 4), (3, 2, 2, 3, 2)),
    "transposed1d": (lambda x, w: F.conv_transpose1d(x, w, None, 2, 1, 1), (2, 4, 5), (4, 3, 3)),
    "transposed2d": (lambda x, w: F.conv_transpose2d(x, w, None, 2, 1, 1, 2, 2), (2, 4, 5, 5), (4, 3, 3, 3)),
    "transposed2d_keywords": (
        lambda x, w: F.conv_transpose2d(x, w, stride=(2, 3), output_padding=(1, 2), dilation=1, groups=2),
        (2, 4, 5, 5),
        (4, 3, 3, 3),
    ),
    "transposed3d": (lambda x, w: F.conv_transpose3d(x, w, padding=1), (1, 2, 4, 4, 4), (2, 3, 3, 3, 3)),
    "unbatched": (lambda x, w: F.conv2d(x, w), (4, 5, 6), (3, 4, 3, 2)),
}


def weighted_node(function: Any) -> fx.Node:
    class Call(nn.Module):
        def forward(self, x: Tensor, w: Tensor) -> Tensor:
            return function(x, w)

    return next(node for node in fx.symbolic_trace(Call()).graph.nodes if is_weighted_function(node))


@pytest.mark.parametrize("name", CALLS)
def test_functional_calls(name):
    function, input_shape, weight_shape = CALLS[name]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(input_shape, generator=generator, dtype=torch.float64)
    weight = torch.randn(weight_shape, generator=generator, dtype=torch.float64)
    op = function_op(weighted_node(function), weight.shape)
    expected = function(x, weight)
    torch.testing.assert_close(by_design_matrix(op, weight, x, expected.shape), expected)


def test_a_computed_setting_has_no_op():
    node = weighted_node(lambda x, w: F.conv2d(x, w, padding=(x.shape[2] // 4, 0)))
    assert function_op(node, torch.Size((3, 4, 3, 3))) is None


def test_other_functions_are_not_weighted():
    graph = fx.symbolic_trace(lambda x: torch.relu(x) + torch.matmul(x, x)).graph
    assert not any(is_weighted_function(node) for node in graph.nodes)


def test_patches_make_no_copy_of_the_unfolded_input():
    x = torch.randn(2, 3, 16, 16)
    patches = LinearOp("conv", (1, 1), ((0, 0), (0, 0)), (1, 1)).patches(x, torch.Size((3, 3, 5, 5)))
    assert patches.samples * patches.positions * patches.row_length > 10 * x.numel()
    assert patches.x.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()


@pytest.mark.filterwarnings(EVEN_KERNEL)
@settings(max_examples=120)
@given(convolutions(transposed=False) | convolutions(transposed=True), st.integers(0, 2**31))
def test_the_compiled_loop_gathers_what_indexing_does(case, seed):
    module, x = case
    op = module_op(module)
    patches = op.patches(x, module.weight.shape)
    generator = torch.Generator().manual_seed(seed)
    sample = torch.randint(patches.samples, (7,), generator=generator)
    position = torch.randint(patches.positions, (7,), generator=generator)
    with pytest.MonkeyPatch.context() as patch:
        found = patches.columns(sample, position)
        patch.setattr("adaround_plugin.rounding.linear_op._compiled_gather", lambda: None)
        expected = patches.columns(sample, position)
    assert torch.equal(found, expected)


def test_all_tokens_may_be_taken_in_another_order():
    x = torch.randn(3, 4, 5)
    patches = LinearOp("linear").patches(x, torch.Size((2, 5)))
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    assert torch.equal(patches.columns(order // 4, order % 4)[0], x.reshape(12, 5)[order])


@settings(max_examples=300)
@given(
    st.sampled_from(["zeros", "reflect", "replicate", "circular", "transposed"]),
    st.integers(1, 4),
    st.integers(1, 3),
    st.integers(1, 2),
    st.integers(0, 3),
    st.tuples(st.integers(1, 6), st.integers(1, 6)),
    st.integers(2, 4),
)
def test_an_input_is_accepted_where_torch_s_own_operator_takes_it(
    mode, kernel, stride, dilation, padding, size, channels
):
    settings = {"stride": stride, "padding": padding, "dilation": dilation}
    if mode == "transposed":
        module = nn.ConvTranspose2d(3, 2, kernel, **settings)
    else:
        module = nn.Conv2d(3, 2, kernel, padding_mode=mode, **settings)
    x = torch.zeros(2, channels, *size)
    try:
        with torch.no_grad():
            runs = module(x).numel() > 0
    except (RuntimeError, AssertionError):
        runs = False
    assert module_op(module).accepts(x, module.weight.shape) == runs


def test_an_axis_without_entries_is_not_accepted():
    assert not LinearOp("conv", (1,), ((2, 2),), (1,)).accepts(torch.zeros(2, 3, 0), torch.Size((4, 3, 3)))
