"""What an unknown key of a recipe probably stands for."""

import difflib
from collections.abc import Mapping, Sequence

_CLOSE = 0.75  # similarity of two names of which one is a slip of the other
# The key here -> its names in peft, transformers, trl, unsloth, axolotl and F5-TTS; {} is the number of a stage.
_NAMES_OF_OTHERS = {
    "stages.{}.learning_rate": "lr max_lr peak_lr base_lr",
    "stages.{}.epochs": "num_train_epochs num_epochs max_epochs n_epochs",
    "stages.{}.max_steps": "steps num_steps train_steps max_train_steps num_train_steps total_steps max_updates",
    "stages.{}.batch_size": "per_device_train_batch_size per_device_batch_size train_batch_size micro_batch_size "
    "batch_size_per_gpu",
    "stages.{}.batch_tokens": "max_seq_length max_seq_len max_length sequence_len max_tokens packing sample_packing",
    "stages.{}.gradient_accumulation": "gradient_accumulation_steps grad_accumulation_steps grad_accum accumulation "
    "accumulate_grad_batches",
    "stages.{}.scheduler": "lr_scheduler lr_scheduler_type",
    "stages.{}.warmup_steps": "warmup num_warmup_steps num_warmup_updates lr_warmup_steps",
    "stages.{}.warmup_steps, which is a share of all steps below 1": "warmup_ratio",
    "stages.{}.weight_decay": "wd",
    "stages.{}.max_grad_norm": "grad_clip clip_grad_norm gradient_clipping gradient_clip_val max_norm",
    "stages.{}.text_targets": "train_on_inputs train_on_prompt",
    "stages.{}.kind, which names the layers to train": "target_modules lora_target_modules lora_target_linear "
    "modules_to_save",
    "lora.r": "rank lora_r lora_rank",
    "lora.alpha": "lora_alpha",
    "lora.dropout": "lora_dropout",
    "lora.rslora": "use_rslora peft_use_rslora",
    "lora.dora": "use_dora peft_use_dora",
    "model.checkpoint": "model_name_or_path model_name model_id model_path base_model base_model_name_or_path "
    "pretrained_model_name_or_path pretrained_model pretrain",
    "model.codec": "audio_tokenizer codec_path tokenizer_path",
    "model.quantize: 4bit": "load_in_4bit use_4bit",
    "model.dtype: bfloat16": "bf16",
    "model.dtype: float32, as there is no half precision": "fp16",
    "model.dtype": "torch_dtype mixed_precision precision",
    "data.store": "dataset datasets dataset_name dataset_path train_data train_dataset train_file train_manifest "
    "data_dir data_path",
    "--validation-fraction, of `higgstune prepare`": "val_set_size val_split validation_split test_size",
    "evaluation.patience": "early_stopping early_stopping_patience",
    "evaluation.choose: best": "load_best_model_at_end",
    "evaluation.clips": "log_samples num_samples",
    "init_adapter": "adapter_path lora_path lora_model_dir peft_model_id",
    "seed, at the top": "random_state random_seed data_seed",
    "parallel: fsdp": "fsdp fsdp_config",
    "gradient_checkpointing, at the top": "use_gradient_checkpointing activation_checkpointing grad_checkpointing",
    "compile, at the top": "torch_compile",
    "log_steps, at the top": "logging_steps",
    "eval_steps, at the top": "evals_per_epoch val_check_interval evaluation_steps",
    "save_steps, at the top": "saves_per_epoch save_per_updates checkpointing_steps",
    "save_total_limit, at the top": "keep_last_n_checkpoints",
    "report_to, at the top": "logger log_with use_wandb wandb_project",
    "--out, on the command line": "output_dir output_path save_dir out_dir",
    "--resume, on the command line": "resume_from_checkpoint resume",
}
_KEY_OF = {name: key for key, names in _NAMES_OF_OTHERS.items() for name in names.split()}


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
    if name in _KEY_OF:  # before names that only look like it
        found = f"write {_KEY_OF[name].format(stage)}"
    elif near := _near(name, here):
        found = f"the nearest one is {near}"
    elif place := places.get(_near(name, list(places)) or ""):
        found = f"write {place.format(stage)}"
    else:
        found = "it is not like any other"
    return f"{found} (of {', '.join(here)})"


def _near(name: str, keys: Sequence[str]) -> str | None:
    return next(iter(difflib.get_close_matches(name, keys, n=1, cutoff=_CLOSE)), None)
