"""Rows that a network chooses by what it computes have no counterpart in the float network; in FX and PT2E."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch
from torch import Tensor, fx, nn

from adaround_plugin import BlockWise, Finetune, adaround, get_report
from adaround_plugin.graph.ends import ends_of
from adaround_plugin.graph.selection import chosen_rows, computed
from adaround_plugin.graph.streams import Stream
from adaround_plugin.hosts.base import open_streams
from adaround_plugin.hosts.open import open_host
from adaround_plugin.learning import layerwise
from adaround_plugin.learning.columns import LayerMoments, _Gathered
from adaround_plugin.regions import importance
from integration_tests.models import QUICK, batches
from integration_tests.region_models import prepared_by, seeded

HOSTS = ["fx", "pt2e"]


class Experts(nn.Module):
    """Tokens go to one of the experts, and come back to their places."""

    idle = 0

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.router = nn.Linear(6, 8), nn.Linear(8, 3)
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.embed(x))
        choice = self.router(x)[:, : 3 - self.idle].argmax(1)
        y = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            rows = (choice == number).nonzero().squeeze(1)
            y = y.index_add(0, rows, expert(x[rows]))
        return self.head(torch.tanh(y))


class Idle(Experts):
    """The last expert gets no token."""

    idle = 1


class Pruned(nn.Module):
    """Of the tokens of a sequence the best go on."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.score = nn.Linear(6, 8), nn.Linear(8, 1)
        self.kept, self.head = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.embed(x))
        best = self.score(x).squeeze(-1).topk(3, 1).indices
        x = torch.gather(x, 1, best.unsqueeze(-1).expand(-1, -1, 8))
        return self.head(torch.tanh(self.kept(x)).mean(1))


class Masked(nn.Module):
    """Rows that score above zero are returned, as many as these are."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.score, self.box = nn.Linear(6, 8), nn.Linear(8, 1), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.embed(x))
        return self.box(x[self.score(x).squeeze(-1) > 0])


class Given(nn.Module):
    """What is chosen does not depend on any weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        last = x[..., 0].argmax(1)
        x = torch.tanh(self.embed(x))
        return self.head(x[torch.arange(x.shape[0]), last])


