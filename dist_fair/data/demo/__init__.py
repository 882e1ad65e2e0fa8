"""The demo faces: drawn portraits, real and forged, that stand in for the photographs nobody may pass on.

`make` writes five folders of shards: a training set, a test set like it, and three that are shifted. Everything is
drawn by this package from a seed; it knows nothing of the methods that are trained on it.
"""

from dist_fair.data.demo.making import VERSION, make
from dist_fair.data.demo.sets import SETS

__all__ = ["SETS", "VERSION", "make"]
