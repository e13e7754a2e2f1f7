"""On tensors alone: truncated SVD in the metric of a second moment, orders and clusters."""

from mctk.linalg.agglomerate import agglomerate, cosines
from mctk.linalg.known import Known, remembered
from mctk.linalg.metric_svd import MetricSVD, loss, metric_svd, update_left
from mctk.linalg.neurons import assign, match, orders, reorder
from mctk.linalg.root import Root, square_root

__all__ = [
    "Known",
    "MetricSVD",
    "Root",
    "agglomerate",
    "assign",
    "cosines",
    "loss",
    "match",
    "metric_svd",
    "orders",
    "remembered",
    "reorder",
    "square_root",
    "update_left",
]
