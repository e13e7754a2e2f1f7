"""`mctk plugins`: what is installed, what is broken, and every method's options."""

from __future__ import annotations

import json
from typing import Any, get_args, get_origin

import click

from mctk.cli import completion
from mctk.cli.tables import print_table
from mctk.hookspecs import OLDEST, SPEC, Method
from mctk.registry import OWN, PluginInfo, Registry, calling, load_plugins
from mctk.tensors import method as find_method

_BOUNDS = {
    "minimum": "at least",
    "exclusiveMinimum": "above",
    "maximum": "at most",
    "exclusiveMaximum": "below",
}


@click.group(invoke_without_command=True)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_context
def command(ctx: click.Context, as_json: bool) -> None:
    """List the methods that recipes can name, by stage, and plugins that are broken.

    MCTK_PLUGINS="a,b" loads only these. A broken plugin is shown with the reason and breaks nothing
    else; with --debug its traceback is shown.
    """
    if ctx.invoked_subcommand is not None:
        return
    registry = load_plugins()
    if as_json:
        plugins = [
            {
                "name": info.name,
                "version": info.version,
                "distribution": info.distribution,
                "spec": info.spec,
                "methods": info.methods,
                "broken": info.broken,
            }
            for info in registry.plugins()
        ]
        methods = [_brief(registry, method) for method in registry.methods()]
        spec = {"version": SPEC, "oldest": OLDEST}
        click.echo(json.dumps({"methods": methods, "plugins": plugins, "spec": spec}, indent=2))
        return
    columns = ("stage", "method", "version", "plugin", "summary", "reference")
    rows = [[_brief(registry, method)[key] for key in columns] for method in registry.methods()]
    if rows:
        print_table(columns, rows)
    else:
        click.echo("No methods are installed.")
    broken = [info for info in registry.plugins() if info.broken]
    for info in broken:
        click.echo(f"broken: {_plugin(info)}: {info.error}")
        if (ctx.obj or {}).get("debug"):
            click.echo(info.traceback)
    if broken and not (ctx.obj or {}).get("debug"):
        click.echo("What is broken is left out, all else works. --debug shows tracebacks.")


@command.command()
@click.argument("method", shell_complete=completion.methods)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def show(method: str, as_json: bool) -> None:
    """Show METHOD ("svd" or "decompose/svd"): its options, what it needs, its reference."""
    registry = load_plugins()
    found = find_method(method, registry)
    about = _brief(registry, found) | {
        "scope": None if found.stage == "allocate" else found.scope,
        "takes_size": found.takes_size,
        "units": found.units if found.takes_size else None,
        "propagate": None if found.stage == "allocate" else found.propagate,
        "needs": _needs(found),
        "options": _options(found),
    }
    if as_json:
        click.echo(json.dumps(about, indent=2))
        return
    for key, value in about.items():
        if key not in ("needs", "options") and value not in (None, ""):
            click.echo(f"{key + ':':12}{_text(value)}")
    for bank, needs in about["needs"].items():
        click.echo(f"{'needs:':12}{bank}: {', '.join(needs) or 'nothing'}")
    if about["options"]:
        rows = [[_text(value) for value in option.values()] for option in about["options"]]
        print_table(("option", "type", "default", "description"), rows)
    else:
        click.echo("It has no options.")


def _brief(registry: Registry, method: Method) -> dict[str, Any]:
    return {
        "stage": method.stage,
        "method": method.name,
        "version": method.version,
        "plugin": _plugin(registry.plugin_of(method)),
        "summary": method.summary,
        "reference": method.reference,
    }


def _plugin(info: PluginInfo) -> str:
    """Its name, and the release that it comes from if that is not mctk's."""
    foreign = info.distribution not in ("", OWN)
    return f"{info.name} ({info.distribution} {info.version})" if foreign else info.name


def _options(method: Method) -> list[dict[str, Any]]:
    properties = method.Options.model_json_schema().get("properties", {})
    rows = []
    for name, field in method.Options.model_fields.items():
        schema = properties[name]
        bounds = [f"{word} {schema[key]}" for key, word in _BOUNDS.items() if key in schema]
        rows.append(
            {
                "name": name,
                "type": ", ".join([_type(field.annotation), *bounds]),
                "default": "required" if field.is_required() else schema.get("default"),
                "description": field.description,
            }
        )
    return rows


def _needs(method: Method) -> dict[str, list[str]]:
    """Returns the needs for two banks of experts with H = 32 and I = 64, with default options."""
    if method.stage == "allocate":
        return {}
    from mctk.terms import BankShape

    shapes = {"experts.up": BankShape(8, 64, 32), "experts.down": BankShape(8, 32, 64)}
    required = any(field.is_required() for field in method.Options.model_fields.values())
    if required:
        return {bank: ["depends on the options"] for bank in shapes}
    options = method.Options()
    with calling(method, "needs"):
        return {
            bank: [repr(need) for need in method.needs(shape, bank, options)]
            for bank, shape in shapes.items()
        }


def _type(annotation: Any) -> str:
    if annotation is type(None):
        return "null"
    parts = get_args(annotation)
    if not parts:
        return getattr(annotation, "__name__", str(annotation))
    if str(get_origin(annotation)) == "typing.Literal":
        return " | ".join(map(str, parts))
    inner = [_type(part) for part in parts]
    if getattr(get_origin(annotation), "__name__", "") in ("Union", "UnionType"):
        return " | ".join(inner)
    return f"{getattr(get_origin(annotation), '__name__', annotation)}[{', '.join(inner)}]"


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
