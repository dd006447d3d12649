"""Options that several verbs of the command have."""

from pathlib import Path
from typing import Annotated

import typer

JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
RunArgument = Annotated[Path, typer.Argument(help="Folder of a run (its last finished stage) or of an adapter.")]
NewFolderOption = Annotated[Path, typer.Option(help="Folder to write; it must not exist.")]
BaseOption = Annotated[str | None, typer.Option(help="The base that the adapter was trained on, where it has moved.")]
RevisionOption = Annotated[str | None, typer.Option(help="Commit, tag or branch of the base at the hub.")]
CodecOption = Annotated[str | None, typer.Option(help="The codec that it was trained with, where it has moved.")]
CompareOption = Annotated[
    Path | None, typer.Option(help="Code store to compare on; where not given, the one that was trained on.")
]
StoredOption = Annotated[
    str | None, typer.Option(help="float32 or bfloat16, of the weights written; where not given, the base's.")
]
EncoderOption = Annotated[
    str | None, typer.Option(help="Whisper checkpoint for the original layout, where it has moved.")
]
DropOption = Annotated[
    bool, typer.Option("--drop-modules", help="Leave out what has no place in the native class; the card says so.")
]
SetOption = Annotated[
    str,
    typer.Option(
        "--set",
        help="validation (rows of the store), a text file with a sentence a line, a meta.lst, or built-in sentences: "
        "en, de, zh, ar, vi, es.",
    ),
]
RowsOption = Annotated[
    Path | None, typer.Option(help="Code store with rows and voices; where not given, the one that was trained on.")
]
AsrOption = Annotated[
    str | None, typer.Option(help="Judge of what is said: a Whisper checkpoint by name or folder, or a command.")
]
SpeakerOption = Annotated[
    str | None,
    typer.Option(help="Judge of whose voice it is: a WavLM checkpoint, or a command; auto: WavLM-SV if on this disk."),
]
QualityOption = Annotated[str | None, typer.Option(help="Judge of naturalness: distillmos, or a command.")]
TemperatureOption = Annotated[float, typer.Option(help="0 is greedy.")]
SeedOption = Annotated[int, typer.Option(min=0, max=2**62, help="Of what is spoken and of the intervals.")]
LimitOption = Annotated[int | None, typer.Option(min=1, help="At the most so many texts of a set; of rows 100.")]
LanguageOption = Annotated[
    str | None, typer.Option(help="Of sentences that name none, such as en; the store's, where it has only one.")
]
WhisperOption = Annotated[
    str | None, typer.Option(help="Whisper checkpoint of a model that listens, where it has moved.")
]
QuantizeOption = Annotated[str | None, typer.Option(help="4bit: the base in 4 bits, for a small GPU.")]