def tokens(count: int, *shape: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return list(torch.randn(count, *shape, 6, generator=generator).split(16))


# by network its batches, the layers whose rows are chosen, and how many ends it has
CASES = {
    Experts: (tokens(128), {"experts.0", "experts.1", "experts.2"}, 1),
    Idle: (tokens(128), {"experts.0", "experts.1", "experts.2"}, 1),
    Pruned: (tokens(96, 7), {"kept", "head"}, 1),
    Masked: (tokens(128), {"box"}, 2),
    Given: (tokens(96, 7), set(), 1),
}


@functools.cache
def case(host: str, net: type[nn.Module], activation_bits: int | None = None) -> fx.GraphModule:
    """A prepared network of `CASES`; not to be changed."""
    return prepared_by(host, activation_bits, seeded(net), CASES[net][0], 2)


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("net", CASES)
def test_what_is_chosen_is_found_in_both_graphs(host: str, net: type[nn.Module]) -> None:
    _, chosen, count = CASES[net]
    opened = open_host(case(host, net))
    exact, quantized = open_streams(opened)
    for stream, site_of in ((exact, "float_node"), (quantized, "quantized_node")):
        found = chosen_rows(stream)
        inside = {
            node.name
            for node in opened.nodes
            for site in node.sites
            if not found.isdisjoint(getattr(site, site_of).all_input_nodes)
        }
        assert inside == chosen
    assert [len(ends_of(stream)) for stream in (exact, quantized)] == [count, count]


def test_writing_back_makes_rows_pairs_again() -> None:
    graph = fx.symbolic_trace(Experts())
    stream = Stream(graph, graph.graph)
    found = {node.name for node in chosen_rows(stream)}
    assert "experts_0" in found
    assert found.isdisjoint({"index_add", "index_add_1", "index_add_2", "head"})


class Positions(nn.Module):
    """What is taken from a buffer depends on the length of a sequence alone, as BERT's types of tokens do."""

    order: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.kinds, self.head = nn.Linear(6, 8), nn.Embedding(2, 8), nn.Linear(8, 3)
        self.register_buffer("order", torch.arange(32) % 2)

    def forward(self, x: Tensor) -> Tensor:
        order = self.order[: x.size(1)]
        kinds = torch.gather(self.order, 0, order)
        return self.head((self.embed(x) + self.kinds(kinds))[:, order])


@pytest.mark.parametrize("sliced", ["whole", "by size"])
def test_what_depends_on_sizes_alone_chooses_no_rows(sliced: str) -> None:
    if sliced == "whole":
        program = torch.export.export(Positions(), (tokens(4, 7)[0],), strict=True)
    else:
        shapes = ({0: torch.export.Dim.AUTO, 1: torch.export.Dim("length", min=2, max=32)},)
        program = torch.export.export(Positions(), (tokens(4, 7)[0],), dynamic_shapes=shapes, strict=True)
    module = program.module()
    stream = Stream(module, module.graph)
    assert chosen_rows(stream) == set()
    weighted = [node for node in stream.nodes if str(node.target).startswith("aten.linear")]
    assert len(weighted) == 2
    assert set(weighted) <= computed(stream)


class Places(nn.Module):
    """What is chosen depends on a weight that sizes take entries of: learned positions."""

    def __init__(self) -> None:
        super().__init__()
        self.places, self.head = nn.Embedding(32, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        placed = x + self.places(torch.arange(x.size(1)))
        return self.head(torch.gather(x, 1, placed.argsort(1)))


@pytest.mark.parametrize("host", HOSTS)
def test_rows_that_are_sorted_by_learned_positions_are_chosen(host: str) -> None:
    shapes = ({0: torch.export.Dim.AUTO, 1: torch.export.Dim("length", min=2, max=32)},)
    x = tokens(4, 7)[0]
    module: fx.GraphModule = (
        fx.symbolic_trace(Places())
        if host == "fx"
        else torch.export.export(Places(), (x,), dynamic_shapes=shapes, strict=True).module()
    )
    stream = Stream(module, module.graph)
    assert any("gather" in node.name for node in chosen_rows(stream))


class Deep(Masked):
    """What is made of rows that were chosen, by many residual branches."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(24))

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return x


def test_ends_behind_many_branches_are_found_at_once() -> None:
    graph = fx.symbolic_trace(Deep())
    # every way back was walked, 2^24 of them
    assert len(ends_of(Stream(graph, graph.graph))) == 2


class Neighbours(nn.Module):
    """Rows are chosen by the input alone, which the host quantizes."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        near = torch.matmul(x, x.transpose(0, 1)).topk(3, -1).indices
        return self.b(torch.relu(self.a(x[near.flatten()])))


def test_float_and_quantized_ends_agree_where_inputs_choose() -> None:
    data = tokens(96)
    prepared = prepared_by("fx", 8, seeded(Neighbours), data, 3)
    exact, quantized = open_streams(open_host(prepared))
    assert [len(ends_of(stream)) for stream in (exact, quantized)] == [1, 1]
    report = get_report(adaround(prepared, data, QUICK, progress=False))
    assert report.output_error <= report.nearest_output_error
    assert all("chooses its rows" in layer.note for layer in report.layers)


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("activation_bits", [None, 8])
@pytest.mark.parametrize("net", CASES)
def test_layers_behind_learn_from_the_quantized_network_alone(
    host: str, net: type[nn.Module], activation_bits: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if activation_bits is not None and (net is Idle or (net in (Experts, Pruned) and host == "fx")):
        pytest.skip(
            "the host itself does not take a network whose observers see nothing, or whose indices it quantizes"
        )
    data, chosen, _ = CASES[net]
    apart: dict[tuple[int, ...], float] = {}
    add = LayerMoments.add

    def seen(self: LayerMoments, columns: _Gathered) -> None:
        add(self, columns)
        if columns.exact.numel():
            distance = float((columns.exact - columns.quantized).abs().max())
            key = id(self._rows), *self._rows.shape
            apart[key] = max(apart.get(key, 0.0), distance)

    monkeypatch.setattr(LayerMoments, "add", seen)
    prepared = case(host, net, activation_bits)
    report = get_report(adaround(prepared, data, QUICK, progress=False))
    assert {layer.name for layer in report.layers if "chooses its rows" in layer.note} == chosen
    nothing = {layer.name for layer in report.layers if "no learning sample" in layer.note}
    assert nothing == ({"experts.2"} if net is Idle else set())
    assert report.output_error is not None
    assert 0 < report.output_error <= report.nearest_output_error
    # all but the first layers have inputs that differ, if they are pairs
    assert sum(distance == 0 for distance in apart.values()) >= len(chosen) - len(nothing)


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("method", ["default", "blocks"])
def test_an_expert_that_nothing_reached_keeps_its_bias(host: str, method: str) -> None:
    """Finetuning takes steps in proportion to what a layer gives, which is nothing there."""
    chosen = BlockWise(layers=QUICK, iterations=20) if method == "blocks" else QUICK
    learned = adaround(case(host, Idle), CASES[Idle][0], chosen, finetune=Finetune(iterations=5), progress=False)
    assert all(value.isfinite().all() for value in learned.state_dict().values() if value.is_floating_point())
    assert "learned" in get_report(learned).finetuning.note


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("net", CASES)
@pytest.mark.parametrize("method", ["default", "blocks", "fisher"])
def test_every_method_takes_such_networks(host: str, net: type[nn.Module], method: str) -> None:
    data, chosen, _ = CASES[net]
    chosen_method = {
        "default": "default",
        "blocks": BlockWise(layers=QUICK, iterations=20),
        "fisher": replace(QUICK, column_weighting="fisher", output_hessian=True),
    }[method]
    prepared = case(host, net)
    report = get_report(
        adaround(prepared, data, chosen_method, finetune=method == "blocks" and Finetune(iterations=20), progress=False)
    )
    assert report.output_error <= report.nearest_output_error
    layers = {layer.name: layer for layer in report.layers}
    assert all("no finite derivative" not in layers[name].note or "rows apart" in layers[name].note for name in chosen)


def test_so_many_rows_that_their_moment_would_fill_the_memory_stay_apart(monkeypatch):
    net, data = seeded(lambda: nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 4))), batches(8)
    for module in (importance, layerwise):
        monkeypatch.setattr(module, "MOST_ROWS", 8)
    report = get_report(adaround(prepared_by("fx", None, net, data), data, progress=False))
    apart = {layer.name: "rows apart: more than 8" in layer.note for layer in report.layers}
    assert apart == {"0": True, "2": False}


class Entries(nn.Module):
    """Entries of the last axis are chosen by what is computed, of all samples at once."""

    def __init__(self) -> None:
        super().__init__()
        self.score, self.head = nn.Linear(6, 6), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        best = self.score(x).mean(0).topk(3).indices
        return self.head(x[:, best])


@pytest.mark.parametrize("host", HOSTS)
def test_a_computed_index_may_stand_behind_all_of_the_samples(host: str) -> None:
    data = tokens(96)
    report = get_report(adaround(prepared_by(host, None, seeded(Entries), data, 2), data, QUICK, progress=False))
    assert len(report.layers) == 2
