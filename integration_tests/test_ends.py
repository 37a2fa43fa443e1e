"""Where the answer of a network is compared: at the same values of both streams, in FX and PT2E."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.ao.quantization.fx.custom_config import PrepareCustomConfig
from torch.ao.quantization.quantize_fx import prepare_fx

from adaround_plugin.graph.ends import ends_of
from adaround_plugin.graph.streams import Stream, tensors
from adaround_plugin.hosts.base import open_streams
from adaround_plugin.hosts.open import open_host
from adaround_plugin.hosts.pt2e import AdaRoundWeightOnlyQuantizer
from integration_tests.models import batches, own_mapping, prepared_model, run_stream
from integration_tests.pt2e_models import prepared_pt2e, xnnpack

SIZES = (16, 16)

# after the last layers, "fx" and "xnnpack" quantize once more; 4 bits are kept by clamps
HOSTS: dict[str, Callable[[nn.Module, list[Tensor]], fx.GraphModule]] = {
    "fx": lambda net, data: prepared_model(net, data),
    "fx, 4 bits": lambda net, data: prepared_model(net, data, activation_bits=4),
    "fx, weights": lambda net, data: prepared_model(net, data, activation_bits=None),
    "x86": lambda net, data: prepared_pt2e(net, data),
    "xnnpack": lambda net, data: prepared_pt2e(net, data, xnnpack(4)),
    "pt2e, weights": lambda net, data: prepared_pt2e(net, data, AdaRoundWeightOnlyQuantizer(weight_bits=4)),
}


def ends_in(stream: Stream, x: Tensor) -> list[Tensor]:
    """The values of a stream's ends on a batch, at the end of all that runs."""
    stream.keep(ends_of(stream))
    values = stream.bind([x])
    with torch.no_grad():
        stream.run_nodes(values, stream.runnable(set()))
        return tensors([stream.value(end, values) for end in ends_of(stream)])


def assert_ends(prepared: fx.GraphModule, x: Tensor, expected: Sequence[Tensor]) -> None:
    """The ends of the float stream are the expected values, and those of the quantized stream are close to them."""
    exact, quantized = (ends_in(stream, x) for stream in open_streams(open_host(prepared, None)))
    assert [value.shape for value in exact] == [value.shape for value in expected]
    assert [value.shape for value in quantized] == [value.shape for value in expected]
    for value, other, wanted in zip(exact, quantized, expected, strict=True):
        torch.testing.assert_close(value, wanted)
        # not what is made of it, nor another end
        assert (other - wanted).square().mean() < 0.3 * wanted.square().mean()


