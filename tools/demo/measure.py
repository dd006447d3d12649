"""Measure the miniature's codec and base: what the demo's report cannot, because the package has no such recordings.

    python tools/demo/make_voices.py held-out hibari corpus/held-out
    python tools/demo/measure.py corpus/held-out --asr JUDGE --speaker-judge JUDGE --quality-judge JUDGE

The recordings are of new sentences in the base's voice. The base says the same sentences, and sentences with words that
no corpus has, at the sampling that it recommends. Prints a JSON line a set. Judges as for `higgstune evaluate`.
"""

import argparse
import json
import time
from pathlib import Path
from statistics import mean

from fit_codec import read_corpus
from texts import PROSE

from higgstune.codec import CODEC_FOLDER, load_codec
from higgstune.data.audio import write_wav
from higgstune.demo.demo import stopped
from higgstune.evaluation.asr_errors import word_error_rate
from higgstune.evaluation.judges import load_judges
from higgstune.evaluation.judges.base import Judges
from higgstune.generate.speaker import load
from higgstune.generate.speech import Request
from higgstune.inputs import BaseSpec

ASSETS = Path("src/higgstune/demo/assets")


def judged(name: str, files: list[Path], texts: list[str], references: list[Path], judges: Judges) -> dict[str, object]:
    """The measures of a set of clips; similarities are to the recordings."""
    found: dict[str, object] = {"clips": name, "number": len(files)}
    if judges.asr is not None:
        found["word error rate"] = round(word_error_rate(texts, judges.asr.transcribe(files, language="en")), 4)
    if judges.speaker is not None:
        similarities = judges.speaker.similarities(references, files)
        found |= {model: round(mean(values), 3) for model, values in similarities.items()}
    if judges.quality is not None:
        found |= {name: round(mean(values), 3) for name, values in judges.quality.rate(files).items()}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recordings", type=Path)
    parser.add_argument("--base", type=Path, default=ASSETS / "base")
    parser.add_argument("--codec", type=Path, default=ASSETS / CODEC_FOLDER)
    parser.add_argument("--out", type=Path, default=Path("corpus/measured"))
    parser.add_argument("--asr")
    parser.add_argument("--speaker-judge")
    parser.add_argument("--quality-judge")
    args = parser.parse_args()
    judges = load_judges(args.asr, args.speaker_judge, args.quality_judge)
    codec = load_codec(args.codec)
    rows, recorded, decoded, seconds, spent = [], [], [], 0.0, 0.0
    for row, waveform in read_corpus(args.recordings):
        rows.append(row)
        recorded.append(args.recordings / row["audio"])
        codes = codec.encode(waveform)
        started = time.process_time()
        found = codec.decode(codes)
        spent += time.process_time() - started
        seconds += len(found) / codec.sample_rate
        decoded.append(args.out / "round_trip" / f"{row['id']}.wav")
        write_wav(decoded[-1], found, codec.sample_rate)
    texts = [row["text"] for row in rows]
    print(json.dumps(judged("recordings", recorded, texts, recorded, judges)), flush=True)
    through = judged("round trip", decoded, texts, recorded, judges)
    print(json.dumps(through | {"real-time factor": round(spent / seconds, 4)}), flush=True)
    base = load(args.base, base=BaseSpec(codec=args.codec, device="cpu"))
    for name, said in (("base, held-out sentences", texts), ("base, ordinary prose", list(PROSE))):
        requests = [Request(text, seed=seed) for seed, text in enumerate(said)]
        spoken = list(base.speak_all(requests))
        files = [args.out / name.replace(", ", "-").replace(" ", "_") / f"{i:02d}.wav" for i in range(len(spoken))]
        for file, speech in zip(files, spoken, strict=True):
            speech.save(file)
        in_time = {"stop in time": mean(map(stopped, spoken))}
        print(json.dumps(judged(name, files, said, recorded, judges) | in_time), flush=True)


if __name__ == "__main__":
    main()
