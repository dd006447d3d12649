"""The Higgs codec's own class, 24 kHz, hop 960, 8 codebooks of 1024, with random weights and few of them."""

from pathlib import Path

import torch

from higgstune.codec.higgs import HiggsAudioV2TokenizerModel


def save_tiny_codec(folder: Path, seed: int = 0) -> Path:
    """Save a random codec into `folder`, as `load_codec` reads it."""
    tiny_codec(seed).save_pretrained(folder)
    return folder


def tiny_codec(seed: int = 0) -> HiggsAudioV2TokenizerModel:
    """Non-zero codebooks (transformers starts them at zero) and larger weights: codes follow the input."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = HiggsAudioV2TokenizerModel(_config())
        with torch.no_grad():
            for weight in model.parameters():
                if weight.ndim > 1:
                    weight.normal_(std=weight[0].numel() ** -0.5)
            for quantizer in model.quantizer.quantizers:
                quantizer.codebook.embed.normal_()
            model.acoustic_decoder.conv2.weight.mul_(1e-3)  # an amplitude that a sound file can hold
    return model.eval()


def _config() -> object:
    ratios = [8, 5, 4, 2, 3]
    return HiggsAudioV2TokenizerModel.config_class(
        target_bandwidths=[0.5, 1, 1.5, 2],
        codebook_dim=8,
        acoustic_model_config={
            "model_type": "dac",
            "encoder_hidden_size": 2,
            "decoder_hidden_size": 64,
            "hidden_size": 16,
            "downsampling_ratios": ratios,
            "upsampling_ratios": ratios,
        },
        semantic_model_config={
            "model_type": "hubert",
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "conv_dim": [8] * 7,
            "num_conv_pos_embeddings": 16,
            "num_conv_pos_embedding_groups": 2,
        },
    )