class Headed(nn.Module):
    """Two layers, and what is made of what they say: scores, and others of another unit."""

    def __init__(self, head: Callable[..., Any]) -> None:
        super().__init__()
        self.body, self.a, self.b, self.head = nn.Linear(12, 8), nn.Linear(8, 6), nn.Linear(8, 6), head

    def scores(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.tanh(self.body(x))
        return self.a(x), 5 * self.b(x)

    def forward(self, x: Tensor) -> Any:
        return self.head(*self.scores(x))


class OfFirst(nn.Module):
    """Modules after the first layer, the second one beside them."""

    def __init__(self, *modules: nn.Module) -> None:
        super().__init__()
        self.modules_of_first = nn.Sequential(*modules)

    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return self.modules_of_first(a), b


@dataclass(frozen=True)
class Case:
    """A head `(a, b) -> output`, and the values that are compared; `a` and `b` unless they are given."""

    head: Callable[..., Any]
    ends: Callable[[Tensor, Tensor], tuple[Tensor, ...]] = lambda a, b: (a, b)


CASES = {
    # continuous values
    "linear": Case(lambda a, b: (a, b)),
    "one of two": Case(lambda a, b: b - a.mean(), lambda a, b: (b - a.mean(),)),
    "dict": Case(lambda a, b: {"scores": a, "boxes": b}),
    "nested": Case(lambda a, b: ({"scores": [a]}, (b,))),
    "flatten": Case(lambda a, b: (a.unflatten(1, (2, 3)).flatten(1), b)),
    "relu": Case(lambda a, b: (F.relu(a), b), lambda a, b: (a.relu(), b)),
    "tanh": Case(lambda a, b: (torch.tanh(a), b), lambda a, b: (a.tanh(), b)),
    "clamped": Case(lambda a, b: (torch.sigmoid(a).clamp(0.3, 0.6), b), lambda a, b: (a.sigmoid().clamp(0.3, 0.6), b)),
    # probabilities
    "softmax": Case(lambda a, b: (torch.softmax(a, -1), b.softmax(dim=1))),
    "log_softmax": Case(lambda a, b: (F.log_softmax(a, dim=-1), b.log_softmax(-1))),
    "sigmoid": Case(lambda a, b: (torch.sigmoid(a), b.sigmoid())),
    "logsigmoid": Case(lambda a, b: (F.logsigmoid(a), b)),
    "softmax module": Case(OfFirst(nn.Softmax(-1))),
    "log_softmax module": Case(OfFirst(nn.LogSoftmax(-1))),
    "sigmoid module": Case(OfFirst(nn.Sigmoid())),
    "dict of probabilities": Case(lambda a, b: {"scores": a.softmax(-1), "boxes": b}),
    "flatten after sigmoid": Case(lambda a, b: (torch.sigmoid(a).unflatten(1, (2, 3)).flatten(1), b)),
    "modules after sigmoid": Case(OfFirst(nn.Sigmoid(), nn.Dropout(0.5), nn.Flatten(), nn.Identity())),
    "both": Case(lambda a, b: (a, torch.softmax(a, -1), b)),
    "two of one": Case(lambda a, b: (torch.sigmoid(a), torch.softmax(a, -1), b)),
    # joined
    "cat": Case(lambda a, b: torch.cat([a, b], 1)),
    "cat with sigmoid": Case(lambda a, b: torch.cat([a, torch.sigmoid(b)], dim=1)),
    "stack": Case(lambda a, b: torch.stack([b, a.sigmoid()]), lambda a, b: (b, a)),
    "cat of cats": Case(
        lambda a, b: torch.cat([torch.cat([a, b], 1).sigmoid(), b.softmax(1)], 1),
    ),
    "cat with itself": Case(lambda a, b: (torch.cat([a, a], 1), b)),
    "cat of scores and probabilities": Case(lambda a, b: torch.cat([b, b.sigmoid(), a], 1), lambda a, b: (b, a)),
    # decisions
    "argmax": Case(lambda a, b: (a.argmax(-1), torch.argmax(b, 1))),
    "argmax of softmax": Case(lambda a, b: (a.softmax(-1).argmax(-1), b)),
    "label": Case(lambda a, b: (a.argmax(-1), b.softmax(-1), b.argmax(-1)), lambda a, b: (a, b)),
    "threshold": Case(lambda a, b: ((torch.sigmoid(a) > 0.5).long(), b)),
    # what is not at the end
    "softmax in the middle": Case(lambda a, b: a.softmax(-1) * b, lambda a, b: (a.softmax(-1) * b,)),
    "argmax in the middle": Case(
        lambda a, b: b * (a.argmax(-1, keepdim=True) > 2).float(),
        lambda a, b: (b * (a.argmax(-1, keepdim=True) > 2).float(),),
    ),
    # complex values
    "complex": Case(lambda a, b: torch.complex(a, b), lambda a, b: (torch.stack([a, b], -1),)),
}


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("case", CASES)
def test_both_streams_end_at_the_same_values(host, case):
    torch.manual_seed(0)
    net, data = Headed(CASES[case].head).eval(), batches(12, sizes=SIZES)
    prepared = HOSTS[host](net, data)
    with torch.no_grad():
        expected = CASES[case].ends(*net.scores(data[0]))
    assert_ends(prepared, data[0], expected)


class Attention(nn.Module):
    """A softmax in the middle, and an output that is its sum with the input."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(6, 6) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        attention = torch.softmax(self.q(x) @ self.k(x).transpose(1, 2), -1)
        return x + self.out(attention @ self.v(x))


@pytest.mark.parametrize("host", HOSTS)
def test_attention_ends_at_its_output(host):
    torch.manual_seed(0)
    net, data = Attention().eval(), batches(5, 6, sizes=SIZES)
    prepared = HOSTS[host](net, data)
    with torch.no_grad():
        expected = net(data[0])
    assert_ends(prepared, data[0], [expected])


@pytest.mark.parametrize("head", [nn.Identity(), nn.Sigmoid(), nn.Sequential(nn.Softmax(-1), nn.Flatten())])
@pytest.mark.parametrize("observed", [True, False])
def test_a_layer_ends_with_an_observer_or_without(head, observed):
    torch.manual_seed(0)
    net, data = nn.Sequential(nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 6), head).eval(), batches(12, sizes=SIZES)
    mapping = own_mapping()
    if not observed:
        # the last layer and what follows stay float
        mapping.set_module_name("2", None).set_module_name("3", None)
    assert_ends(prepared_model(net, data, mapping=mapping), data[0], [net[:3](data[0]).detach()])


@pytest.mark.parametrize("head", [nn.Identity(), nn.Sigmoid(), nn.Flatten()])
def test_an_output_that_stays_quantized_is_read_as_numbers(head):
    torch.manual_seed(0)
    net, data = nn.Sequential(nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 6), head).eval(), batches(12, sizes=SIZES)
    custom = PrepareCustomConfig().set_output_quantized_indexes([0])
    prepared = prepare_fx(net, own_mapping(), (data[0],), prepare_custom_config=custom)
    with torch.no_grad():
        for batch in data:
            prepared(batch)
    assert_ends(prepared, data[0], [net[:3](data[0]).detach()])


class Anchored(nn.Module):
    """Beside scores, what depends on no input."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(12, 6)
        self.register_buffer("anchors", torch.arange(3.0))

    def forward(self, x: Tensor) -> Any:
        return {"scores": self.a(x).sigmoid(), "anchors": torch.sigmoid(self.anchors)}


@pytest.mark.parametrize("host", HOSTS)
def test_what_depends_on_no_input_is_left_as_it_is(host):
    torch.manual_seed(0)
    net, data = Anchored().eval(), batches(12, sizes=SIZES)
    assert_ends(HOSTS[host](net, data), data[0], [net.a(data[0]).detach(), torch.arange(3.0).sigmoid()])


class Constant(nn.Module):
    """Probabilities are joined with one that depends on no input."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(12, 6)
        self.register_buffer("none", torch.zeros(16, 1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.none, self.a(x).softmax(-1)], 1)


@pytest.mark.parametrize("host", HOSTS)
def test_what_is_joined_with_a_constant_ends_alone(host):
    torch.manual_seed(0)
    net, data = Constant().eval(), batches(12, sizes=SIZES)
    assert_ends(HOSTS[host](net, data), data[0], [net.a(data[0]).detach()])


class Doubled(nn.Module):
    """Returns its input, too."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x + x, x


def test_an_input_may_be_an_end():
    x = torch.ones(2, 3)
    graph = fx.symbolic_trace(Doubled())
    found = ends_in(Stream(graph, graph.graph), x)
    assert [value.tolist() for value in found] == [(2 * x).tolist(), x.tolist()]


def test_ends_are_kept_to_the_end():
    """Behind a sigmoid there are values that nothing else would need."""
    graph = fx.symbolic_trace(nn.Sequential(nn.Linear(3, 3), nn.Sigmoid(), nn.Flatten()))
    for kept in (False, True):
        stream = Stream(graph, graph.graph)
        if kept:
            stream.keep(ends_of(stream))
        needed = stream.finish(stream.runnable(set()))
        assert needed.issuperset(ends_of(stream)) == kept
        x = torch.ones(2, 3)
        assert torch.equal(run_stream(stream, [x]), graph(x))


def test_complex_values_are_pairs_of_real_numbers():
    value = torch.tensor([[1 + 2j, 3 - 1j]])
    (found,) = tensors(value)
    assert found.tolist() == [[[1, 2], [3, -1]]]
    assert found.dtype == torch.float32
    for dtype in (torch.complex128, torch.complex64):
        (found,) = tensors(value.to(dtype).conj())
        assert found.dtype == torch.float32
        assert found.tolist() == [[[1, -2], [3, 1]]]


def test_of_a_nested_output_floating_point_tensors_count():
    x = torch.tensor([1.0, 2.0])
    quantized = torch.quantize_per_tensor(x, 0.5, 3, torch.quint8)
    pair = namedtuple("Pair", "left right")(x + 1, [x.double() + 2, x.long(), None, 3.0, "x"])
    value = {"a": x, "b": (quantized, {"c": x > 1}), "d": pair, "e": torch.complex(x, x), "f": x.half()}
    found = tensors(value)
    assert [one.tolist() for one in found] == [[1, 2], [1, 2], [2, 3], [3, 4], [[1, 1], [2, 2]], [1, 2]]
    assert {one.dtype for one in found} == {torch.float32}
    assert tensors(None) == tensors([]) == tensors(x.long()) == []
