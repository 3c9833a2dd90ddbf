"""YAML whose parts know where they stand, so that what is wrong with a document can be said with its line."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import yaml

from embeddings_mcp.errors import InvalidSetting

_LARGEST_BYTES = 1 << 20
"""No document that a person writes is larger; what is, could only be meant to do harm."""


@dataclass(frozen=True, slots=True)
class Part:
    """A part of a document, down to a single text.

    Every method that takes it for something that it is not raises `InvalidSetting`.

    Attributes:
        document: the file, as errors call it.
        name: what errors call the part.
        node: the YAML node.
    """

    document: str
    name: str
    node: yaml.Node

    @property
    def place(self) -> str:
        """The file and the line."""
        return f"{self.document}, line {self.node.start_mark.line + 1}"

    def refuse(self, message: str) -> NoReturn:
        """Say what is wrong here.

        Raises:
            InvalidSetting: always.
        """
        raise InvalidSetting(f"{self.place}: {message}")

    @property
    def text(self) -> str:
        """The part as a text; numbers and the like as they are written."""
        if not isinstance(self.node, yaml.ScalarNode):
            self.refuse(f"`{self.name}` must be a text")
        written: str = self.node.value
        return written

    def items(self) -> list[Part]:
        """The entries of a list."""
        if not isinstance(self.node, yaml.SequenceNode):
            self.refuse(f"`{self.name}` must be a list")
        return [Part(self.document, self.name, node) for node in self.node.value]

    def members(self, known: Collection[str] | None = None) -> Members:
        """The members of a map.

        Args:
            known: the names that are accepted; None for any.
        """
        if not isinstance(self.node, yaml.MappingNode):
            self.refuse(f"`{self.name}` must be a map")
        parts: dict[str, Part] = {}
        for key, value in self.node.value:
            name = Part(self.document, f"a key of {self.name}", key)
            part = Part(self.document, name.text, value)
            if part.name in parts:
                name.refuse(f"`{part.name}` stands twice in `{self.name}`")
            if known is not None and part.name not in known:
                name.refuse(f"`{part.name}` in `{self.name}` is not possible here")
            parts[part.name] = part
        return Members(self, parts)

    def named(self, known: Collection[str] | None = None) -> Iterator[tuple[str, Members]]:
        """Things by their names: the members of a map of maps, or the entries of a list, each with its ``name``."""
        if isinstance(self.node, yaml.SequenceNode):
            for item in self.items():
                thing = item.members(None if known is None else {*known, "name"})
                yield thing.need("name").text, thing
        else:
            for name, part in self.members().parts.items():
                yield name, part.members(known)


@dataclass(frozen=True, slots=True)
class Members:
    """The members of a map.

    Attributes:
        whole: the map itself.
        parts: its members by their names.
    """

    whole: Part
    parts: dict[str, Part]

    def get(self, name: str) -> Part | None:
        """A member; None where it is missing."""
        return self.parts.get(name)

    def need(self, name: str) -> Part:
        """A member that must be there.

        Raises:
            InvalidSetting: it is missing.
        """
        if name not in self.parts:
            self.whole.refuse(f"`{self.whole.name}` has no `{name}`")
        return self.parts[name]

    def text(self, name: str, default: str = "") -> str:
        """The text of a member; `default` where it is missing."""
        return self.parts[name].text if name in self.parts else default

    def items(self, name: str) -> list[Part]:
        """The entries of a list; none where it is missing."""
        return self.parts[name].items() if name in self.parts else []

    def named(self, name: str, known: Collection[str] | None = None) -> Iterator[tuple[str, Members]]:
        """Things by their names, as `Part.named`; none where the member is missing."""
        return self.parts[name].named(known) if name in self.parts else iter(())


def read_yaml(path: Path) -> Part:
    """The document of a file.

    Raises:
        InvalidSetting: it cannot be read, or is no YAML.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InvalidSetting(f"{path} cannot be read: {error.strerror}") from error
    if len(content) > _LARGEST_BYTES:
        raise InvalidSetting(f"{path} is too large: more than {_LARGEST_BYTES:,} bytes")
    try:
        root = yaml.compose(content, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise InvalidSetting(f"{path}{line}: this is not YAML: {error.problem}") from None
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidSetting(f"{path}: this is not YAML: {str(error) or 'it is nested too deep'}") from None
    if root is None:
        raise InvalidSetting(f"{path} is empty")
    return Part(str(path), "the document", root)
