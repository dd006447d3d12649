"""Nothing outside of `families/` knows a model family: no class, special token, module path or size of one."""

import re
from pathlib import Path

import pytest

import higgstune

SOURCE = Path(higgstune.__file__).parent
FAMILY_WORDS = re.compile(
    r"HiggsAudioV2|higgs_audio|higgs_v2|audio_mlp|audio_attn|(audio|text)_lm_head|embed_audio|embed_tokens"
    r"|audio_decoder_proj|audio_encoder_proj|audio_stream_|audio_token_id|audio_bos_token|audio_delay"
    r"|<\|(audio|AUDIO|eot|begin_of|tts|ref_)|model\.layers|\b102[456]\b|higgs_multimodal|higgs_tts_3|HiggsTTS3"
    r"|tied\.(embedding|head)|audio_table"
)
# file -> (the only word that may stand there, why)
ALLOWED = {
    "codec/higgs.py": ("HiggsAudioV2|higgs_audio", "the codec's class, which the families share"),
    "codec/__init__.py": (
        "higgs_audio|higgs_multimodal|tied.embedding",
        "model types of the codec, and of checkpoints that hold it",
    ),
    "codec/bundled.py": ("HiggsAudioV2", "the codec inside of a checkpoint's weight files"),
    "data/rules.py": ("higgs_multimodal", "whose texts: a store follows its model type"),
    "codec/base.py": ("1024", "a docstring: what all codecs have today"),
    "codec/mel.py": ("1024", "the fitted codec's own numbers"),
    "codec/whisper_encoder.py": ("higgs_audio|1024", "an encoder inside of an original checkpoint; limits of features"),
    "torchaudio_compat.py": ("HiggsAudioV2|higgs_audio", "why the module exists: what transformers imports"),
    "kernels/loss.py": ("1026", "a docstring: what chance scores"),
    "__init__.py": ("higgs_v2", "the public `render` and `build_frames` are those of Higgs Audio v2"),
}
FILES = [path for path in sorted(SOURCE.rglob("*.py")) if "families" not in path.relative_to(SOURCE).parts]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(SOURCE).as_posix())
def test_no_file_outside_names_a_family(path: Path) -> None:
    allowed, _ = ALLOWED.get(path.relative_to(SOURCE).as_posix(), ("$.", ""))
    lines = path.read_text(encoding="utf-8").splitlines()
    found = [(number, m[0]) for number, line in enumerate(lines, 1) for m in FAMILY_WORDS.finditer(line)]
    assert [(number, word) for number, word in found if not re.fullmatch(allowed, word)] == []


def test_every_exception_is_needed() -> None:
    for name, (allowed, _) in ALLOWED.items():
        text = (SOURCE / name).read_text(encoding="utf-8")
        assert any(re.fullmatch(allowed, m[0]) for m in FAMILY_WORDS.finditer(text)), name
