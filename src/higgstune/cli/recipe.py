"""The verb `recipe`: recipes that ship with Higgstune, to look at and to edit."""

import shlex
from pathlib import Path
from typing import Annotated

import typer

from higgstune.cli.options import JsonOption, path
from higgstune.cli.output import print_next, print_result
from higgstune.config.shipped import shipped_recipes, summary_of
from higgstune.errors import ConfigError
from higgstune.files import NOTHING_KEPT, check_folder, check_new, write_file, writing


def recipe(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="Which to write out; without it, all are listed.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(parser=path, metavar="FILE", help="File to write; default: NAME.yaml.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """List the recipes that ship with Higgstune, or write one out to edit.

    `higgstune train NAME` takes one as it is.
    """
    shipped = shipped_recipes()
    if name is None:
        if out is not None:
            raise ConfigError(f"--out needs a name: one of {', '.join(shipped)}")
        _list(shipped, as_json)
        return
    if name not in shipped:
        from higgstune.data.rejection import did_you_mean

        raise ConfigError(f"there is no recipe {name!r}; {did_you_mean(name, shipped)}")
    plain = Path(name).name
    out = out or Path(f"{plain}.yaml")
    check_new(out)
    check_folder(out.parent)
    train = ("higgstune", "train", str(out))
    content = shipped[name].read_text(encoding="utf-8").replace(f"higgstune train {name} ", f"{shlex.join(train)} ")
    with writing(out, NOTHING_KEPT):
        out.parent.mkdir(parents=True, exist_ok=True)
    write_file(out, content)
    print_result({"recipe": name, "file": str(out)} if as_json else {"wrote": out}, as_json)
    if not as_json:
        print_next(*train, "--out", f"runs/{plain}", before="edit it, then")


def _list(shipped: dict[str, Path], as_json: bool) -> None:
    summaries = {name: summary_of(file) for name, file in shipped.items()}
    if as_json:
        print_result({"recipes": summaries}, as_json)
        return
    width = max(map(len, summaries))
    for name, summary in summaries.items():
        typer.echo(f"{name:<{width}}  {summary}")
    print_next("higgstune", "train", "NAME", "--out", "FOLDER")
    print_next("higgstune", "recipe", "NAME", before="to edit one first:")
