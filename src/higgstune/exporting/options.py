"""The options of `export`, and which go together: checked before torch is imported."""

from typing import Literal, get_args

from higgstune.errors import ConfigError

Format = Literal["native", "extended", "boson", "peft"]
FORMATS: tuple[Format, ...] = get_args(Format)
DTYPES = ("float32", "bfloat16")
BASE_BITS = (4, 8)


def check_options(
    format: str | None, *, drop_modules: bool, dtype: str | None, base_bits: int | None, whisper: object
) -> None:
    """Raise ConfigError for an unknown value, and for an option that has no effect with this format."""
    for option, value, known in (
        ("--format", format, FORMATS), ("--dtype", dtype, DTYPES), ("--base-bits", base_bits, BASE_BITS)
    ):  # fmt: skip
        if value is not None and value not in known:
            raise ConfigError(f"{option} {value}: one of {', '.join(map(str, known))}")
    useless = {
        "--dtype": dtype is not None and format == "peft",
        "--whisper": whisper is not None and format != "boson",
        "--drop-modules": drop_modules and format not in (None, "native"),
        "--base-bits": base_bits is not None and format in ("extended", "boson"),
    }
    reasons = {
        "--dtype": "the adapter is copied as it was trained",
        "--whisper": "only --format boson includes the Whisper encoder",
        "--drop-modules": "only --format native has no place for some modules",
        "--base-bits": "only transformers and peft load a base in 4 or 8 bits",
    }
    for option, applies in useless.items():
        if applies:
            with_format = "" if format is None else f" with --format {format}"
            raise ConfigError(f"{option} has no effect{with_format}: {reasons[option]}")
