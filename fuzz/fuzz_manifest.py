"""Fuzzes every reader of sources (manifest, table, ChatML, samples, transcripts), and what is made of their rows."""

import json
import sys

import atheris
from common import damaged, fuzz, scratch

with atheris.instrument_imports(include=["higgstune", "csv"]):
    from hostile_input import FORMATS, ROWS, SAMPLES, check_source, source_folder, source_seeds

NAMES = [
    *("audio", "text", "id", "speaker", "language", "scene", "reference_audio", "reference_text", "start", "end"),
    *(
        "messages",
        "start_index",
        "role",
        "content",
        "type",
        "url",
        "audio_url",
        "offset",
        "duration",
        "as",
        "raw_audio",
    ),
    *("system", "user", "assistant", "recipient", "codes", "whisper", "misc", "samples", "audio_file", "transcript"),
    *("transcript_file", "speaker_id", "ref_audio_file", "ref_transcript", "ref_speakers", "speaker_tag"),
    *("a.wav", "b.wav", "../secret.wav", "out/secret.wav", "/etc/hostname", "..", ".", "a.wav/..", "\0", "Hello."),
    *("<|scene_desc_start|>", "<|scene_desc_end|>", "<|audio_eos|>", "[SPEAKER0]", "[laugh]", "id|text", "\u0301"),
]
WORDS = [*NAMES, '{"', '":', "[[", "]]", "NaN", "Infinity", "1e999", "\\ud800", "\\u0000", "\ufeff", "|", ",", '"']
FOLDER = scratch()
SOURCE = source_folder(FOLDER)


def target(content: bytes) -> None:
    """The first byte says which format the rest is, as it is or as damaged rows."""
    kind = content[0] if content else 0
    if kind < 128:
        check_source(SOURCE, FORMATS[kind % len(FORMATS)], content[1:])
        return
    data = atheris.FuzzedDataProvider(content[1:])
    if kind % 3 == 0:
        rows = damaged(data, ROWS, NAMES)
        lines = [json.dumps(row).encode() for row in rows] if isinstance(rows, list) else [json.dumps(rows).encode()]
        check_source(SOURCE, "manifest.jsonl", b"\n".join(lines))
    elif kind % 3 == 1:
        check_source(SOURCE, "data.json", json.dumps(damaged(data, [ROWS[6], ROWS[7]], NAMES)).encode())
    else:
        check_source(SOURCE, "metadata.json", json.dumps(damaged(data, {"samples": SAMPLES}, NAMES)).encode())


if __name__ == "__main__":
    raw = [bytes([FORMATS.index(name)]) + content for name, content in source_seeds()]
    sys.setrecursionlimit(1000)
    fuzz(target, [*raw, *(bytes([200 + n]) + bytes(range(256)) for n in range(3))], WORDS, FOLDER)
