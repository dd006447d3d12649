"""The codec: clip by clip, as Higgstune uses it, against batches of clips of equal length."""

from typing import Any

import numpy as np
import torch
from report import Case, Found, Meter, Row, alternate, finish, parser, rates, same_work, say
from stores import ASSETS

from higgstune.codec import HiggsCodec, MelCodec

EXAMPLE = "python bench/codec.py --clips 8 --seconds 5 --json codec.json"
WIDTHS = {  # DAC encoder, DAC decoder, DAC code, HuBERT, HuBERT layers, HuBERT convolutions
    "small": (4, 64, 16, 32, 2, 16),
    "moderate": (16, 256, 64, 192, 4, 128),
    "full": (64, 1024, 256, 768, 12, 512),
}


def random_codec(size: str, *, device: str = "cpu", seed: int = 0) -> HiggsCodec:
    """The Higgs codec's own class with random weights: `full` has the released one's size, the others are narrower."""
    from higgstune.codec.higgs import HiggsAudioV2TokenizerModel

    encoder, decoder, code, hidden, layers, convolutions = WIDTHS[size]
    ratios = [8, 5, 4, 2, 3]
    config = HiggsAudioV2TokenizerModel.config_class(
        target_bandwidths=[0.5, 1, 1.5, 2],
        codebook_dim=64 if size != "small" else 8,
        acoustic_model_config={
            "model_type": "dac",
            "encoder_hidden_size": encoder,
            "decoder_hidden_size": decoder,
            "hidden_size": code,
            "downsampling_ratios": ratios,
            "upsampling_ratios": ratios,
        },
        semantic_model_config={
            "model_type": "hubert",
            "hidden_size": hidden,
            "intermediate_size": 4 * hidden,
            "num_hidden_layers": layers,
            "num_attention_heads": max(2, hidden // 64),
            "conv_dim": [convolutions] * 7,
            "num_conv_pos_embeddings": 128,
            "num_conv_pos_embedding_groups": 16,
        },
    )
    torch.manual_seed(seed)
    model = HiggsAudioV2TokenizerModel(config)
    with torch.no_grad():  # codebooks start at zero, and all codes would be alike
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.normal_(std=weight[0].numel() ** -0.5)
        for quantizer in model.quantizer.quantizers:
            quantizer.codebook.embed.normal_()
    return HiggsCodec(model, "random", device)


def noise(clips: int, seconds: float, rate: int, *, seed: int = 0) -> np.ndarray:
    """[clips, samples] float32 of noise that swells and fades, each clip otherwise."""
    generator = np.random.default_rng(seed)
    samples = round(seconds * rate)
    swell = np.sin(np.linspace(0, 6 * np.pi, samples) + generator.uniform(0, 6, size=(clips, 1))) ** 2
    return (0.2 * swell * generator.normal(size=(clips, samples))).astype(np.float32)


@torch.inference_mode()
def encode_together(codec: HiggsCodec, waveforms: np.ndarray) -> np.ndarray:
    """[clips, samples] of whole frames -> codes [clips, frames, K]."""
    samples = torch.from_numpy(waveforms)[:, None].to(codec._model.device)
    return codec._model.encode(samples, return_dict=False).transpose(1, 2).cpu().numpy().astype(np.uint16)


@torch.inference_mode()
def decode_together(codec: HiggsCodec, codes: np.ndarray) -> np.ndarray:
    """Codes [clips, frames, K] -> [clips, samples]."""
    tokens = torch.from_numpy(codes.astype(np.int64)).transpose(1, 2).to(codec._model.device)
    return codec._model.decode(tokens, return_dict=False)[:, 0].cpu().numpy()


def higgs(together: bool, size: str, clips: int, seconds: float, device: str = "cpu") -> Found:
    """Encode and decode clips of equal length, one after the other or in one batch."""
    codec = random_codec(size, device=device)
    frames = round(seconds * codec.frame_rate)
    shape = (clips, frames, codec.num_codebooks)
    inputs = {
        "encode": noise(clips, frames / codec.frame_rate, codec.sample_rate),
        "decode": np.random.default_rng(0).integers(0, codec.codebook_size, size=shape).astype(np.uint16),
    }
    alone: dict[str, Any] = {"encode": codec.encode, "decode": codec.decode}
    batched: dict[str, Any] = {"encode": encode_together, "decode": decode_together}
    found: Found = {"seconds": clips * frames / codec.frame_rate}
    for what, given in inputs.items():
        alone[what](given[0])  # what is done once: buffers, choice of algorithms
        with Meter() as meter:
            outputs = batched[what](codec, given) if together else np.stack([alone[what](clip) for clip in given])
        found[what] = meter.cpu_seconds if device == "cpu" else meter.wall_seconds
        one = alone[what](given[-1])
        found[f"{what}_equal"] = float(np.isclose(outputs[-1], one, rtol=0, atol=1e-4 * np.abs(one).max()).mean())
        if what == "encode":
            found |= {"shape": list(outputs.shape), "different": len(np.unique(outputs))}
    return found


def fitted(clips: int, seconds: float) -> Found:
    """The demo's codec, clip by clip: it has no other way."""
    codec = MelCodec.from_pretrained(ASSETS / "codec")
    frames = round(seconds * codec.frame_rate)
    waveforms = noise(clips, frames / codec.frame_rate, codec.sample_rate)
    with Meter() as encoding:
        codes = [codec.encode(clip) for clip in waveforms]
    with Meter() as decoding:
        for one in codes:
            codec.decode(one)
    counted = sum(map(len, codes)) / codec.frame_rate
    return {"seconds": counted, "encode": encoding.cpu_seconds, "decode": decoding.cpu_seconds}


def measure(
    size: str, clips: int, seconds: float, *, device: str = "cpu", repeats: int, threads: int, fresh: bool = True
) -> tuple[list[Row], dict[str, float]]:
    """Rows of both codecs, and the share of a batch's results that equal those of a single clip, in percent.

    Equal: the same code, or a sample within 1e-4 of the loudest one.
    """
    shared = {"size": size, "clips": clips, "seconds": seconds, "device": device}
    cases = {name: Case(higgs, shared | {"together": name == "batch"}) for name in ("single", "batch")}
    cases["fitted"] = Case(fitted, {"clips": clips, "seconds": seconds})
    found = alternate(cases, repeats=repeats, threads=threads, fresh=fresh)
    same_work(*found.values(), counted="seconds")
    unit = "s of audio/CPU-s" if device == "cpu" else "s of audio/s"
    rows = []
    for what in ("encode", "decode"):
        sides = [rates(found[name], "seconds", per=what) for name in ("single", "batch")]
        rows.append(Row(f"{what}, Higgs codec ({size}), {clips} clips in a batch against one by one", *sides, unit))
        demo = rates(found["fitted"], "seconds", per=what)
        rows.append(Row(f"{what}, the demo's codec, one by one", None, demo, "s of audio/CPU-s"))
    equal = {what: 100 * min(one[f"{what}_equal"] for one in found["batch"]) for what in ("encode", "decode")}
    return rows, equal


def main() -> None:
    """Measure, print, write."""
    options = parser(__doc__ or "", EXAMPLE)
    options.add_argument("--size", choices=WIDTHS, help="of the random Higgs codec (default: moderate)")
    options.add_argument("--clips", type=int, default=8, metavar="N", help="in a batch (default: 8)")
    options.add_argument("--seconds", type=float, help="length of every clip (default: 5)")
    options.add_argument("--device", default="cpu", help="of the Higgs codec (default: cpu)")
    given = options.parse_args()
    size = given.size or ("small" if given.quick else "moderate")
    seconds = given.seconds or (1.0 if given.quick else 5.0)
    rows, equal = measure(size, given.clips, seconds, device=given.device, repeats=given.repeats, threads=given.threads)
    finish("codec", rows, given, batch_equals_single_percent=equal)
    for what, percent in equal.items():
        say(f"{what}: {percent:.4g} % of a batch's values equal those of single clips")


if __name__ == "__main__":
    main()
