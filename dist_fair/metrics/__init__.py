"""Utility and fairness of predictions: pure functions of NumPy arrays, in float64."""

from dist_fair.metrics.evaluation import evaluate
from dist_fair.metrics.predictions import Predictions

__all__ = ["Predictions", "evaluate"]
