"""Fine-tune Higgs Audio v2 on your own recordings: prepare, train in two stages, speak.

import higgstune as hg

hg.prepare("recordings/", "data/voice", speaker="anna")
recipe = hg.Recipe.load("voice").with_({"stages.0.epochs": 2})
run = hg.train(recipe, "runs/voice")
voice = hg.load(run.folder, device="cuda")
clip = voice.speak("Good morning", reference="a.wav", reference_text="What is said in it.")
clip.save("morning.wav")
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from higgstune.codec.whisper_encoder import load_whisper as load_whisper
    from higgstune.config.recipe import Recipe as Recipe
    from higgstune.data.prepare import prepare as prepare
    from higgstune.diagnostics.adapter import check_applied as check_applied
    from higgstune.diagnostics.examine import doctor as doctor
    from higgstune.diagnostics.inspect_row import inspect_row as inspect_row
    from higgstune.errors import HiggstuneError as HiggstuneError
    from higgstune.evaluation.compare import compare as compare
    from higgstune.evaluation.evaluate import evaluate as evaluate
    from higgstune.exporting.export import export as export
    from higgstune.families.higgs_v2.delay import build_frames as build_frames
    from higgstune.families.higgs_v2.prompt import render as render
    from higgstune.families.sampling import Sampling as Sampling
    from higgstune.generate.speaker import Speaker as Speaker
    from higgstune.generate.speaker import load as load
    from higgstune.generate.speech import Request as Request
    from higgstune.generate.speech import Speech as Speech
    from higgstune.generate.speech import Voice as Voice
    from higgstune.inputs import BaseSpec as BaseSpec
    from higgstune.model.adapters import load_adapter as load_adapter
    from higgstune.model.load import ModelAndTokenizers as ModelAndTokenizers
    from higgstune.model.load import load_model as load_model
    from higgstune.model.load import load_model_and_tokenizers as load_model_and_tokenizers
    from higgstune.planning.report import plan as plan
    from higgstune.raw.collect import collect as collect
    from higgstune.training.run import train as train
    from higgstune.training.trainer import HiggsAudioTrainer as HiggsAudioTrainer

__version__ = "0.1.0"

_HOME = {
    "BaseSpec": "higgstune.inputs",
    "HiggsAudioTrainer": "higgstune.training.trainer",
    "HiggstuneError": "higgstune.errors",
    "ModelAndTokenizers": "higgstune.model.load",
    "Recipe": "higgstune.config.recipe",
    "Request": "higgstune.generate.speech",
    "Sampling": "higgstune.families.sampling",
    "Speaker": "higgstune.generate.speaker",
    "Speech": "higgstune.generate.speech",
    "Voice": "higgstune.generate.speech",
    "build_frames": "higgstune.families.higgs_v2.delay",
    "collect": "higgstune.raw.collect",
    "check_applied": "higgstune.diagnostics.adapter",
    "compare": "higgstune.evaluation.compare",
    "doctor": "higgstune.diagnostics.examine",
    "evaluate": "higgstune.evaluation.evaluate",
    "export": "higgstune.exporting.export",
    "inspect_row": "higgstune.diagnostics.inspect_row",
    "load": "higgstune.generate.speaker",
    "load_adapter": "higgstune.model.adapters",
    "load_model": "higgstune.model.load",
    "load_model_and_tokenizers": "higgstune.model.load",
    "load_whisper": "higgstune.codec.whisper_encoder",
    "plan": "higgstune.planning.report",
    "prepare": "higgstune.data.prepare",
    "render": "higgstune.families.higgs_v2.prompt",
    "train": "higgstune.training.run",
}
__all__ = ["__version__", *sorted(_HOME)]


def __dir__() -> list[str]:
    return __all__


if not TYPE_CHECKING:  # a type checker would take any name for one of these

    def __getattr__(name: str) -> object:
        """Public names are imported when they are first used: `import higgstune` alone does not bring torch."""
        if name not in _HOME:
            raise AttributeError(f"module 'higgstune' has no attribute {name!r}")
        try:
            return getattr(import_module(_HOME[name]), name)
        except ImportError:
            from higgstune.environment import check_versions

            check_versions()  # raises, and says what does not fit
            raise
