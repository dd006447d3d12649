"""YAML for recipes, which may come from strangers: plain data, each key once, and no more than a recipe can have."""

from typing import Any

import yaml
from yaml.composer import ComposerError
from yaml.constructor import ConstructorError

from higgstune.errors import ConfigError

MAX_BYTES = 1 << 18  # a recipe has two thousand
_MAX_DEPTH = 32
_MAX_NODES = 10_000  # aliases count as what they stand for: ten lines of them can stand for billions
_MAX_DIGITS = 100  # characters of a number
_SHOWN = 500  # characters of the parser's words in a message
_TIMESTAMP = "tag:yaml.org,2002:timestamp"


def parse_yaml(content: bytes, *, where: str) -> Any:
    """Plain data from YAML in UTF-8. No tag is read (a date is its text), no key twice, no number over 64 bits.

    Raises ConfigError that begins with `where`.
    """
    if len(content) > MAX_BYTES:
        raise ConfigError(f"{where} is larger than {MAX_BYTES >> 10} kB: a recipe is a small file")
    try:
        return yaml.load(content.decode("utf-8-sig"), Loader=_Loader)
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{where} is not valid YAML: it is not UTF-8 (byte {error.start}); save it as that"
        ) from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{where} is not valid YAML: {str(error)[:_SHOWN]}") from error


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with limits. It is the one in Python: the one in C dies of deep nesting."""

    yaml_implicit_resolvers = {  # noqa: RUF012, the base class's attribute
        first: [(tag, pattern) for tag, pattern in known if tag != _TIMESTAMP]
        for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._depth = self._count = 0
        self._sizes: dict[yaml.Node, int] = {}  # of finished nodes, with everything in them

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node:
        """Also for aliases, which give the node that they stand for."""
        event: Any = self.peek_event()
        self._depth += 1
        self._count += 1
        place = event.start_mark
        if getattr(event, "tag", None) not in (None, "!"):
            raise ComposerError(None, None, f"the tag {event.tag!r} is not read: write a plain value", place)
        if self._depth > _MAX_DEPTH:
            raise ComposerError(None, None, f"it is nested more than {_MAX_DEPTH} levels deep", place)
        node = super().compose_node(parent, index)
        assert node is not None
        if node not in self._sizes:
            if event.__class__ is yaml.AliasEvent:
                raise ComposerError(None, None, f"*{event.anchor} stands inside of itself", place)
            self._sizes[node] = 1 + sum(self._sizes[child] for child in _children(node))
        if max(self._count, self._sizes[node]) > _MAX_NODES:
            raise ComposerError(None, None, f"it has more than {_MAX_NODES} values", place)
        self._depth -= 1
        return node

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """PyYAML itself would take the last value of a key that stands twice."""
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    place: Any = key.start_mark
                    raise ComposerError(None, None, f"the key {key.value!r} stands twice", place)
                seen.add(key.value)
        return node

    def construct_number(self, node: yaml.ScalarNode) -> int | float:
        """An integer of 64 bits, or a float."""
        is_float = node.tag.endswith(":float")
        try:
            if len(node.value) > _MAX_DIGITS:
                raise OverflowError
            number = self.construct_yaml_float(node) if is_float else self.construct_yaml_int(node)
            if not is_float and abs(number) >= 1 << 63:
                raise OverflowError
        except (ValueError, OverflowError) as error:
            raise ConstructorError(
                None, None, f"{node.value[:_MAX_DIGITS]} is not a number, or is too large", node.start_mark
            ) from error
        return number


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_number)
_Loader.add_constructor("tag:yaml.org,2002:float", _Loader.construct_number)


def _children(node: yaml.Node) -> list[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return [part for pair in node.value for part in pair]
    return list(node.value) if isinstance(node, yaml.SequenceNode) else []
