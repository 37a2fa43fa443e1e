"""How many bits each layer needs: what a width costs at the network's output, and which widths fit a budget.

`moments`: of the layers' inputs, from one forward pass. `candidates`: what a width leaves of a weight. `effects`: what
that does to the network's output. `analyze`: all of it for a prepared model. `analysis`: the result, and how it is
shown. `knapsack`: choices under a budget, in numbers alone. `allocation`: bits for each layer. Imports `learning` and
what is below.
"""
