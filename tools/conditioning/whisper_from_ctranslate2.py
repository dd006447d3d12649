"""The encoder of a CTranslate2 Whisper model as a Whisper checkpoint that transformers and Higgstune read.

    python tools/conditioning/whisper_from_ctranslate2.py FOLDER_WITH_MODEL_BIN OUT

For measurements without access to the hub, from a CTranslate2 model as faster-whisper uses it; 8-bit weights are scaled
back. With access to the hub, name openai/whisper-base instead. Source of the format: CTranslate2's
`ModelSpec._serialize`.
"""

import json
import struct
import sys
from pathlib import Path
from typing import BinaryIO

import numpy as np
from safetensors.numpy import save_file
from transformers import WhisperConfig, WhisperFeatureExtractor

_TYPES = {0: "<f4", 1: "<i1", 2: "<i2", 3: "<i4", 4: "<f2"}


def main() -> None:
    """Convert argv[1] into argv[2]."""
    source, out = Path(sys.argv[1]), Path(sys.argv[2])
    variables = read_variables(source / "model.bin")
    tensors = encoder_tensors(variables)
    positions, width = tensors["model.encoder.embed_positions.weight"].shape
    layers = sum(name.endswith("fc1.weight") for name in tensors)
    config = WhisperConfig(
        d_model=width,
        encoder_layers=layers,
        encoder_attention_heads=width // 64,
        encoder_ffn_dim=4 * width,
        num_mel_bins=tensors["model.encoder.conv1.weight"].shape[1],
        max_source_positions=positions,
    )
    out.mkdir(parents=True, exist_ok=True)
    save_file({name: np.ascontiguousarray(value) for name, value in tensors.items()}, out / "model.safetensors")
    (out / "config.json").write_text(json.dumps(config.to_diff_dict(), indent=2), encoding="utf-8")
    WhisperFeatureExtractor(feature_size=config.num_mel_bins).save_pretrained(out)
    print(f"{layers} layers of {width} in {out}")


def read_variables(path: Path) -> dict[str, np.ndarray]:
    """All variables of a model.bin, as float32."""
    raw: dict[str, np.ndarray] = {}
    with path.open("rb") as file:
        _number(file, "<I")
        _string(file)
        _number(file, "<I")
        for _ in range(_number(file, "<I")):
            name = _string(file)
            shape = [_number(file, "<I") for _ in range(_number(file, "<B"))]
            kind, size = _number(file, "<B"), _number(file, "<I")
            raw[name] = np.frombuffer(file.read(size), _TYPES[kind]).reshape(shape)
    scaled = {}
    for name, value in raw.items():
        scale = raw.get(f"{name}_scale")
        scaled[name] = value.astype(np.float32) / (1 if scale is None else scale.reshape(-1, *[1] * (value.ndim - 1)))
    return scaled


def encoder_tensors(variables: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """CTranslate2's names -> transformers'."""
    tensors: dict[str, np.ndarray] = {}

    def take(theirs: str, ours: str, parts: tuple[str, str]) -> None:
        for part, name in zip(parts, ("weight", "bias"), strict=True):
            tensors[f"model.encoder.{ours}.{name}"] = variables[f"encoder/{theirs}/{part}"]

    plain, norm = ("weight", "bias"), ("gamma", "beta")
    for name in ("conv1", "conv2"):
        take(name, name, plain)
    take("layer_norm", "layer_norm", norm)
    tensors["model.encoder.embed_positions.weight"] = variables["encoder/position_encodings/encodings"]
    layers = {name.split("/")[1] for name in variables if name.startswith("encoder/layer_") and "norm" not in name[:18]}
    for layer in range(len(layers)):
        theirs, ours = f"layer_{layer}", f"layers.{layer}"
        take(f"{theirs}/self_attention/layer_norm", f"{ours}.self_attn_layer_norm", norm)
        take(f"{theirs}/ffn/layer_norm", f"{ours}.final_layer_norm", norm)
        take(f"{theirs}/ffn/linear_0", f"{ours}.fc1", plain)
        take(f"{theirs}/ffn/linear_1", f"{ours}.fc2", plain)
        take(f"{theirs}/self_attention/linear_1", f"{ours}.self_attn.out_proj", plain)
        fused = [variables[f"encoder/{theirs}/self_attention/linear_0/{part}"] for part in plain]
        for part, values in zip(plain, fused, strict=True):
            for projection, value in zip("qkv", np.split(values, 3), strict=True):
                if (projection, part) != ("k", "bias"):  # Whisper's key projection has none
                    tensors[f"model.encoder.{ours}.self_attn.{projection}_proj.{part}"] = value
    return tensors


def _number(file: BinaryIO, form: str) -> int:
    return int(struct.unpack(form, file.read(struct.calcsize(form)))[0])


def _string(file: BinaryIO) -> str:
    return file.read(_number(file, "<H"))[:-1].decode()


if __name__ == "__main__":
    main()
