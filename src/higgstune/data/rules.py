"""What the texts of a model may hold, and what preparation and speaking change in them.

A store follows the model that it was prepared for, whose model type its index records.
"""

from dataclasses import dataclass

from higgstune.data.text import TEXT_NORMALIZATION, normalize_text

_NAMES = {
    "emotion": (
        "elation amusement enthusiasm determination pride contentment affection relief contemplation confusion "
        "surprise awe longing arousal anger fear disgust bitterness sadness shame helplessness"
    ),
    "style": "singing shouting whispering",
    "prosody": (
        "speed_very_slow speed_slow speed_fast speed_very_fast pitch_low pitch_high expressive_high expressive_low "
        "pause long_pause"
    ),
    "sfx": "cough laughter crying screaming burping humming sigh sniff sneeze",
}
TAGS = tuple(f"<|{category}:{name}|>" for category, names in _NAMES.items() for name in names.split())


@dataclass(frozen=True)
class TextRules:
    """The rules for the texts of a model."""

    version: str  # recorded in every store: another one when what is done to a text changes
    verbatim: bool = False  # a text is tokenized as it is written
    tags: tuple[str, ...] = ()  # control tokens that a text may have
    conversations: bool = True  # whether rows may be conversations, with texts of several roles

    def normalized(self, text: str) -> str:
        """A text as it is trained on and spoken."""
        return text if self.verbatim else normalize_text(text)


NORMALIZED = TextRules(TEXT_NORMALIZATION)
TAGGED = TextRules("as written 1", verbatim=True, tags=TAGS, conversations=False)
_OF_MODEL_TYPE = {"higgs_multimodal_qwen3": TAGGED}


def rules_of(model_type: str | None) -> TextRules:
    """The rules for a model by its config.json's model type; None is the default model."""
    return _OF_MODEL_TYPE.get(model_type or "", NORMALIZED)
