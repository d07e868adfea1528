"""How the benchmarks show what they measured."""

import itertools
import statistics


def spread(values):
    """Return the median of some values and, in brackets, the least and the greatest."""
    return f"{statistics.median(values):7.2f}  ({min(values):.2f} to {max(values):.2f})"


def steps(sizes, values):
    """Return how ``values`` grow from each of the ``sizes`` to the next, against how the sizes do: 1 is linear."""
    pairs = zip(itertools.pairwise(sizes), itertools.pairwise(values), strict=True)
    return [(later / earlier) / (large / small) for (small, large), (earlier, later) in pairs]
