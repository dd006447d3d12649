# ruff: noqa: T201
"""A caller of every public name, for a type checker alone: nobody runs it."""

from pathlib import Path

import numpy as np

import higgstune as hg


def notebook() -> hg.Speech:
    hours: float = hg.collect("raw/", "recordings", language="en").kept_hours
    print(hours)
    prepared = hg.prepare("recordings/", "data/voice", speaker="anna")
    accepted: int = prepared.accepted["train"]
    recipe: hg.Recipe = hg.Recipe.load("voice.yaml").with_({"stages.0.max_steps": 50 + accepted})
    fits: bool | None = hg.plan(recipe, memory="16GB").fits
    assert fits
    run = hg.train(recipe, "runs/voice")
    steps: int = run.stages["voice"].steps
    voice: hg.Speaker = hg.load(run.folder, device="cuda")
    clip = voice.speak("Good morning", reference="a.wav", sampling=hg.Sampling(temperature=0.7), seed=steps)
    samples: int = len(clip.waveform)
    seconds: float = samples / clip.sample_rate - clip.seconds
    print(seconds, clip.save("morning.wav"))
    anna: hg.Voice = voice.reference("a.wav", "What is said.")
    requests = [hg.Request(text, anna, seed=seed) for seed, text in enumerate(["Hello.", "Good night."])]
    return next(voice.speak_all(requests, batch_size=2))


def verbs(base: hg.BaseSpec) -> Path:
    evaluation = hg.evaluate("runs/voice", base=base, limit=10)
    rate: float = evaluation.texts.systems["adapter"].summary["wer"].value
    best: str | None = hg.compare(["runs/a", "runs/b"], out="runs/compared", base=base).best
    passed: bool = hg.doctor(base, adapter="runs/voice").passed
    prompt: str = hg.inspect_row("data/voice", 0).prompt
    print(rate, best, passed, prompt, hg.__version__)
    try:
        return hg.export("runs/voice", "models/voice", format="native", base=hg.BaseSpec(device="cpu")).folder
    except hg.HiggstuneError as error:
        raise SystemExit(error.exit_code) from error


def parts(trainer: hg.HiggsAudioTrainer) -> None:
    loaded: hg.ModelAndTokenizers = hg.load_model_and_tokenizers("models/base", device="cpu", quantize="4bit")
    model = hg.load_adapter(hg.load_model("models/base"), Path("runs/voice/stage2/adapter"))
    advice: str = hg.check_applied(model, "runs/voice/stage2/adapter").advice
    rate: int = hg.load_whisper("openai/whisper-large-v3").sample_rate
    ids, labels = hg.build_frames(np.zeros((10, loaded.spec.num_codebooks), dtype=np.int64))
    frames: int = len(ids) + len(labels)
    text: str = hg.render([], generation=True)
    print(trainer.loaded, advice, rate, frames, text)
