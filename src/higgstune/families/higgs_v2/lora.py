"""Which layers an adapter of Higgs Audio v2 is put on."""

_SHARED = r"self_attn\.[qkvo]_proj"
_FFN = r"\.(?:gate|up|down)_proj"
# Full paths from the model's root: a suffix such as `self_attn.q_proj` would also match the codec's HuBERT or Whisper.
_LAYER = r"model\.layers\.\d+\."
_TEXT_TARGETS = rf"{_LAYER}(?:{_SHARED}|mlp{_FFN})"
_FULL_TARGETS = rf"{_LAYER}(?:{_SHARED}|(?:audio_)?mlp{_FFN})"
_FULL_AND_AUDIO_ATTENTION = rf"{_LAYER}(?:(?:self|audio)_attn\.[qkvo]_proj|(?:audio_)?mlp{_FFN})"
_PATTERNS = (_TEXT_TARGETS, _FULL_TARGETS, _FULL_AND_AUDIO_ATTENTION)
