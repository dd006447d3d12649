"""What a data set's folder holds, by name.

clips/talk-00012340.flac   manifest.jsonl   refused.jsonl   review.csv   review.jsonl   collect.json
"""

CLIPS, MANIFEST, REFUSED = "clips", "manifest.jsonl", "refused.jsonl"
REVIEW, SUMMARY, EDITS, CACHE = "review.csv", "collect.json", "review.jsonl", ".cache"


def utterance_id(stem: str, start: float) -> str:
    """The id of the utterance that begins at `start` seconds of a recording."""
    return f"{stem}-{round(start * 1000):08d}"


def stem_of(utterance: str) -> str:
    """What all ids of its recording begin with."""
    return utterance.rpartition("-")[0]
