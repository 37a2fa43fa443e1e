"""The AdaRound paper (arXiv 2004.10568) to the letter, for study: its method, its forms, its variants, its solver.

Imports `learning`, and what `learning` may import.
"""
