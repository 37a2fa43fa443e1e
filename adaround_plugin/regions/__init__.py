"""Parts of a network as functions of the weights in them, and roundings learned on samples at their output.

Imports `hosts`, `graph`, `solvers`, `rounding`, `processes`, `digests`, `names`, `options` and `errors`.
"""
