"""Block after block of a language model: one in float32 at a time, the others as they are stored.

Imports `api`, `deployment`, `hosts`, `graph`, `names`, `report`, `files` and `errors`.
"""
