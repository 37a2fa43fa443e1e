"""The pass over a network: methods that decide its layers, blocks, and in the end scales and biases of all of it.

Imports `regions`, `hosts`, `graph`, `solvers`, `rounding`, `report` and `errors`.
"""
