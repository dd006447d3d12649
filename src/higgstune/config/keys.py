"""What an unknown key of a recipe probably stands for."""

import difflib
from collections.abc import Mapping, Sequence

_CLOSE = 0.75  # similarity of two names of which one is a slip of the other
# Names in transformers and peft -> the key here; {} is the number of a stage.
_NAMES_OF_OTHERS = {
    "lr": "stages.{}.learning_rate",
    "num_train_epochs": "stages.{}.epochs",
    "num_epochs": "stages.{}.epochs",
    "steps": "stages.{}.max_steps",
    "per_device_train_batch_size": "stages.{}.batch_size",
    "train_batch_size": "stages.{}.batch_size",
    "gradient_accumulation_steps": "stages.{}.gradient_accumulation",
    "grad_accum": "stages.{}.gradient_accumulation",
    "lr_scheduler": "stages.{}.scheduler",
    "lr_scheduler_type": "stages.{}.scheduler",
    "warmup": "stages.{}.warmup_steps",
    "warmup_ratio": "stages.{}.warmup_steps, which is a share of all steps below 1",
    "rank": "lora.r",
    "lora_r": "lora.r",
    "lora_rank": "lora.r",
    "lora_alpha": "lora.alpha",
    "lora_dropout": "lora.dropout",
    "use_rslora": "lora.rslora",
    "use_dora": "lora.dora",
    "model_name_or_path": "model.checkpoint",
    "base_model": "model.checkpoint",
    "load_in_4bit": "model.quantize: 4bit",
    "bf16": "model.dtype: bfloat16",
    "torch_dtype": "model.dtype",
    "dataset": "data.store",
    "train_data": "data.store",
    "output_dir": "--out, on the command line",
    "logging_steps": "log_steps",
}


def suggest_key(location: Sequence[int | str], known: Mapping[str, Sequence[str]]) -> str:
    """The key that the one at `location` probably stands for, here or in another section, as a clause.

    `known` are the keys by section: `""` is the top, `stages.{}` any stage.
    """
    name = str(location[-1])[:100]
    stage = next((part for part in location if isinstance(part, int)), 0)
    here = known.get(".".join("{}" if isinstance(part, int) else part for part in location[:-1]), known[""])
    places: dict[str, str] = {}
    for section, keys in known.items():
        for key in keys:
            places.setdefault(key, f"{section}.{key}" if section else f"{key}, at the top")
    if near := _near(name, here):
        found = f"the nearest one is {near}"
    elif place := _NAMES_OF_OTHERS.get(name) or places.get(_near(name, list(places)) or ""):
        found = f"write {place.format(stage)}"
    else:
        found = "it is not like any other"
    return f"{found} (of {', '.join(here)})"


def _near(name: str, keys: Sequence[str]) -> str | None:
    return next(iter(difflib.get_close_matches(name, keys, n=1, cutoff=_CLOSE)), None)
