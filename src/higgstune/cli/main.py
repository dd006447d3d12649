"""The command `higgstune`: its verbs, exit codes and signals."""

import atexit
import gc
import io
import json
import logging
import os
import signal
import sys
import time
import traceback
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Annotated, NoReturn

import typer

from higgstune.cli import checkup, collect, data, evaluation, export, inspect, recipe, review, speech, training
from higgstune.cli.options import Verb
from higgstune.cli.output import mute_libraries, print_error
from higgstune.errors import HiggstuneError, Interrupted

# Verbs import what needs torch themselves, once the command line is checked: `--help` and typing errors cost nothing.

app = typer.Typer(
    name="higgstune",
    help="Fine-tune Higgs Audio v2 on your own recordings: from a folder of audio to a voice that speaks.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
for _verb, _example in (
    (collect.collect, "collect recordings/ --out data/raw --asr large-v3 --language en"),
    (review.review, "review data/raw"),
    (data.prepare, "prepare recordings/ --out data/voice --speaker anna"),
    (inspect.inspect, "inspect data/voice"),
    (recipe.recipe, "recipe voice"),
    (training.train, "train voice --out runs/voice --set data.store=data/voice"),
    (speech.speak, 'speak "Hello there." --adapter runs/voice --out hello.wav'),
    (evaluation.evaluate, "evaluate runs/voice --set validation --asr large-v3"),
    (evaluation.compare, "compare runs/one runs/two --out comparison --asr large-v3"),
    (export.export, "export runs/voice --out models/voice"),
    (checkup.doctor, "doctor --adapter runs/voice --data data/voice"),
    (checkup.demo, "demo --out runs/demo"),
):
    app.command(cls=Verb, epilog=f"Example: higgstune {_example}")(_verb)

_TRACEBACK = "HIGGSTUNE_TRACEBACK"  # an environment variable
_SHOWN = 500  # characters of an unexpected error
_NO_MEMORY = "can't allocate memory"  # of PyTorch on a CPU, whose error is a plain RuntimeError

# The base of typer's errors for a wrong command line, by its place: its name differs between versions.
_USAGE_ERROR: type[Exception] = typer.BadParameter.__mro__[1]


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        import higgstune

        typer.echo(higgstune.__version__)
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())
        raise typer.Exit(2)


def main() -> NoReturn:
    """Run a verb; exit 0 when done, 1 when the work failed, 2 for wrong input, 3 for a run that is not usable."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    mute_libraries()
    for stream in (sys.stdout, sys.stderr):  # names that are not UTF-8 are printed with escapes, which JSON reads, too
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    signal.signal(signal.SIGTERM, _stop)
    atexit.register(gc.freeze)  # the interpreter would take a second to visit all that torch has made, one by one
    try:
        code = app(prog_name="higgstune", standalone_mode=False)
    except Exception as error:  # noqa: BLE001  (whatever it is, the user gets one line that says what to do)
        if isinstance(error.__cause__, KeyboardInterrupt):  # which some versions of typer turn into an error
            sys.exit(128 + signal.SIGINT)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a launcher that ends the others must not cut the message off
        rank = os.environ.get("RANK")
        message = _message(error)
        _report_to_launcher(message)
        if os.environ.get(_TRACEBACK):
            traceback.print_exception(error)
        print_error(message, "" if rank is None else f" in process {rank}")
        sys.exit(getattr(error, "exit_code", 1))
    sys.exit(code or 0)


def _message(error: Exception) -> str:
    if isinstance(error, HiggstuneError | OSError):
        return str(error)
    if not isinstance(error, _USAGE_ERROR):
        said = f"{type(error).__name__}: {' '.join(str(error).split())}".removesuffix(": ")[:_SHOWN]
        if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or _NO_MEMORY in said:
            return f"there is not enough memory ({said}): close other programs, or use a machine with more"
        if isinstance(error, ImportError):
            return f"{said}; a library is missing or broken: higgstune doctor shows which"
        return f"{said}; this is a fault of Higgstune: {_TRACEBACK}=1 before the command shows where; please report it"
    text = error.format_message().replace("Value error, ", "").rstrip(".")  # type: ignore[attr-defined]
    context = getattr(error, "ctx", None)
    return f"{text}; see {context.command_path if context else 'higgstune'} --help"


def _stop(number: int, _frame: FrameType | None) -> NoReturn:
    """Raise, so that a verb cleans up: a plain SIGTERM would not let it."""
    raise Interrupted(number)


def _report_to_launcher(message: str) -> None:
    """Leave the error where torchrun looks for that of the first process that failed, which it prints last.

    As `torch.distributed.elastic.multiprocessing.errors.ErrorHandler` writes it, but without the traceback that it
    takes a hundred lines for.
    """
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        extra = {"timestamp": str(int(time.time()))}
        if os.environ.get(_TRACEBACK):
            extra["py_callstack"] = traceback.format_exc()
        with suppress(OSError):  # the message is printed in any case
            Path(path).write_text(json.dumps({"message": {"message": message, "extraInfo": extra}}))


if __name__ == "__main__":
    main()
