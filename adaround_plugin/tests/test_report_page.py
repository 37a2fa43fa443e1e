"""A report as a page: well formed, complete, escaped, alone, and written all or nothing."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from adaround_plugin.errors import InvalidOptionError
from adaround_plugin.report import BlockReport, ClippedActivation, LayerReport, RecipeTrial, Report

NASTY = """<script>alert("1")</script> & 'quoted' a_b \ud800"""
LAYER = LayerReport("encoder.first", "Conv2d", (), (4, 3), 3, 0.1, 0.01, 0.2, 0.02, True, 0.25, 0.015, "kept", 10, 1.25)
REPORT = Report(
    method="blocks",
    solver="Annealing",
    recipe="errors propagated",
    layers=[LAYER, replace(LAYER, name="head", learned=False, note="nearest kept: it is better")],
    skipped=[("embedding", "Embedding", "already optimal")],
    trials=[RecipeTrial("errors propagated", 0.125, taken=True), RecipeTrial("others", None, "no derivative")],
    blocks=[BlockReport("encoder", ("encoder.first", "head"), 0.5, 0.25, 0.6, 0.3, 300, 1.5, "entries weighed alike")],
    finetuning=BlockReport("network", ("encoder.first", "head"), 0.25, 0.2, iterations=7),
    output_error=0.04,
    nearest_output_error=0.16,
    seconds={"setup": 0.5, "solve": 1.0, "total": 2.0},
    settings={"method": "BlockWise(blocks=['a'])", "seed": "3"},
    versions={"torch": "2.13.0"},
)
VOID = {"meta", "wbr", "br", "rect", "line", "circle"}


class Page(HTMLParser):
    """The elements of a page with their attributes, and its text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID or tag == "circle":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def places(self, kind: str) -> list[float]:
        """Where the dots of a class stand, in percent."""
        return [
            float((attributes["cx"] or "").rstrip("%"))
            for tag, attributes in self.elements
            if tag == "circle" and kind == (attributes["class"] or "").strip()
        ]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "report.html"


def written(report: Report, path: Path) -> Page:
    report.to_html(path)
    return Page(path.read_text(encoding="utf-8"))


def test_everything_is_on_the_page(path: Path) -> None:
    text = written(REPORT, path).text
    for told in (
        *("blocks", "Annealing", "errors propagated", "torch 2.13.0", "1 of 2 learned, 1 skipped"),
        *("0.04", "0.16", "25.0%"),
        *("encoder.first", "head (nearest kept)", "0.1 → 0.01", "4x3", "1.5%"),
        *("encoder", "network", "0.5 → 0.25", "300"),
        *("nearest kept: it is better", "entries weighed alike", "already optimal"),
        *("0.125", "others: no derivative"),
        *("2.00 s in total.", "solve", "1.00 s", "0.50 s"),
        "adaround(\n    prepared,\n    data,\n    BlockWise(blocks=['a']),\n    seed=3,\n)",
    ):
        assert told in text


def test_one_trial_is_marked_as_taken(path: Path) -> None:
    REPORT.to_html(path)
    rows = re.findall(r"<tr>.*?</tr>", path.read_text(encoding="utf-8"))
    assert [row for row in rows if "<td>yes</td>" in row] == [
        '<tr><th scope="row">0.125</th><td>yes</td><td>errors propagated</td></tr>'
    ]


def test_the_page_needs_nothing_beside_itself(path: Path) -> None:
    page = written(REPORT, path)
    assert {tag for tag, _ in page.elements}.isdisjoint({"script", "link", "img", "iframe", "object", "embed"})
    names = {name for _, attributes in page.elements for name in attributes}
    assert names.isdisjoint({"src", "href", "style", "srcset"})
    html = path.read_text(encoding="utf-8")
    assert "url(" not in html
    assert "@import" not in html
    policies = [attributes["content"] for _, attributes in page.elements if "http-equiv" in attributes]
    assert policies == ["default-src 'none'; style-src 'unsafe-inline'"]
    assert "prefers-color-scheme: dark" in html


def test_texts_are_shown_as_they_are(path: Path) -> None:
    report = Report(
        method=NASTY,
        solver=NASTY,
        recipe=NASTY,
        layers=[replace(LAYER, name=NASTY, kind=NASTY, bias=NASTY, note=NASTY)],
        skipped=[(NASTY, NASTY, NASTY)],
        trials=[RecipeTrial(NASTY, None, NASTY)],
        blocks=[BlockReport(NASTY, (NASTY,), 0.5, 0.25, note=NASTY)],
        seconds={NASTY: 1.0},
        settings={"method": NASTY, NASTY: NASTY, "seed": NASTY},
        versions={NASTY: NASTY},
    )
    page = written(report, path)
    assert {tag for tag, _ in page.elements} == {tag for tag, _ in written(REPORT, path).elements}
    # UTF-8 has no lone surrogates; everything else is as it was
    shown = NASTY.removesuffix("\ud800")
    assert page.text.count(shown) > 20
    assert report._repr_html_().count("<script>") == 0


