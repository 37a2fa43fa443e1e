"""Pages as Chromium shows them: light and dark, wide and narrow, without a network.

Skipped where playwright or Chromium is missing.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from adaround_plugin import BlockWise, Finetune, adaround, analyze, get_report
from integration_tests.documentation_site import build_site
from integration_tests.pt2e_models import prepared_pt2e, x86

# of a phone, a tablet, a window just wider than what the style sheet calls narrow, a screen; in pixels
WIDTHS = (360, 768, 961, 1280)

# What a reader would miss: runs in the page, returns a list of sentences.
#
# Text in a box that scrolls counts as seen. Contrast is that of WCAG 2.2, 1.4.3: (L1 + 0.05) / (L2 + 0.05) of relative
# luminances, 4.5 at least.
LOOK = """
() => {
  const found = [];
  const width = document.documentElement.clientWidth;
  if (document.documentElement.scrollWidth > width) found.push("the page scrolls sideways");

  const scrolls = element => {
    for (let one = element; one; one = one.parentElement)
      if (["auto", "scroll"].includes(getComputedStyle(one).overflowX)) return one;
    return null;
  };
  const channels = colour => colour.match(/[\\d.]+/g).map(Number);
  const luminance = colour => {
    const [r, g, b] = channels(colour).map(c => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = element => {
    for (let one = element; one; one = one.parentElement) {
      const colour = getComputedStyle(one).backgroundColor, [, , , alpha = 1] = channels(colour);
      if (alpha === 1) return colour;
    }
    return "rgb(255, 255, 255)";
  };
  const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (texts.nextNode()) {
    const element = texts.currentNode.parentElement, said = texts.currentNode.data.trim();
    if (!said || ["STYLE", "SCRIPT", "title"].includes(element.tagName)) continue;
    const range = document.createRange();
    range.selectNodeContents(texts.currentNode);
    const frame = scrolls(element);
    for (const { left, right } of range.getClientRects())
      if (!frame && (left < 0 || right > width + 0.5)) found.push(`cut off: ${said}`);
    if (frame && frame.getBoundingClientRect().right > width + 0.5) found.push(`its frame is cut off: ${said}`);
    const style = getComputedStyle(element), inked = element.ownerSVGElement ? style.fill : style.color;
    const [dark, light] = [luminance(inked), luminance(behind(element))].sort((a, b) => a - b);
    const contrast = (light + 0.05) / (dark + 0.05);
    if (contrast < 4.5) found.push(`contrast ${contrast.toFixed(2)}: ${said}`);
  }

  const meet = (kind, elements) => {
    const boxes = elements.map(one => {
      const range = document.createRange();
      range.selectNodeContents(one);
      return [one.textContent.trim(), range.getBoundingClientRect()];
    }).filter(([, box]) => box.width);
    for (const [i, [a, one]] of boxes.entries())
      for (const [b, other] of boxes.slice(i + 1))
        if (one.left < other.right && other.left < one.right && one.top < other.bottom && other.top < one.bottom)
          found.push(`${kind} overlap: ${a} | ${b}`);
  };
  for (const axis of document.querySelectorAll(".axis svg")) meet("labels", [...axis.querySelectorAll("text")]);
  for (const row of document.querySelectorAll(".row:not(.axis)"))
    meet("cells", [...row.children]);
  return found;
}
"""

# the documentation's theme is not ours: its contrast is not looked at
WIDER = "() => document.documentElement.scrollWidth > document.documentElement.clientWidth"


class Names(nn.Module):
    """Layers whose names are longer than a phone is wide."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder_of_the_first_modality = nn.ModuleDict(
            {"convolution_that_mixes_neighbouring_samples_before_they_are_attended_to": nn.Conv2d(3, 8, 3)}
        )
        self.h = nn.Linear(8, 5)
        self.embedding = nn.Embedding(4, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        (first,) = self.encoder_of_the_first_modality.values()
        return self.h(torch.relu(first(x)).mean((2, 3))) + self.embedding.weight.sum(0)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api")
    program = shutil.which("chromium") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("there is no Chromium on the path")
    with sync_api.sync_playwright() as started:
        shown = started.chromium.launch(executable_path=program)
        yield shown
        shown.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report with warnings, blocks, notes and finetuning, and an analysis; of one network."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("pages")
    data = [torch.randn(4, 3, 8, 8) for _ in range(4)]
    prepared = prepared_pt2e(Names().eval(), data, x86())
    learned = adaround(
        prepared,
        [8 * batch for batch in data],
        BlockWise(iterations=4),
        finetune=Finetune(iterations=2),
        progress=False,
    )
    report = get_report(learned)
    assert report.clipped
    assert report.blocks
    assert report.finetuning
    report.to_html(folder / "report.html")
    analyze(prepared, data, progress=False).to_html(folder / "analysis.html")
    return folder


def opened(browser: Any, path: Path, width: int, scheme: str = "light") -> Iterator[Any]:
    """The page as it is shown; what it asks of the network, and complaints of the browser, fail."""
    context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
    wrong: list[str] = []
    page = context.new_page()
    page.on("request", lambda one: None if one.url.startswith(("file:", "data:", "blob:")) else wrong.append(one.url))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda told: wrong.append(told.text) if told.type == "error" else None)
    page.goto(path.as_uri())
    yield page
    context.close()
    assert wrong == []


@pytest.mark.parametrize("name", ["report", "analysis"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_nothing_is_cut_off_or_faint(browser: Any, pages: Path, name: str, scheme: str, width: int) -> None:
    for page in opened(browser, pages / f"{name}.html", width, scheme):
        assert page.evaluate(LOOK) == []
        paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (paper == "rgb(255, 255, 255)") == (scheme == "light")


def test_the_look_finds_what_is_wrong(browser: Any, tmp_path: Path) -> None:
    path = tmp_path / "wrong.html"
    path.write_text(
        "<body><p style='width: 3000px'>"
        + "wide " * 200
        + "</p><p style='color: #999'>faint</p><div class='row'><i>one</i><i style='margin-left: -9px'>two</i></div>"
    )
    for page in opened(browser, path, 360):
        found = " ".join(page.evaluate(LOOK))
        assert all(told in found for told in ("sideways", "cut off: wide", "2.85: faint", "cells overlap: one | two"))


def test_the_documentation_fits_a_phone_and_asks_nothing_of_the_network(browser: Any, tmp_path: Path) -> None:
    built = build_site(tmp_path / "site")
    # the page for what a server does not find links from the server's root
    for path in (one for one in built if one.name != "404.html"):
        for page in opened(browser, path, WIDTHS[0]):
            assert not page.evaluate(WIDER), path.name
