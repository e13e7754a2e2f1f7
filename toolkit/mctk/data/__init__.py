"""Text: sources of documents, and the token windows that are cut from them."""

from mctk.data.chat import check_template
from mctk.data.documents import load_documents
from mctk.data.sources import MixedSource, Source, TextError
from mctk.data.windows import TokenWindows, calibration_windows, evaluation_windows, shares

__all__ = [
    "MixedSource",
    "Source",
    "TextError",
    "TokenWindows",
    "calibration_windows",
    "check_template",
    "evaluation_windows",
    "load_documents",
    "shares",
]
