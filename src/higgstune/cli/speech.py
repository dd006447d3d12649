"""The verb `speak`."""

from pathlib import Path
from typing import Annotated

import typer

from higgstune.cli.options import (
    DEVICE,
    MODEL,
    SAMPLING,
    VOICE,
    CodecOption,
    DeviceOption,
    JsonOption,
    QuantizeOption,
    RevisionOption,
    SeedOption,
    TemperatureOption,
    WhisperOption,
    base_spec,
    named_adapter,
    path,
    within,
)
from higgstune.cli.output import Bar, announced, errors, escape, print_result
from higgstune.errors import ConfigError
from higgstune.inputs import check_wav_name, is_unusable_run


def speak(
    text: Annotated[str | None, typer.Argument(help="What to say.")] = None,
    out: Annotated[Path, typer.Option(parser=path, metavar="FILE", help="A .wav file; with --file, a folder.")] = Path(
        "speech.wav"
    ),
    file: Annotated[Path | None, typer.Option(parser=path, metavar="FILE", help="Text file, one clip a line.")] = None,
    adapter: Annotated[
        Path | None, typer.Option(parser=path, metavar="FOLDER", help="An adapter, or a run.", rich_help_panel=VOICE)
    ] = None,
    reference: Annotated[
        Path | None,
        typer.Option(parser=path, metavar="FILE", help="Recording of a voice to imitate.", rich_help_panel=VOICE),
    ] = None,
    reference_text: Annotated[
        str | None, typer.Option(metavar="TEXT", help="What is said in it.", rich_help_panel=VOICE)
    ] = None,
    scene: Annotated[
        str | None,
        typer.Option(metavar="TEXT", help='Description of the scene; "" for none.', rich_help_panel=VOICE),
    ] = None,
    temperature: TemperatureOption = 1.0,
    top_p: Annotated[
        float,
        typer.Option(
            metavar="P",
            callback=within(0, 1, above=True),
            help="Draw from the likeliest codes that make up this probability; 1 is off.",
            rich_help_panel=SAMPLING,
        ),
    ] = 0.95,
    top_k: Annotated[
        int,
        typer.Option(
            metavar="N", callback=within(0), help="Draw from the N likeliest codes; 0 is off.", rich_help_panel=SAMPLING
        ),
    ] = 50,
    seed: SeedOption = 0,
    max_seconds: Annotated[
        float | None,
        typer.Option(
            metavar="SECONDS",
            callback=within(0, above=True),
            help="Longest piece; default: from the text's length.",
            rich_help_panel=SAMPLING,
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Base checkpoint; an adapter knows its own.", rich_help_panel=MODEL),
    ] = None,
    revision: RevisionOption = None,
    codec: CodecOption = None,
    whisper: WhisperOption = None,
    device: DeviceOption = "auto",
    quantize: QuantizeOption = None,
    batch_size: Annotated[
        int, typer.Option(metavar="N", callback=within(1), help="Clips spoken at a time.", rich_help_panel=DEVICE)
    ] = 8,
    as_json: JsonOption = False,
) -> None:
    """Speak a text, or each line of a file."""
    if text is not None and file is None:
        texts, files = [text], [out]
    elif file is not None and text is None:
        texts = _lines(file)
        files = [out / f"{number:04d}.wav" for number in range(1, len(texts) + 1)]
    else:
        raise ConfigError("give either a text or --file")
    for name in files:
        check_wav_name(name)
    if adapter is None and model is None:
        raise ConfigError("name a base (--model) or an adapter (--adapter)")
    base = base_spec(model, revision=revision, codec=codec, device=device, quantize=quantize)
    if text is not None and not text.strip():
        raise ConfigError("the text to speak is empty")
    if reference is None and reference_text is not None:
        raise ConfigError("--reference-text needs the recording in which it is said: --reference")
    if reference is not None and not reference.is_file():
        raise ConfigError(f"--reference {reference} does not exist")
    folder = None if adapter is None else named_adapter(adapter, base)
    if adapter is not None and is_unusable_run(adapter):
        errors.print(f"warning: the run {escape(str(adapter))} is not usable; its report says why", soft_wrap=True)
    with announced("loading the model", as_json):
        from higgstune.data.messages import DEFAULT_SCENE
        from higgstune.families.sampling import Sampling
        from higgstune.generate.speaker import Request, Speaker, check_transcript, trained_place, warn_of_duration
        from higgstune.model.load import load_base

    if reference is not None:  # before the model is loaded
        check_transcript(trained_place(folder, None if model is None else Path(model)), reference_text or "")
    speaker = Speaker(load_base(base, folder), folder, whisper=whisper)
    voice = None if reference is None else speaker.reference(reference, reference_text or "")
    scene = DEFAULT_SCENE if scene is None else scene or None
    requests = [Request(text, voice, scene, seed + index) for index, text in enumerate(texts)]
    spoken = speaker.speak_all(
        requests, sampling=Sampling(temperature, top_k, top_p), max_seconds=max_seconds, batch_size=batch_size
    )
    with Bar() as bar:
        for done, (name, speech) in enumerate(zip(files, spoken, strict=True), 1):
            speech.save(name)  # at once: a long list that is stopped keeps them
            warn_of_duration(speech)
            bar("speaking", done, len(texts))
    print_result({"files": [str(path) for path in files]}, as_json)


def _lines(file: Path) -> list[str]:
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ConfigError(f"--file {file} cannot be read: {reason}") from error
    if not any(lines):
        raise ConfigError(f"--file {file} has no text")
    return [line for line in lines if line]
