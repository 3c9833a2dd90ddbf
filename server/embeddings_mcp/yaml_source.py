"""YAML nodes with their source positions, so that errors can name the file and the line."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import yaml

from embeddings_mcp.errors import InvalidSetting

_MAX_BYTES = 1 << 20
"""No document written by hand is larger; one that is can only be an attack."""


@dataclass(frozen=True, slots=True)
class YamlNode:
    """A YAML node with its file and name.

    Every accessor raises `InvalidSetting` if the node is of another type.

    Attributes:
        document: the file, for error messages.
        name: name of the node, for error messages.
        node: the node as PyYAML composed it.
    """

    document: str
    name: str
    node: yaml.Node

    @property
    def location(self) -> str:
        """The file and the line."""
        return f"{self.document}, line {self.node.start_mark.line + 1}"

    def fail(self, message: str) -> NoReturn:
        """Raise an error about this node.

        Raises:
            InvalidSetting: always; the message starts with the location.
        """
        raise InvalidSetting(f"{self.location}: {message}")

    @property
    def text(self) -> str:
        """The scalar as a string; numbers and other types as they are written in the document."""
        if not isinstance(self.node, yaml.ScalarNode):
            self.fail(f"`{self.name}` must be a string")
        value: str = self.node.value
        return value

    def items(self) -> list[YamlNode]:
        """Return the items of a list."""
        if not isinstance(self.node, yaml.SequenceNode):
            self.fail(f"`{self.name}` must be a list")
        return [YamlNode(self.document, self.name, node) for node in self.node.value]

    def mapping(self, known: Collection[str] | None = None) -> YamlMapping:
        """Return the mapping.

        Args:
            known: the keys that are accepted; None for any.
        """
        if not isinstance(self.node, yaml.MappingNode):
            self.fail(f"`{self.name}` must be a map")
        values: dict[str, YamlNode] = {}
        for key_node, value_node in self.node.value:
            key = YamlNode(self.document, f"a key of {self.name}", key_node)
            name = key.text
            if name in values:
                key.fail(f"`{name}` appears twice in `{self.name}`")
            if known is not None and name not in known:
                key.fail(f"`{name}` in `{self.name}` is not supported here; accepted are {', '.join(sorted(known))}")
            values[name] = YamlNode(self.document, name, value_node)
        return YamlMapping(self, values)

    def named(self, known: Collection[str] | None = None) -> Iterator[tuple[str, YamlMapping]]:
        """Yield named mappings: the values of a mapping, or the items of a list, each with its name under ``name``."""
        if isinstance(self.node, yaml.SequenceNode):
            for item in self.items():
                mapping = item.mapping(None if known is None else {*known, "name"})
                yield mapping.require("name").text, mapping
        else:
            for name, node in self.mapping().values.items():
                yield name, node.mapping(known)


@dataclass(frozen=True, slots=True)
class YamlMapping:
    """The values of a YAML mapping by key.

    Attributes:
        node: the mapping itself.
        values: its values by key.
    """

    node: YamlNode
    values: dict[str, YamlNode]

    def get(self, name: str) -> YamlNode | None:
        """Return the value of a key; None if it is missing."""
        return self.values.get(name)

    def require(self, name: str) -> YamlNode:
        """Return the value of a required key.

        Raises:
            InvalidSetting: the key is missing.
        """
        if name not in self.values:
            self.node.fail(f"`{self.node.name}` has no `{name}`")
        return self.values[name]

    def text(self, name: str, default: str = "") -> str:
        """Return the value of a key as a string; `default` if it is missing."""
        return self.values[name].text if name in self.values else default

    def items(self, name: str) -> list[YamlNode]:
        """Return the items of a list; none if the key is missing."""
        return self.values[name].items() if name in self.values else []

    def named(self, name: str, known: Collection[str] | None = None) -> Iterator[tuple[str, YamlMapping]]:
        """Yield the named mappings below a key, as `YamlNode.named`; none if the key is missing."""
        return self.values[name].named(known) if name in self.values else iter(())


def read_yaml(path: Path) -> YamlNode:
    """Read a YAML file; return its root node.

    Raises:
        InvalidSetting: the file cannot be read, is too large, or is not YAML.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InvalidSetting(f"{path} cannot be read: {error.strerror}") from error
    if len(content) > _MAX_BYTES:
        raise InvalidSetting(f"{path} is too large: more than {_MAX_BYTES:,} bytes")
    try:
        root = yaml.compose(content, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise InvalidSetting(f"{path}{line}: this is not YAML: {error.problem}") from None
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidSetting(f"{path}: this is not YAML: {str(error) or 'it is nested too deep'}") from None
    if root is None:
        raise InvalidSetting(f"{path} is empty")
    return YamlNode(str(path), "the document", root)
