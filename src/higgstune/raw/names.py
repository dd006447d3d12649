"""What a data set's folder holds, by name.

clips/talk.wav-00012340.flac   manifest.jsonl   refused.jsonl   review.csv   review.jsonl   collect.json
"""

import hashlib

CLIPS, MANIFEST, REFUSED = "clips", "manifest.jsonl", "refused.jsonl"
REVIEW, SUMMARY, EDITS, CACHE = "review.csv", "collect.json", "review.jsonl", ".cache"
_MAX_STEM = 120  # bytes of the 255 that a file's name may have: a clip's temporary one also names host and process


def stem_for(recording: str) -> str:
    """What the ids of a recording's utterances begin with: its path, so that no other recording changes them.

    `/` becomes `+`; a path that has one already, or is too long for the name of a clip, ends with a hash of it.
    """
    if "+" not in recording and len(recording.encode()) <= _MAX_STEM:
        return recording.replace("/", "+")
    begin = recording.replace("/", "+").encode()[:_MAX_STEM].decode(errors="ignore")  # not half a character
    return f"{begin}_{hashlib.sha256(recording.encode()).hexdigest()[:12]}"


def utterance_id(stem: str, start: float) -> str:
    """The id of the utterance that begins at `start` seconds of a recording."""
    return f"{stem}-{round(start * 1000):08d}"


def stem_of(utterance: str) -> str:
    """What all ids of its recording begin with."""
    return utterance.rpartition("-")[0]
