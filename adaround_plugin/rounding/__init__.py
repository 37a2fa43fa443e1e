"""The mathematics of rounding one weight: grids, second moments, the rounding problem and its relaxation.

Imports torch and `errors` alone.
"""
