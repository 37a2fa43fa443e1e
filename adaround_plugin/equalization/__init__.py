"""Cross-layer equalization of a float model, before it is prepared (Nagel et al. 2019, arXiv 1906.04721).

Imports `regions.calibration`, `graph`, `rounding` and `errors`.
"""
