"""peft without bitsandbytes, whose import takes several seconds, until something is loaded in 4 bits.

Where bitsandbytes is installed, peft imports it twice: in `peft.helpers`, and for each layer that gets LoRA, to learn
whether that layer is one of bitsandbytes. Checked with peft 0.21. Take peft's names from here: other modules import
it first, as `transformers.trainer` does.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from higgstune.imports import deferred

_NAME = "bitsandbytes"


with deferred(_NAME):
    import peft.tuners.lora.model
    from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
    from peft.tuners.lora import LoraLayer
    from peft.utils import ModulesToSaveWrapper

__all__ = [
    "LoraConfig",
    "LoraLayer",
    "ModulesToSaveWrapper",
    "PeftModel",
    "get_peft_model",
    "get_peft_model_state_dict",
    "plain_layers",
    "set_peft_model_state_dict",
]


@contextmanager
def plain_layers() -> Iterator[None]:
    """Add LoRA inside of this: as long as bitsandbytes is not imported, peft takes every layer for a plain one."""
    module = vars(peft.tuners.lora.model)
    names = () if _NAME in sys.modules else ("is_bnb_available", "is_bnb_4bit_available")
    checks = {name: module[name] for name in names if name in module}
    try:
        module.update({name: lambda: False for name in checks})
        yield
    finally:
        module.update(checks)
