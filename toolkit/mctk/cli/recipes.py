"""`mctk recipes`: what comes with mctk to run at once, or to start from."""

from __future__ import annotations

import json

import click

from mctk.cli import completion

EPILOG = """\b
Examples:
  mctk recipes
  mctk recipes show d2moe_mixtral > mine.yaml
  mctk run d2moe_mixtral --model path/to/model --device cuda:0
  mctk compare compare_mixtral --plan

`run`, `plan` and `compare` take these names where they take files; a file of that name goes
first."""


class _Recipes(click.Group):
    """Says of a recipe's name in the place of a subcommand's what to write."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args[0] not in self.commands and not args[0].startswith("-"):
            from mctk.errors import UserError
            from mctk.recipe.shipped import shipped_names

            if args[0] in shipped_names():
                raise UserError(f"to print a recipe: mctk recipes show {args[0]}")
        return super().resolve_command(ctx, args)


@click.group(cls=_Recipes, epilog=EPILOG, invoke_without_command=True)
@click.option("--json", "as_json", is_flag=True, help="Print the list as JSON.")
@click.pass_context
def command(ctx: click.Context, as_json: bool) -> None:
    """List the recipes that come with mctk; print one of them."""
    if ctx.invoked_subcommand is not None:
        return
    from mctk.cli.tables import print_table
    from mctk.recipe.shipped import shipped_recipes

    found = shipped_recipes().values()
    if as_json:
        listed = [
            {"name": r.name, "command": r.command, "model": r.model, "about": r.about}
            for r in found
        ]
        click.echo(json.dumps(listed, indent=2, ensure_ascii=False))
        return
    rows = [[r.name, f"mctk {r.command}", r.model, r.about] for r in found]
    print_table(["recipe", "command", "model", "what it does"], rows)


@command.command()
@click.argument("name", shell_complete=completion.recipe_names)
def show(name: str) -> None:
    """Print the recipe NAME, to start one's own from."""
    from mctk.errors import UserError, nearest
    from mctk.recipe.shipped import shipped_recipes

    found = shipped_recipes()
    if name not in found:
        raise UserError(f"no recipe '{name}' comes with mctk{nearest(name, found)}")
    click.echo(found[name].path.read_text(encoding="utf-8"), nl=False)
