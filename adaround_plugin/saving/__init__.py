"""What was learned, in a file, and from a file into a freshly prepared model.

`observers`: what activation observers report. `layers`: integers, grids and biases as tensors of a file. `rounding`:
the two functions. May import the hosts and graphs, the report, and how files are written.
"""