def test_errors_stand_where_a_logarithmic_scale_has_them(path: Path) -> None:
    page = written(replace(REPORT, layers=[LAYER], blocks=[], finetuning=None), path)
    # from 0.01 to 1: two decades
    (nearest,), (learned,) = page.places("before"), page.places("after")
    assert nearest - learned == pytest.approx(46)
    (held_nearest,), (held_learned,) = page.places("before held"), page.places("after held")
    for held, of in ((held_nearest, nearest), (held_learned, learned)):
        assert held - of == pytest.approx(46 * math.log10(2), abs=0.011)
    assert all(0 < place < 100 for place in (nearest, learned, held_nearest, held_learned))


def test_every_layer_has_its_row_and_every_dot_its_figure(path: Path) -> None:
    layers = [replace(LAYER, name=f"layer.{i}", nearest_error=10.0**-i) for i in range(12)]
    page = written(replace(REPORT, layers=layers, blocks=[], finetuning=None), path)
    assert [len(page.places(kind)) for kind in ("before", "after", "before held", "after held")] == [12] * 4
    assert all(f"nearest: {10.0**-i:.3g}" in page.text and f"layer.{i}" in page.text for i in range(12))
    # more decades than there is room for labels
    labels = [attributes for tag, attributes in page.elements if tag == "text"]
    assert 4 <= len(labels) / 2 <= 8


@pytest.mark.parametrize("value", [0.0, -0.5, math.nan, math.inf, None])
def test_what_a_logarithmic_scale_cannot_hold_is_written_and_not_drawn(path: Path, value: float | None) -> None:
    strange = replace(LAYER, nearest_error=value, nearest_holdout=None, learned_holdout=None)
    page = written(replace(REPORT, layers=[strange], blocks=[], finetuning=None), path)
    assert (len(page.places("before")), len(page.places("after"))) == (0, 1)
    assert f"{'-' if value is None else f'{value:.3g}'} → 0.01" in page.text
    assert "held-out samples" not in page.text.partition("Layers")[2].partition("layer")[0]


def test_a_warning_says_what_to_do_and_names_the_activations(path: Path) -> None:
    clipped = [
        ClippedActivation("x", -1.0, 1.0, -250.0, 2.5, 0.5),
        ClippedActivation("add in a.b", 0.0, 6.0, 0, 9, 0.9),
    ]
    report = replace(REPORT, clipped=clipped)
    text = written(report, path).text
    for told in ("in 2 activations", "first 'x'", "'add in a.b' (90.0% of its values", "Calibrate with the batches"):
        assert told in text
        assert told in str(report).splitlines()[-2]
    for told in ("-1 … 1", "-250 … 2.5", "50.0%", "Warnings"):
        assert told in text
    assert "Warnings" not in written(REPORT, path).text
    assert "warning" not in str(REPORT)


def test_memory_and_scales_are_on_the_page(path: Path) -> None:
    layers = [
        replace(LAYER, least_scale=0.01, median_scale=0.1, greatest_scale=1.0),
        replace(LAYER, name="one", least_scale=0.1, median_scale=0.1, greatest_scale=0.1),
        replace(LAYER, name="none", least_scale=0.0, median_scale=0.1, greatest_scale=0.1),
    ]
    memory = {"process": 1_234_000_000, "spilled": 0}
    page = written(replace(REPORT, layers=layers, memory=memory, blocks=[], finetuning=None), path)
    for told in ("process", "1,234 MB", "spilled", "0 MB", "0.01 … 1", "0 … 0.1"):
        assert told in page.text
    medians = [attributes["cx"] for tag, attributes in page.elements if tag == "circle" and attributes["r"] == "3.5"]
    # from 0.01 to 1; what is no positive number is only written
    assert medians == ["50.00%", "50.00%"]
    assert "Scales" not in written(REPORT, path).text


def test_an_empty_report_is_a_page_without_empty_sections(path: Path) -> None:
    page = written(Report("nearest", "Nearest", "plain", [], []), path)
    assert [tag for tag, _ in page.elements].count("h2") == 1
    assert "0 of 0 learned" in page.text
    assert "over nearest" not in page.text


def test_a_page_takes_the_place_of_an_older_one_and_leaves_nothing_else(path: Path) -> None:
    path.write_text("old")
    REPORT.to_html(str(path))
    assert path.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(("value", "said"), [(3, "not a path"), (b"a", "not a path"), (None, "not a path")])
def test_what_is_no_path_is_refused(value: object, said: str) -> None:
    with pytest.raises(InvalidOptionError, match=f"path: .*{said}.*Pass a string"):
        REPORT.to_html(value)


def test_folders_are_refused_where_a_file_is_meant(tmp_path: Path) -> None:
    with pytest.raises(InvalidOptionError, match=r"path: .* is a folder"):
        REPORT.to_html(tmp_path)
    with pytest.raises(InvalidOptionError, match=r"path: the folder '.*none' does not exist"):
        REPORT.to_html(tmp_path / "none" / "report.html")
    assert list(tmp_path.iterdir()) == []


def test_a_notebook_gets_the_table_and_the_sentence() -> None:
    page = Page(REPORT._repr_html_())
    rows = [tag for tag, _ in page.elements].count("tr")
    assert rows == 1 + len(REPORT.layers)
    assert str(REPORT).splitlines()[-1] in page.text
