"""Tests and benchmarks that run the package from end to end."""
