"""Formulas of the pages as MathML when the site is built: browsers show it without a script from the network."""

from __future__ import annotations

import re
from typing import Any

from latex2mathml.converter import convert

__all__ = ["on_page_markdown"]

_FORMULA = re.compile(r"^```math\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put a formula in the place of each block of the language `math`."""
    return _FORMULA.sub(lambda found: f'<div class="formula">{convert(found[1], display="block")}</div>', markdown)
