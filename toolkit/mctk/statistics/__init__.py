"""Statistics of calibration data: declared needs, their collection, their cache."""

from .cache import StatisticsCache, cache_directory
from .collect import LayerCollector
from .gradients import GradientCollector
from .needs import (
    ChannelEnergy,
    ExpertFrequency,
    Fisher,
    LayerSamples,
    Need,
    RouterWeight,
    SecondMoment,
)
from .values import LayerStatistics, Moment, size_of

__all__ = [
    "ChannelEnergy",
    "ExpertFrequency",
    "Fisher",
    "GradientCollector",
    "LayerCollector",
    "LayerSamples",
    "LayerStatistics",
    "Moment",
    "Need",
    "RouterWeight",
    "SecondMoment",
    "StatisticsCache",
    "cache_directory",
    "size_of",
]
