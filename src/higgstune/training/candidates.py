"""The evaluated steps of a stage: which one is best so far, and whether it is worth going on."""

from collections.abc import Mapping
from typing import Any

from higgstune.evaluation.choice import STEP, Choice, Rule, choose


class Candidates:
    """Steps after which a stage was listened to, in order, and what was measured then."""

    def __init__(self, rule: Rule, patience: int | None) -> None:
        self.rule = rule
        self.patience = patience
        self.entries: list[dict[str, Any]] = []

    def add(self, step: int, measures: Mapping[str, float]) -> bool:
        """Note a step; whether it is the best one now. A stage's start is no candidate: nothing is trained there."""
        if step == 0:
            return False
        self.entries = [entry for entry in self.entries if entry[STEP] != step]
        self.entries.append({**measures, STEP: step})
        return self.choice.best == len(self.entries) - 1

    @property
    def choice(self) -> Choice:
        """Of all steps so far, of which there is one at least."""
        return choose(self.entries, self.rule)

    @property
    def exhausted(self) -> bool:
        """Whether as many steps as `patience` says brought nothing better."""
        return bool(self.patience and self.entries) and len(self.entries) - 1 - self.choice.best >= (self.patience or 0)

    def told(self) -> dict[str, Any]:
        """The choice, for a run's result."""
        choice = self.choice
        return {
            "step": self.entries[choice.best][STEP],
            "rule": str(self.rule),
            "healthy": choice.healthy,
            "candidates": [
                entry | {"broken": broken, "rank": rank}
                for entry, broken, rank in zip(self.entries, choice.broken, choice.ranks, strict=True)
            ],
        }
