"""What people write in the place of what is meant is answered by what to write."""

from __future__ import annotations

import pytest


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["recipes", "d2moe_mixtral"], "mctk recipes show d2moe_mixtral"),
        (["plugins", "show", "d2moe"], "'d2moe' is a plugin; its methods are merge/fisher,"),
        (["inspect", __file__], "is a file; give the model's directory"),
        (["inspect", "nonexistent"], "no directory nonexistent here, and nonexistent is not in"),
    ],
)
def test_hints(refused, arguments, message):
    assert message in refused(*arguments)


def test_a_bare_number_as_a_budget(refused, write_recipe):
    assert "write {remove: 0.4} or {keep: 0.4}" in refused(
        "plan", write_recipe(), "--set", "budget=0.4"
    )
