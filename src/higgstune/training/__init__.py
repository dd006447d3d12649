from higgstune import peft_compat  # noqa: F401  # before transformers' trainer imports peft
