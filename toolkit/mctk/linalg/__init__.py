"""Linear algebra on tensors: truncated SVD in the metric of a second moment."""

from mctk.linalg.metric_svd import MetricSVD, loss, metric_svd
from mctk.linalg.root import Root, square_root

__all__ = ["MetricSVD", "Root", "loss", "metric_svd", "square_root"]
