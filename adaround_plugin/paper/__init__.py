"""The AdaRound paper (arXiv 2004.10568) for study: its rounding schemes, problems, variants and solver, one by one.

Imports `regions.calibration`, `hosts`, `graph`, `rounding`, `report`, `names`, `options` and `errors`; nothing of the
package imports it.
"""
