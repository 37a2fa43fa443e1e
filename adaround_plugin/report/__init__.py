"""What was done to each layer: plain data, and how they are shown.

`record`: the data. `text`: as a table. `page`: as a page, made of `charts` and `markup` with `styles`. `report`: the
class that a user gets. `frame`, `figure` and `terminal` need pandas, matplotlib and rich, which are imported when they
are asked for. Imports `files` and `errors`.
"""

from adaround_plugin.report.record import BlockReport, ClippedActivation, LayerReport, RecipeTrial
from adaround_plugin.report.report import KEY, Report, get_report, set_report

__all__ = [
    "KEY",
    "BlockReport",
    "ClippedActivation",
    "LayerReport",
    "RecipeTrial",
    "Report",
    "get_report",
    "set_report",
]
