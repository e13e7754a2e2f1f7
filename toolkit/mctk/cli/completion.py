"""What the shell completes beside commands, options and files: names of recipes and methods."""

from __future__ import annotations

import click
from click.shell_completion import CompletionItem


def recipes(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Files, and the recipes that come with mctk."""
    # The file item goes first: in bash it empties the list, and files stand in where no name fits.
    return [CompletionItem(incomplete, type="file"), *recipe_names(ctx, param, incomplete)]


def recipe_names(
    ctx: click.Context, param: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """The recipes that come with mctk."""
    from mctk.recipe.shipped import shipped_recipes

    found = shipped_recipes().values()
    return [CompletionItem(r.name, help=r.about) for r in found if r.name.startswith(incomplete)]


def methods(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Methods by name, or once there is a slash by stage/name."""
    from mctk.registry import load_plugins

    known = {
        f"{m.stage}/{m.name}" if "/" in incomplete else m.name: m.summary
        for m in load_plugins().methods()
    }
    return [CompletionItem(n, help=about) for n, about in known.items() if n.startswith(incomplete)]
