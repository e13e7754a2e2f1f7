"""Statistics of calibration data: declared needs, their collection, their cache."""

from .cache import StatisticsCache, cache_directory
from .collect import LayerCollector
from .gradients import GradientCollector
from .needs import (
    ChannelEnergy,
    ChannelFisher,
    ChannelMagnitude,
    ExpertFrequency,
    ExpertMeans,
    ExpertOutputs,
    Fisher,
    LayerPassed,
    LayerSamples,
    Need,
    RoutedOutputs,
    RouterLogits,
    RouterWeight,
    SecondMoment,
)
from .routed import RoutedSum
from .router import check_needs
from .sizes import size_of
from .values import LayerStatistics, Magnitude, Moment, OutputSums, RoutedSample

__all__ = [
    "ChannelEnergy",
    "ChannelFisher",
    "ChannelMagnitude",
    "ExpertFrequency",
    "ExpertMeans",
    "ExpertOutputs",
    "Fisher",
    "GradientCollector",
    "LayerCollector",
    "LayerPassed",
    "LayerSamples",
    "LayerStatistics",
    "Magnitude",
    "Moment",
    "Need",
    "OutputSums",
    "RoutedOutputs",
    "RoutedSample",
    "RoutedSum",
    "RouterLogits",
    "RouterWeight",
    "SecondMoment",
    "StatisticsCache",
    "cache_directory",
    "check_needs",
    "size_of",
]
