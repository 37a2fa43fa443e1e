"""What was done to each layer: plain data, and how they are shown.

`record`: the data. `text`: as a table. `page`: as a page, made of `charts` and `markup` with `styles`. `report`: the
class that a user gets. `frame` and `figure` import pandas and matplotlib when they are asked. Imports `files` and
`errors`.
"""

from adaround_plugin.report.record import BlockReport, LayerReport, RecipeTrial
from adaround_plugin.report.report import KEY, Report, get_report

__all__ = ["KEY", "BlockReport", "LayerReport", "RecipeTrial", "Report", "get_report"]
