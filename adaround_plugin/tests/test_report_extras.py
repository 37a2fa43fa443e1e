"""A report as a DataFrame of pandas and as a figure of matplotlib."""

from __future__ import annotations

import math
import sys
from dataclasses import fields, replace
from itertools import pairwise

import matplotlib
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from adaround_plugin.errors import MissingDependencyError
from adaround_plugin.report import LayerReport, Report

LAYER = LayerReport(
    "first", "Conv2d", (), (4, 3), 3, 0.1, 0.01, 0.2, 0.02, True, 0.25, 0.015, "kept", 10, 1.25, "a", 0.1, 0.2, 0.4
)
REPORT = Report("m", "s", "r", [LAYER, replace(LAYER, name="a$x$b", learned=False, learned_error=0.5)], [])


def drawn(figure: Figure) -> dict[str, tuple[list[float], list[float]]]:
    """The dots of a figure by what the legend calls them: places on both axes."""
    (axes,) = figure.axes
    return {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines}


def test_a_frame_has_a_row_for_each_layer_and_a_column_for_each_attribute() -> None:
    frame = REPORT.to_dataframe()
    assert list(frame.columns) == [field.name for field in fields(LayerReport)]
    for (_, row), layer in zip(frame.iterrows(), REPORT.layers, strict=True):
        assert row.to_dict() == vars(layer)
    assert [str(frame[name].dtype) for name in ("learned", "bits", "nearest_error")] == ["bool", "int64", "float64"]


def test_errors_that_do_not_exist_are_no_numbers() -> None:
    without = replace(LAYER, nearest_holdout=None, learned_holdout=None)
    frame = replace(REPORT, layers=[without, without]).to_dataframe()
    assert str(frame["nearest_holdout"].dtype) == "float64"
    assert frame["learned_holdout"].isna().all()


def test_a_figure_has_the_errors_of_each_layer() -> None:
    figure = REPORT.plot()
    dots = drawn(figure)
    assert list(dots) == ["nearest", "nearest, held-out samples", "learned", "learned, held-out samples"]
    assert [places for places, _ in dots.values()] == [[0.1, 0.1], [0.2, 0.2], [0.01, 0.5], [0.02, 0.02]]
    assert all([round(place) for place in places] == [0, 1] for _, places in dots.values())
    axes: Axes = figure.axes[0]
    assert axes.get_xscale() == "log"
    # the first layer stands on top
    assert axes.get_ylim()[0] > axes.get_ylim()[1]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["first", "a$x$b (nearest kept)"]
    assert {to_hex(line.get_color()) for line in axes.lines} == {"#ff7f0e", "#1f77b4"}


@pytest.mark.parametrize("value", [0.0, math.nan, math.inf, None])
def test_what_a_logarithmic_scale_cannot_hold_is_left_out(value: float | None) -> None:
    layers = [replace(LAYER, nearest_error=value, nearest_holdout=None, learned_holdout=None)]
    figure = replace(REPORT, layers=layers).plot()
    figure.draw_without_rendering()
    dots = drawn(figure)
    assert list(dots) == ["nearest", "learned"]
    assert math.isnan(dots["nearest"][0][0])
    assert dots["learned"][0] == [0.01]


@pytest.mark.parametrize("layers", [0, 1, 40])
def test_names_are_inside_the_figure_and_apart(layers: int) -> None:
    names = [f"vision_tower.encoder.layers.{i}.self_attention.output_projection" for i in range(layers)]
    figure = replace(REPORT, layers=[replace(LAYER, name=name) for name in names]).plot()
    figure.draw_without_rendering()
    axes: Axes = figure.axes[0]
    boxes = [label.get_window_extent() for label in axes.get_yticklabels()]
    assert len(boxes) == layers
    width, height = figure.bbox.size
    for box in [*boxes, axes.xaxis.label.get_window_extent(), figure.legends[0].get_window_extent()]:
        assert 0 <= box.x0 < box.x1 <= width
        assert 0 <= box.y0 < box.y1 <= height
    assert axes.get_window_extent().width > 400
    assert all(lower.y1 <= upper.y0 for upper, lower in pairwise(boxes))


def test_a_figure_leaves_matplotlib_as_it_was() -> None:
    before = dict(matplotlib.rcParams)
    figures = sys.modules.get("matplotlib.pyplot")
    shown = figures.get_fignums() if figures else []
    REPORT.plot()
    assert dict(matplotlib.rcParams) == before
    after = sys.modules.get("matplotlib.pyplot")
    assert after is figures
    assert (after.get_fignums() if after else []) == shown


@pytest.mark.parametrize(
    ("make", "library", "modules"),
    [
        (Report.to_dataframe, "pandas", ["pandas"]),
        (Report.plot, "matplotlib", ["matplotlib", "matplotlib.figure"]),
    ],
    ids=["pandas", "matplotlib"],
)
def test_a_library_that_is_missing_is_named(make, library, modules, monkeypatch) -> None:
    for module in modules:
        # Python's own way to forbid an import
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingDependencyError, match=rf"{library}: cannot be imported.*adaround_plugin\[report\]"):
        make(REPORT)
