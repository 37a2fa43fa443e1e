"""Prepared models of torch's FX flow (`fx`) and of torchao's PT2E flow (`pt2e`) behind one contract, `base.Host`.

Imports `graph`, `rounding`, `names` and `errors`; `open`, which tells the hosts apart, alone imports both of them.
"""
