"""Write docs/verbs.md, the reference of every verb's options, from the command line itself.

    python tools/verbs_page.py

`tests/test_docs.py` fails where the page and the command differ.
"""

import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer.main

from higgstune.cli.main import app

PAGE = Path(__file__).parent.parent / "docs" / "verbs.md"
HEAD = """# Verbs
Every verb of `higgstune` with its options, as `higgstune VERB --help` shows them.

Exit codes: 0 done; 1 the work or a check failed; 2 an option, a path or the input is wrong; 3 the run is
[not usable](training.md#the-verdict); 130 and 143 stopped by Ctrl-C and SIGTERM. With `--json`, which most verbs have,
the result is one JSON object on stdout; progress goes to stderr. `HIGGSTUNE_TRACEBACK=1` before a command adds the
traceback to an error.
"""


def page() -> str:
    """The whole page, in Markdown."""
    commands = typer.main.get_group(app).commands
    functions = {command.callback.__name__: command.callback for command in app.registered_commands if command.callback}
    sections = [line for name, command in commands.items() for line in _verb(name, command, functions[name])]
    return "\n".join([HEAD, *sections]).rstrip() + "\n"


def _verb(name: str, command: Any, function: Any) -> Iterator[str]:
    """One section: what the verb does, its arguments, its options by group, an example."""
    yield f"## {name}"
    yield " ".join(command.help.split())
    yield ""
    groups: dict[str, list[Any]] = {}
    for parameter in command.params:
        if parameter.name not in ("help", "as_json"):
            groups.setdefault(getattr(parameter, "rich_help_panel", None) or "", []).append(parameter)
    kinds = typing.get_type_hints(function)
    for group, parameters in groups.items():
        yield from [f"{group}:", ""] if group else []
        yield from (_parameter(parameter, kinds[parameter.name]) for parameter in parameters)
        yield ""
    yield f"{command.epilog.replace(': ', ': `', 1)}`"
    yield ""


def _parameter(parameter: Any, kind: Any) -> str:
    """A line of the list: name and value, what it is, its default."""
    argument = parameter.param_type_name == "argument"
    name = (parameter.metavar or parameter.name.upper()) if argument else max(parameter.opts, key=len)
    if not argument and not parameter.is_flag:
        name += f" {parameter.metavar or '|'.join(_choices(kind))}"
    said = " ".join((parameter.help or "").split()).rstrip(".") + "." if parameter.help else ""
    if parameter.required and not argument:
        said += " Required."
    elif isinstance(parameter.default, str | int | float) and not isinstance(parameter.default, bool):
        said += f" Default: {parameter.default}."
    return f"- `{name}` {said.replace('<', '&lt;').replace('*', chr(92) + '*').replace('_', chr(92) + '_')}"


def _choices(kind: Any) -> list[str]:
    """The words of a Literal, also inside `Literal | None`."""
    if typing.get_origin(kind) is typing.Literal:
        return [str(word) for word in typing.get_args(kind)]
    return [word for part in typing.get_args(kind) for word in _choices(part)]


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
