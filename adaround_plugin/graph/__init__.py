"""Graphs of torch.fx, whoever made them: walking them piece by piece, rewriting copies, calling their operators.

Imports `rounding`, `digests`, `options` and `errors`; every private name of torch that the package needs stands in
`compat`.
"""
