"""Looking at a model starts from a tiny random Mixtral."""

from tests.tiny_run import cache, mixtral, write_recipe  # noqa: F401 (fixtures)
