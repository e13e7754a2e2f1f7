"""Comparisons: many methods at many budgets on one model and one calibration, and their tables."""
