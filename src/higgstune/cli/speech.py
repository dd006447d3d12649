"""The verb `speak`."""

import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Annotated, BinaryIO

import typer

from higgstune.cli.endings import warn_of_unusable
from higgstune.cli.lines import clips_of_lines, one_clip
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
from higgstune.cli.output import Bar, announced, errors, print_result
from higgstune.errors import ConfigError, WorkError
from higgstune.files import NOTHING_KEPT, writing

_PIPE = Path("-")
_FRAME_RATE = 25.0  # frames a second of the codecs so far; the one that is loaded checks a reference by its own


def speak(
    text: Annotated[str | None, typer.Argument(help="What to say.")] = None,
    out: Annotated[
        Path | None,
        typer.Option(parser=path, metavar="FILE", help="A .wav file (speech.wav); with --file, a folder (speech)."),
    ] = None,
    stream: Annotated[
        bool, typer.Option("--stream", help="Write the speech while it is made; --out - writes to a player's pipe.")
    ] = False,
    file: Annotated[
        Path | None,
        typer.Option(
            parser=path,
            metavar="FILE",
            help="Text file, one clip a line. Lines that cannot be spoken are named, and the exit code is 1.",
        ),
    ] = None,
    adapter: Annotated[
        Path | None,
        typer.Option(
            parser=path, metavar="FOLDER", help="The voice: folder of a run or an adapter.", rich_help_panel=VOICE
        ),
    ] = None,
    reference: Annotated[
        Path | None,
        typer.Option(parser=path, metavar="FILE", help="Recording of a voice to imitate.", rich_help_panel=VOICE),
    ] = None,
    reference_text: Annotated[
        str | None, typer.Option(metavar="TEXT", help="What is said in that recording.", rich_help_panel=VOICE)
    ] = None,
    scene: Annotated[
        str | None,
        typer.Option(metavar="TEXT", help='Description of the scene; "" for none.', rich_help_panel=VOICE),
    ] = None,
    temperature: TemperatureOption = None,
    top_p: Annotated[
        float | None,
        typer.Option(
            metavar="P",
            callback=within(0, 1, above=True),
            help="Draw only from the likeliest codes, which have this probability together: lower is safer; 1 is off.",
            rich_help_panel=SAMPLING,
        ),
    ] = None,
    top_k: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            callback=within(0),
            help="Draw only from the N likeliest codes; 0 is off.",
            rich_help_panel=SAMPLING,
        ),
    ] = None,
    seed: SeedOption = 0,
    max_seconds: Annotated[
        float | None,
        typer.Option(
            metavar="SECONDS",
            callback=within(0, 3600, above=True),
            help="Longest piece; default: by the length of the text.",
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
    check: Annotated[
        str | None,
        typer.Option(
            metavar="JUDGE",
            help="An ASR (a Whisper by name or folder, or a command): a piece with over a fifth of its words wrong is "
            "spoken again, at most twice.",
            rich_help_panel=SAMPLING,
        ),
    ] = None,
    batch_size: Annotated[
        int, typer.Option(metavar="N", callback=within(1), help="Clips spoken at a time.", rich_help_panel=DEVICE)
    ] = 8,
    as_json: JsonOption = False,
) -> None:
    """Speak a text, or each line of a file."""
    from higgstune.data.clips import read_reference, spoken_text
    from higgstune.data.messages import DEFAULT_SCENE, check_control_tokens
    from higgstune.data.rules import TAGGED

    if stream and (file is not None or as_json or check is not None):
        raise ConfigError("--stream speaks one text for a player: leave out --file, --check and --json")
    if text is not None and file is None:
        clips, refused = one_clip(text, out or Path("speech.wav"), piped=stream and out == _PIPE)
    elif file is not None and text is None:
        clips, refused = clips_of_lines(file, out or Path("speech"))
    else:
        raise ConfigError("give either a text or --file")
    if adapter is None and model is None:
        raise ConfigError("name a base (--model) or an adapter (--adapter)")
    base = base_spec(model, revision=revision, codec=codec, device=device, quantize=quantize)
    if reference is None and reference_text is not None:
        raise ConfigError("--reference-text needs the recording in which it is said: --reference")
    if reference is not None:
        read_reference(reference, _FRAME_RATE, reference_text or "")
    if reference_text:
        spoken_text(reference_text, "--reference-text", TAGGED)
    check_control_tokens(scene or "", "--scene")
    folder = None if adapter is None else named_adapter(adapter, base)
    if adapter is not None:
        warn_of_unusable(adapter)
    for reason in refused:
        errors.print(f"not spoken: {reason}")
    with announced("loading the model", as_json):
        from higgstune.data.audio import WavStream
        from higgstune.generate.added import family_to_speak, trained_place
        from higgstune.generate.speaker import Speaker, check_transcript, warn_of_duration
        from higgstune.generate.speech import Request
        from higgstune.model.load import load_base

    if check is not None:
        from higgstune.environment import choose_device
        from higgstune.evaluation.asr_errors import word_check
        from higgstune.evaluation.judges import load_clip_transcriber

        asr = load_clip_transcriber(check, choose_device(base.device).type)
    if reference is not None:  # before the model is loaded
        place = trained_place(folder, None if model is None else Path(model))
        check_transcript(family_to_speak(folder, model), place, reference_text or "")
    speaker = Speaker(load_base(base, folder), folder, whisper=whisper)
    voice = None if reference is None else speaker.reference(reference, reference_text or "")
    scene = DEFAULT_SCENE if scene is None else scene or None
    requests = [Request(clip.text, voice, scene, seed + clip.place) for clip in clips]
    sampling = speaker.sampling.with_(temperature=temperature, top_k=top_k, top_p=top_p)
    if stream:
        with _opened(clips[0].out) as target:
            growing = WavStream(target, speaker.codec.sample_rate, speaker.generated_by)
            try:
                for part in speaker.stream(
                    clips[0].text, reference=voice, scene=scene, sampling=sampling, seed=seed, max_seconds=max_seconds
                ):
                    growing.write(part)
            finally:  # what was spoken can be played, whatever ended it
                growing.close()
        if clips[0].out != _PIPE:
            print_result({"files": [str(clips[0].out)]}, as_json)
        return
    spoken = speaker.speak_ready(
        requests, sampling=sampling, max_seconds=max_seconds, batch_size=batch_size,
        check=None if check is None else word_check(asr, speaker.codec.sample_rate),
    )  # fmt: skip
    again = 0
    with Bar() as bar:
        for done, (number, speech) in enumerate(spoken, 1):
            speech.save(clips[number].out)  # at once: a long list that is stopped keeps them
            warn_of_duration(speech)
            again += speech.spoken_again
            bar("speaking", done, len(clips))
    print_result(
        {
            "files": [str(clip.out) for clip in clips],
            **({"spoken_again": again} if check is not None else {}),
            **({"not_spoken": refused} if refused else {}),
        },
        as_json,
    )
    if refused:
        raise WorkError(f"{len(refused)} of {len(refused) + len(clips)} lines of {file} were not spoken: correct them")


def _opened(out: Path) -> AbstractContextManager[BinaryIO]:
    if out == _PIPE:
        return nullcontext(sys.stdout.buffer)
    with writing(out, NOTHING_KEPT):
        out.parent.mkdir(parents=True, exist_ok=True)
        return out.open("wb")
