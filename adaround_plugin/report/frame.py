"""The layers of a report as a pandas DataFrame (`pip install 'adaround_plugin[report]'`)."""

from __future__ import annotations

from dataclasses import asdict, fields
from typing import TYPE_CHECKING

from adaround_plugin.errors import MissingDependencyError
from adaround_plugin.report.record import LayerReport, Record

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["frame"]


def frame(record: Record) -> pd.DataFrame:
    """A row for each layer, in order, and a column for each attribute of `LayerReport`; NaN where there is no error.

    Raises:
        MissingDependencyError: pandas cannot be imported.
    """
    try:
        import pandas as pd
    except ImportError as error:
        raise MissingDependencyError.of("pandas", "report", error) from error
    columns = [field.name for field in fields(LayerReport)]
    table = pd.DataFrame([asdict(layer) for layer in record.layers], columns=columns)
    # None alone would be a column of objects
    return table.astype({"nearest_holdout": float, "learned_holdout": float})
