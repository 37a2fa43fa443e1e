"""Other tools that learn how to round, beside ours: the same networks, samples and bits, judged by the same code."""
