"""Rows of plain data as a pandas DataFrame (`pip install 'adaround_plugin[report]'`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, fields
from typing import TYPE_CHECKING

from adaround_plugin.errors import MissingDependencyError

if TYPE_CHECKING:
    import pandas as pd
    from _typeshed import DataclassInstance

__all__ = ["frame"]


def frame(rows: Sequence[DataclassInstance], kind: type[DataclassInstance], numbers: Sequence[str]) -> pd.DataFrame:
    """A row for each object, in order, and a column for each attribute.

    Args:
        rows: of one dataclass, `kind`.
        numbers: attributes that may be None in place of a number, which becomes NaN.

    Raises:
        MissingDependencyError: pandas cannot be imported.
    """
    try:
        import pandas as pd
    except ImportError as error:
        raise MissingDependencyError.of("pandas", "report", error) from error
    table = pd.DataFrame([asdict(row) for row in rows], columns=[field.name for field in fields(kind)])
    # None alone would be a column of objects
    return table.astype(dict.fromkeys(numbers, float))
