"""The pass over a network: methods that decide its layers, blocks, and in the end scales and biases of all of it.

Imports `report`, `regions`, `hosts`, `graph`, `solvers`, `rounding`, `processes`, `process_memory`, `storage`,
`files`, `digests`, `options` and `errors`.
"""
