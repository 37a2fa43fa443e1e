"""The FX flow of `torch.ao.quantization`: its weight and activation observers, mappings, and prepared models.

Imports what stands beside it in `hosts`, and below.
"""
