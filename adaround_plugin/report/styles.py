"""The style sheet of the page: light and dark as the reader's system is, and narrow screens."""

from __future__ import annotations

__all__ = ["STYLES"]

STYLES = """
:root { color-scheme: light dark; --paper: #ffffff; --ink: #1d2329; --faint: #5b6670; --line: #d9dee3;
  --panel: #f4f6f8; --before: #b3541e; --after: #1f5fbf; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #14181c; --ink: #e4e8ec; --faint: #9aa5b0; --line: #333b43;
    --panel: #1d2329; --before: #f0a267; --after: #7fb2ff; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 72rem; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; margin: 0.5rem 0; }
h2 { font-size: 1.15rem; margin: 2rem 0 0.5rem; padding-top: 0.75rem; border-top: 1px solid var(--line); }
p { max-width: 48rem; margin: 0.5rem 0; }
.faint, .told, .axis { color: var(--faint); }
p.of { margin: -0.5rem 0 0.75rem 1rem; }
.tiles { display: flex; flex-wrap: wrap; gap: 0.75rem; margin: 0.75rem 0; }
.tile { background: var(--panel); border-radius: 8px; padding: 0.6rem 1rem; min-width: 8rem; flex: 0 1 auto; }
.tile b { display: block; font-size: 1.4rem; font-variant-numeric: tabular-nums; }
.tile span { color: var(--faint); }
.chart { margin: 0.5rem 0; }
.row { display: grid; grid-template-columns: minmax(6rem, 16rem) 1fr minmax(5rem, 12rem); gap: 0 0.75rem;
  align-items: center; }
.row svg { width: 100%; display: block; overflow: visible; }
.row + .row:not(.axis) { border-top: 1px solid var(--line); }
.axis:first-child { position: sticky; top: 0; background: var(--paper); }
.told { font-variant-numeric: tabular-nums; white-space: nowrap; }
svg text { fill: var(--faint); font-size: 12px; }
svg text.before { fill: var(--before); }
svg text.after { fill: var(--after); }
svg .grid { stroke: var(--line); }
svg line.before { stroke: var(--before); stroke-width: 2; }
svg line.after { stroke: var(--after); stroke-width: 2; }
svg circle { stroke-width: 2; }
svg circle.before { stroke: var(--before); fill: var(--before); }
svg circle.after { stroke: var(--after); fill: var(--after); }
svg circle.held { fill: var(--paper); }
svg .bar { fill: var(--after); }
.legend span { display: inline-block; margin-right: 1.25rem; }
.legend i { display: inline-block; width: 11px; height: 11px; border-radius: 50%; border: 2px solid;
  margin-right: 6px; }
.legend i.before { color: var(--before); background: var(--before); }
.legend i.after { color: var(--after); background: var(--after); }
.legend i.held { color: var(--faint); }
.scroll { overflow-x: auto; margin: 0.5rem 0; }
table { border-collapse: collapse; font-size: 0.87rem; font-variant-numeric: tabular-nums; overflow-wrap: normal; }
th, td { text-align: left; vertical-align: top; padding: 0.3rem 0.9rem 0.3rem 0; border-bottom: 1px solid var(--line);
  white-space: nowrap; }
th { font-weight: 600; }
th[scope="row"] { white-space: normal; min-width: min(20rem, 30vw); max-width: 20rem; overflow-wrap: anywhere; }
td:last-child { white-space: normal; min-width: 14rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 0.25rem 1rem; margin: 0.5rem 0; }
dt { color: var(--faint); }
dd { margin: 0; }
pre { background: var(--panel); border-radius: 8px; padding: 0.75rem 1rem; white-space: pre-wrap; font-size: 0.87rem; }
@media (max-width: 60rem) {
  .row { grid-template-columns: 1fr auto; margin-bottom: 0.5rem; }
  .row .name { grid-row: 1; grid-column: 1; }
  .row .told { grid-row: 1; grid-column: 2; }
  .row svg { grid-row: 2; grid-column: 1 / 3; }
  .row.axis { margin-bottom: 0; }
}
"""
