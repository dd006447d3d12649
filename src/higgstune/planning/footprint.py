"""Memory of a stage with all its layers, from rehearsals with a few.

Layers are alike: each that is added adds the same bytes to every part of a step, as long as there are two of its sort
already. So a model of few layers is rehearsed, and the rest follows on a straight line.
"""

from collections import Counter
from dataclasses import dataclass, field

from higgstune.batch.packed import Packed
from higgstune.planning.rehearsal import Segments, Subject, rehearse
from higgstune.planning.tracker import Bytes

_REHEARSED = 2  # layers of a sort


@dataclass
class Footprint:
    """What one stage takes with a pack, for any number of layers that are computed again; rehearsals are kept."""

    subject: Subject
    pack: Packed
    validation: Packed | None = None
    _rehearsed: dict[tuple[int, int], Segments] = field(default_factory=dict)

    def peak(self, again: int) -> Bytes:
        """Bytes by kind when they are most, in a step or in a validation, with so many layers computed again."""
        layers = self.subject.config.num_hidden_layers
        return max(self.segments(again, layers - again).values(), key=Counter.total)

    def segments(self, again: int, kept: int) -> Segments:
        """As `rehearse` gives them."""
        few = min(again, _REHEARSED), min(kept, _REHEARSED)
        result = {name: Counter(value) for name, value in self._rehearse(*few).items()}
        for added, more in ((again - few[0], (few[0] + 1, few[1])), (kept - few[1], (few[0], few[1] + 1))):
            if added:
                self._add(result, self._rehearse(*few), self._rehearse(*more), added)
        return result

    @staticmethod
    def _add(result: Segments, few: Segments, more: Segments, layers: int) -> None:
        for name, value in result.items():
            for kind in value.keys() | more[name].keys():
                value[kind] += layers * (more[name][kind] - few[name][kind])

    def _rehearse(self, again: int, kept: int) -> Segments:
        if (again, kept) not in self._rehearsed:
            self._rehearsed[again, kept] = rehearse(self.subject, self.pack, (again, kept), validation=self.validation)
        return self._rehearsed[again, kept]
