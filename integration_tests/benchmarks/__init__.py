"""Benchmark data, networks and training: rendered glyphs and small classifiers of them."""
