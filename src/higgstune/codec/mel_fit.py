"""Fitting of `MelCodec`: PCA, then one k-means for each codebook on what those before it left over."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from sklearn.cluster import MiniBatchKMeans
from sklearn.decomposition import PCA

from higgstune.errors import DataError

if TYPE_CHECKING:
    from higgstune.codec.mel import MelCodecConfig


def fit_tensors(features: Sequence[np.ndarray], config: "MelCodecConfig", seed: int) -> dict[str, np.ndarray]:
    """[frames, values] of each waveform -> the tensors of `MelCodec`. DataError for too little speech."""
    frames = np.concatenate(features)
    if len(frames) < config.codebook_size:
        raise DataError(
            f"{len(frames)} frames are too few to fit codebooks of {config.codebook_size}: give more speech"
        )
    pca = PCA(config.components, random_state=seed).fit(frames)
    residual = np.ascontiguousarray(pca.transform(frames), dtype=np.float32)
    codebooks = []
    for _ in range(config.num_codebooks):
        clusters = MiniBatchKMeans(
            config.codebook_size,
            batch_size=8192,
            n_init=1,
            max_iter=30,
            random_state=seed,
            reassignment_ratio=0,
        ).fit(residual)
        codebooks.append(clusters.cluster_centers_)
        residual = residual - clusters.cluster_centers_[clusters.labels_]
    return {"mean": pca.mean_, "basis": pca.components_, "codebooks": np.stack(codebooks)}
