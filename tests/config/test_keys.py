"""Names of recipe keys in other trainers lead to the key here."""

from typing import Any

import pytest

from higgstune.config.keys import _KEY_OF
from higgstune.config.recipe import Recipe, parse_recipe
from higgstune.errors import ConfigError

STAGE = {"name": "voice", "kind": "full", "epochs": 1}
TREE = {"data": {"store": "data"}, "stages": [STAGE]}


def refusal(tree: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as refused:
        parse_recipe(tree, where="test")
    return str(refused.value)


@pytest.mark.parametrize(
    ("section", "name", "key"),
    [
        ("", "rank", "lora.r"),
        ("lora", "rank", "lora.r"),
        ("lora", "lora_r", "lora.r"),
        ("lora", "lora_alpha", "lora.alpha"),
        ("", "lora_alpha", "lora.alpha"),
        ("", "use_dora", "lora.dora"),
        ("", "r", "lora.r"),
        ("", "lr", "stages.0.learning_rate"),
        ("stages", "lr", "stages.0.learning_rate"),
        ("", "learning_rate", "stages.0.learning_rate"),
        ("", "batch_size", "stages.0.batch_size"),
        ("", "per_device_train_batch_size", "stages.0.batch_size"),
        ("", "micro_batch_size", "stages.0.batch_size"),
        ("", "batch_size_per_gpu", "stages.0.batch_size"),
        ("", "num_train_epochs", "stages.0.epochs"),
        ("stages", "num_epochs", "stages.0.epochs"),
        ("", "max_steps", "stages.0.max_steps"),
        ("", "warmup_ratio", "stages.0.warmup_steps, which is a share of all steps below 1"),
        ("", "num_warmup_updates", "stages.0.warmup_steps"),
        ("", "gradient_accumulation_steps", "stages.0.gradient_accumulation"),
        ("", "target_modules", "stages.0.kind"),
        ("", "output_dir", "--out, on the command line"),
        ("", "bf16", "model.dtype: bfloat16"),
        ("model", "load_in_4bit", "model.quantize: 4bit"),
        ("", "base_model", "model.checkpoint"),
        ("", "random_state", "seed, at the top"),
        ("stages", "seed", "seed, at the top"),
        ("", "keep_last_n_checkpoints", "save_total_limit, at the top"),
        ("", "early_stopping_patience", "evaluation.patience"),
        ("", "val_set_size", "--validation-fraction, of `higgstune prepare`"),
    ],
)
def test_a_name_of_another_trainer_leads_to_the_key(section: str, name: str, key: str) -> None:
    wrong: dict[str, Any] = {"": {name: 1}, "stages": {"stages": [STAGE | {name: 1}]}}.get(
        section, {section: {name: 1}}
    )
    assert f"{name}: unknown key; write {key}" in refusal(TREE | wrong)


def test_what_is_suggested_exists() -> None:
    known = Recipe.model_validate(TREE).model_dump()
    for name, place in _KEY_OF.items():
        if not place.startswith("--"):
            node: Any = known
            for part in place.partition(",")[0].partition(":")[0].format(0).split("."):
                node = node[int(part)] if isinstance(node, list | tuple) else node[part]
        assert name not in known, f"{name} is a key"
