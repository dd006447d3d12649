"""What is stated of recordings (source, licence, consent), which travels with all that is made of them.

manifest -> columns of the store -> the adapter's card -> card and `higgstune.json` of an exported folder
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

ORIGIN = ("source", "licence", "consent")
NOT_STATED = "not stated"
_MAX_STATEMENTS = 1000  # of a card: each recording may have an address of its own
_SHOWN = 20

Origin = dict[str, Counter[str | None]]  # for each of `ORIGIN`, how many rows say what; None for those that say nothing


def not_stated(rows: int) -> Origin:
    """Of rows that say nothing."""
    return {name: Counter({None: rows}) for name in ORIGIN}


def join_origins(origins: Iterable[Origin]) -> Origin:
    """What several data sets state together."""
    found: Origin = {name: Counter() for name in ORIGIN}
    for origin in origins:
        for name in ORIGIN:
            found[name].update(origin[name])
    return found


def origin_as_json(origin: Origin) -> dict[str, list[dict[str, Any]]]:
    """For a card: the statements of most rows first, and how many others there are where they are too many."""
    found = {}
    for name, statements in origin.items():
        common = statements.most_common()
        found[name] = [{"says": says, "rows": rows} for says, rows in common[:_MAX_STATEMENTS]]
        if rest := common[_MAX_STATEMENTS:]:
            found[name].append({"says": f"{len(rest)} others", "rows": sum(rows for _, rows in rest)})
    return found


def origin_from_json(data: Any) -> Origin:
    """The inverse for a card that may be an earlier version's or a stranger's: what it does not say is not stated."""
    found = join_origins([])
    for name in ORIGIN:
        listed = data.get(name) if isinstance(data, Mapping) else None
        for item in listed if isinstance(listed, Sequence) else ():
            says, rows = (item.get("says"), item.get("rows")) if isinstance(item, Mapping) else (None, None)
            if isinstance(says, str | None) and isinstance(rows, int):
                found[name][says] += rows
    return found


def in_words(statements: Mapping[str | None, int]) -> str:
    """What is stated, with the rows where not all say the same; that nothing is, where nothing is."""
    ordered = Counter(statements).most_common()
    if len(ordered) < 2:
        return (ordered[0][0] if ordered else None) or NOT_STATED
    shown = [f"{says or NOT_STATED} ({rows} {'row' if rows == 1 else 'rows'})" for says, rows in ordered[:_SHOWN]]
    return "; ".join(shown) + (f"; {len(ordered) - _SHOWN} others" if len(ordered) > _SHOWN else "")
