"""The training data of a recipe: a code store, and replayed rows of another one against forgetting."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from higgstune.config.recipe import Recipe
from higgstune.data.store import CodeStore, MixedRows, Row
from higgstune.data.whisper_features import FeatureStore, JoinedFeatureStore
from higgstune.errors import DataError
from higgstune.families import check_family, check_store_family, family_in
from higgstune.hub import fetch
from higgstune.inputs import find_adapter
from higgstune.model.adapter_folder import check_adapter_family


def check_families(recipe: Recipe, stores: Sequence[CodeStore]) -> None:
    """Raises CheckpointError unless recipe, stores and the adapter to start from are of the base's family.

    Before any weight is read.
    """
    folder = fetch(recipe.model.checkpoint, what="checkpoint", revision=recipe.model.revision, weights=False)
    base, _, _ = family_in(folder)
    check_family("the recipe (model.family)", recipe.model.family, base)
    for store in stores:
        check_store_family(store.folder, store.info.model_type, base, recipe.model.checkpoint)
    if recipe.init_adapter is not None:
        check_adapter_family(find_adapter(recipe.init_adapter), base)


@dataclass(frozen=True)
class TrainingData:
    """The stores of a recipe."""

    store: CodeStore
    replay: CodeStore | None
    share: float  # of replayed rows among all training rows
    seed: int

    @classmethod
    def open(cls, recipe: Recipe) -> Self:
        """Open the stores. Raises DataError if one is missing or has no training rows, or if their codecs differ."""
        replay = recipe.data.replay
        found = cls(
            CodeStore.open(recipe.data.store),
            None if replay is None else CodeStore.open(replay.store),
            0.0 if replay is None else replay.share,
            recipe.seed,
        )
        for store in found.stores:
            if not len(store.split("train")):
                raise DataError(f"{store.folder} has no training rows")
            if store.info.codec_revision != found.store.info.codec_revision:
                raise DataError(
                    f"data.replay {store.folder} was encoded by the codec {store.info.codec}, {found.store.folder} by "
                    f"{found.store.info.codec}: prepare both with the codec of the checkpoint"
                )
        return found

    @property
    def stores(self) -> list[CodeStore]:
        """The recipe's store, then the replayed one."""
        return [self.store] if self.replay is None else [self.store, self.replay]

    def rows(self, split: str) -> Sequence[Row]:
        """The rows of a split; only training includes replayed ones."""
        rows = self.store.split(split)
        if self.replay is None or split != "train":
            return rows
        return MixedRows(rows, self.replay.split(split), share=self.share, seed=self.seed)

    def features(self, whisper: str) -> JoinedFeatureStore:
        """The stores' Whisper features. Raises DataError if a store has none of that checkpoint."""
        return JoinedFeatureStore([FeatureStore.open(store.folder, whisper) for store in self.stores])

    @property
    def identity(self) -> dict[str, list[str]]:
        """Checksums of all rows, of the store and of the replayed one."""
        names = ("store", "replay")
        return {name: [shard.sha256 for shard in store.shards] for name, store in zip(names, self.stores, strict=False)}
