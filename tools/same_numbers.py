"""Whether a change of the code has changed a number: a reference before it, and a comparison after it.

    python tools/same_numbers.py write before.json      on the commit that the change starts from
    python tools/same_numbers.py compare before.json    after it, on the same machine

Both train two stages like the demo's with validations that speak (30 steps each, stopped and resumed in the second),
a run with audio attention and Whisper, and runs on two processes (DDP and FSDP2); evaluate and export. What is kept:
every logged loss, learning rate and gradient norm, the codes and waveforms of what was spoken, measures, planned
memory, and a checksum of each tensor that was written. All on one thread; a comparison is bit by bit. About 5 minutes.
"""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # before torch: sums of equal order
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import yaml
from safetensors import safe_open
from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperForConditionalGeneration

import higgstune

ASSETS = Path(higgstune.__file__).parent / "demo" / "assets"
SENTENCES = ["The sun rises in the east.", "She gave me her new address before the train left."]
EVALUATION = {"clips": 2, "temperature": 1.0}


def main(action: str, file: Path) -> int:
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Path(folder))
    if action == "write":
        file.write_text(json.dumps(found, indent=1), encoding="utf-8")
        print(f"{sum(1 for _ in leaves(found))} values in {file}")
        return 0
    before = dict(leaves(json.loads(file.read_text(encoding="utf-8"))))
    after = dict(leaves(json.loads(json.dumps(found))))
    odd = sorted(key for key in before.keys() | after.keys() if before.get(key) != after.get(key))
    for key in odd[:40]:
        print(f"{key}: before {before.get(key)}, after {after.get(key)}")
    print(f"{len(odd)} of {len(before)} values differ" if odd else f"equal: {len(before)} values")
    return 1 if odd else 0


def measure(world: Path) -> dict[str, Any]:
    """All values, by what made them."""
    make_world(world)
    found: dict[str, Any] = {"store": codes_of_store(world / "data")}
    voice = write_recipe(world, "voice", steps=30)
    found["plan"] = plan(voice)
    train_in_two_parts(voice, world / "voice")
    found["voice"] = run_values(world / "voice")
    found["voice"]["speech"] = speech(world / "voice")
    found["evaluation"] = evaluation(world)
    for name, options in {"native": ["--dtype", "float32"], "boson": ["--dtype", "float32"], "peft": []}.items():
        higgstune_verb("export", world / "voice", "--out", world / name, "--format", name, *options)
        found[name] = tensors(world / name)
    conditioned = {"audio_attention": "full", "whisper": str(world / "whisper")}
    recipe = write_recipe(world, "conditioned", steps=10, model=conditioned, data={"reference": "scene"})
    higgstune_verb("train", recipe, "--out", world / "conditioned")
    found["conditioned"] = run_values(world / "conditioned")
    for parallel in ("ddp", "fsdp"):
        recipe = write_recipe(world, parallel, steps=10, parallel=parallel)
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        call([*launcher, "-m", "higgstune", "train", str(recipe), "--out", str(world / parallel)])
        found[parallel] = run_values(world / parallel)
    return found


def make_world(world: Path) -> None:
    """The demo's base with its codec, a Whisper encoder with random weights, and a store of 30 clips."""
    shutil.copytree(ASSETS / "base", world / "base")
    shutil.copytree(ASSETS / "codec", world / "base" / "codec")
    shutil.copytree(ASSETS / "voices", world / "voices")
    rows = [json.loads(line) for line in (world / "voices" / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]
    chosen = [row for row in rows if row["speaker"] == "rms"][:30]
    manifest = world / "voices" / "rms.jsonl"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in chosen), encoding="utf-8")
    write_whisper(world / "whisper")
    higgstune_verb(
        "prepare", manifest, "--out", world / "data", "--model", world / "base", "--whisper", world / "whisper",
        "--references", "same_speaker", "--validation-fraction", "0.12",
    )  # fmt: skip


def write_whisper(folder: Path) -> None:
    import torch

    torch.manual_seed(0)
    WhisperForConditionalGeneration(
        WhisperConfig(
            vocab_size=64, num_mel_bins=16, d_model=32, encoder_layers=2, encoder_attention_heads=4,
            encoder_ffn_dim=64, decoder_layers=1, decoder_attention_heads=4, decoder_ffn_dim=64,
            max_source_positions=500, max_target_positions=16, pad_token_id=0, bos_token_id=1, eos_token_id=2,
            decoder_start_token_id=1,
        )
    ).save_pretrained(folder)  # fmt: skip
    WhisperFeatureExtractor(feature_size=16, chunk_length=10).save_pretrained(folder)


