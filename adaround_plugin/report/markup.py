"""Pieces of HTML, and the page around them: everything that comes from a report is escaped here."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from html import escape

from adaround_plugin.report.styles import STYLES

__all__ = ["breakable", "document", "escaped", "paragraph", "section", "table"]


def escaped(text: object) -> str:
    """Text that HTML shows as it is, also between quotes."""
    return escape(str(text), quote=True)


def breakable(name: str) -> str:
    """A qualified name that may go on in the next line behind its dots and underscores; numbers are not torn apart."""
    return re.sub(r"(?<=[._])(?!\d)", "<wbr>", escaped(name))


def paragraph(text: object, kind: str = "") -> str:
    """Plain text as a paragraph of a class."""
    return f'<p class="{kind}">{escaped(text)}</p>'


def section(title: str, *parts: str) -> str:
    """A heading, and the HTML below it; nothing where there is none."""
    body = "\n".join(part for part in parts if part)
    return f"<section>\n<h2>{escaped(title)}</h2>\n{body}\n</section>" if body else ""


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in a frame that scrolls where it is too wide; nothing where there are no rows.

    Args:
        head, rows: plain text of the cells. The first cell of each row is its heading, often a qualified name.
    """
    if not rows:
        return ""
    heads = "".join(f'<th scope="col">{escaped(cell)}</th>' for cell in head)
    lines = [f"<tr>{heads}</tr>"]
    for first, *others in rows:
        cells = "".join(f"<td>{escaped(cell)}</td>" for cell in others)
        lines.append(f'<tr><th scope="row">{breakable(first)}</th>{cells}</tr>')
    body = "\n".join(lines)
    return f'<div class="scroll"><table>\n{body}\n</table></div>'


def document(title: str, parts: Iterable[str]) -> str:
    """One page that needs nothing beside itself: no network, no script, no other file.

    Args:
        title: plain text.
        parts: HTML; empty ones are left out.
    """
    # whatever a name holds, nothing is fetched and nothing is run
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<title>{escaped(title)}</title>
<style>{STYLES}</style>
</head>
<body>
<h1>{escaped(title)}</h1>
{chr(10).join(part for part in parts if part)}
</body>
</html>
"""
