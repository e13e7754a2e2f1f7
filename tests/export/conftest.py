"""Fixtures of whole runs, and a way to call commands."""

from tests.cli.conftest import mctk, refused  # noqa: F401 (fixtures)
from tests.tiny_run import cache, mixtral, write_recipe  # noqa: F401 (fixtures)
