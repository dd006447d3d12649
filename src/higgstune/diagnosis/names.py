"""What is to be examined, by name: what the user gives goes before what a recipe, an adapter or a store says."""

from dataclasses import dataclass
from typing import Any

from higgstune.data.store import CodeStore
from higgstune.training.recipe import Recipe


@dataclass
class Names:
    """Folders and hub ids; None where nothing names one yet."""

    model: str | None
    adapter: str | None
    data: str | None
    codec: str | None
    recipe: str | None
    revision: str | None

    @property
    def any(self) -> bool:
        """Whether there is anything but the machine to examine."""
        return any((self.model, self.adapter, self.data, self.codec, self.recipe))

    def take_from_recipe(self, recipe: Recipe) -> None:
        """A recipe names base, codec, store and the adapter that it goes on from."""
        self._take_model(recipe.model.checkpoint, recipe.model.revision)
        self.data = self.data or recipe.data.store
        self.codec = self.codec or recipe.model.codec
        self.adapter = self.adapter or recipe.init_adapter

    def take_from_adapter(self, config: dict[str, Any], card: dict[str, Any]) -> None:
        """peft's configuration names the base, Higgstune's card its revision and codec."""
        self._take_model(config.get("base_model_name_or_path"), card.get("revision"))
        self.codec = self.codec or card.get("codec")

    def take_from_store(self, store: CodeStore) -> None:
        """A store may name the checkpoint that it was made for; without one, there is its codec to examine."""
        self._take_model(store.info.settings.get("model"), None)
        if self.model is None:
            self.codec = self.codec or store.info.codec

    def _take_model(self, model: str | None, revision: str | None) -> None:
        if self.model is None and model is not None:
            self.model, self.revision = model, self.revision or revision
