"""Whole runs start from a tiny random Mixtral."""

from tests.tiny_run import (  # noqa: F401 (fixtures, and names that tests import from here)
    DEMO,
    TEXT,
    cache,
    mixtral,
    save_mixtral,
    write_recipe,
)