def write_recipe(world: Path, name: str, *, steps: int, **changes: Any) -> Path:
    """The demo's recipe with other lengths, and with a stage for text before its own."""
    recipe = yaml.safe_load((ASSETS / "recipe.yaml").read_text(encoding="utf-8"))
    recipe["model"] |= {"checkpoint": str(world / "base")} | changes.pop("model", {})
    recipe["data"] |= {"store": str(world / "data")} | changes.pop("data", {})
    [stage] = recipe["stages"]
    stage |= {"max_steps": steps, "warmup_steps": 5}
    recipe["stages"] = [stage | {"name": "stage1", "kind": "text"}, stage | {"name": "stage2"}]
    recipe |= {"log_steps": 1, "eval_steps": steps // 2, "save_steps": 10, "evaluation": EVALUATION} | changes
    path = world / f"{name}.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return path


def train_in_two_parts(recipe: Path, out: Path) -> None:
    """Stopped by SIGTERM some time after step 10 of the second stage, and resumed."""
    process = subprocess.Popen([*HIGGSTUNE, "train", str(recipe), "--out", str(out)], stderr=subprocess.DEVNULL)
    checkpoint = out / "stage2" / "checkpoints" / "checkpoint-10"
    while not checkpoint.exists() and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    if (code := process.wait()) != 128 + signal.SIGTERM:
        raise SystemExit(f"a run that was stopped ended with {code}")
    higgstune_verb("train", recipe, "--out", out, "--resume")


def run_values(run: Path) -> dict[str, Any]:
    """Of each stage what was logged, but for times; what was spoken, and the adapter."""
    stages = json.loads((run / "run.json").read_text(encoding="utf-8"))["stages"]
    return {
        name: {
            "history": [{k: v for k, v in entry.items() if "second" not in k} for entry in result["history"]],
            "parameters": result["parameters"],
            "verification": result["verification"]["from_base"],
            "spoken": [digest(path.read_bytes()) for path in sorted((run / name).glob("*/step*/**/*.wav"))],
            "adapter": tensors(run / name / "adapter"),
        }
        for name, result in stages.items()
    }


def speech(run: Path) -> list[Any]:
    """Codes of sentences, greedy and drawn."""
    from higgstune.data.messages import speech_messages
    from higgstune.families.sampling import Sampling
    from higgstune.generate.engine import generate
    from higgstune.generate.speaker import load

    speaker = load(run, device="cpu")
    prompts = [speaker.prompter.prompt(speech_messages(text), []) for text in SENTENCES]
    return [
        clip.codes.tolist()
        for temperature in (0.0, 1.0)
        for clip in generate(speaker.model, prompts, max_frames=[60, 60], seeds=[1, 2], sampling=Sampling(temperature))
    ]


def evaluation(world: Path) -> dict[str, Any]:
    out = world / "evaluation"
    summary = higgstune_verb("evaluate", world / "voice", "--out", out, "--limit", "3", "--json")
    systems = json.loads(summary)["systems"]
    waveforms = sorted(out.rglob("*.wav"), key=lambda path: digest(path.read_bytes()))
    return {
        "spoken": [digest(path.read_bytes()) for path in waveforms],
        "measures": {name: found["summary"] for name, found in systems.items()},
    }


def plan(recipe: Path) -> Any:
    planned = json.loads(higgstune_verb("train", recipe, "--out", recipe.with_suffix(""), "--plan", "--json"))
    for stage in planned["stages"]:
        stage["memory"].pop("process")  # what the libraries of this process take: it follows imports
    return [{key: stage[key] for key in ("steps", "memory")} for stage in planned["stages"]]


def codes_of_store(folder: Path) -> list[str]:
    from higgstune.data.store import CodeStore

    return [digest(row.id.encode() + row.codes.tobytes()) for row in CodeStore.open(folder).rows()]


def tensors(folder: Path) -> dict[str, str]:
    """A checksum for each tensor of a folder's safetensors, by its name."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "numpy") as file:
            for key in file.keys():  # noqa: SIM118
                found[key] = digest(file.get_tensor(key).tobytes())
    return found


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every plain value of a tree, by its path."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from leaves(item, f"{path}/{key}")
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from leaves(item, f"{path}/{index}")
    else:
        yield path, value


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


HIGGSTUNE = [sys.executable, "-m", "higgstune"]


def higgstune_verb(*words: Any) -> str:
    return call([*HIGGSTUNE, *map(str, words)])


def call(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command)}\nended with {done.returncode}:\n{done.stderr[-4000:]}")
    return done.stdout


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] not in ("write", "compare"):
        raise SystemExit(__doc__)
    raise SystemExit(main(sys.argv[1], Path(sys.argv[2])))
