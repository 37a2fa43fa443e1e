"""What was learned, in a file, and from a file into a freshly prepared model.

Imports `report`, `hosts`, `graph`, `rounding`, `storage`, `files`, `digests`, `options` and `errors`.
"""
