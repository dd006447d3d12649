"""The tokens of Higgs TTS 3 beyond Qwen's text, and its tags.

Source: the released tokenizer's 84 added tokens, ids 151643 to 151726, and the model card's list of tags.
"""

from higgstune.data.rejection import did_you_mean
from higgstune.data.rules import TAGS
from higgstune.data.text import find_control_tokens
from higgstune.errors import DataError

TTS, TEXT, AUDIO = "<|tts|>", "<|text|>", "<|audio|>"
REFERENCE_AUDIO, REFERENCE_TEXT = "<|ref_audio|>", "<|ref_text|>"
FIRST = "<|endoftext|>"
# Of the prompt -> how far its id lies behind that of the first added token, in the released tokenizer.
OFFSETS = {FIRST: 0, TTS: 24, AUDIO: 27, TEXT: 29, REFERENCE_AUDIO: 36, REFERENCE_TEXT: 37}


def check_tags(text: str) -> None:
    """Raise DataError for a `<|...|>` in a text that is not a tag: the tokenizer would take it for structure, or the
    voice would read it aloud.
    """
    for token in find_control_tokens(text):
        if token not in TAGS:
            raise DataError(
                f"the text has {token[:100]}, which Higgs TTS 3 has not as a tag: {did_you_mean(token, TAGS)}"
            )
