"""Text: sources of documents, and the token windows that are cut from them."""

from mctk.data.sources import MixedSource, Source, TextError, load_documents
from mctk.data.windows import TokenWindows, calibration_windows, evaluation_windows

__all__ = [
    "MixedSource",
    "Source",
    "TextError",
    "TokenWindows",
    "calibration_windows",
    "evaluation_windows",
    "load_documents",
]
