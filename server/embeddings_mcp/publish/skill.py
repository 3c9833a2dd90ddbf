"""The Agent Skill that comes with the server, as values: its frontmatter, its files, their digests, one archive of all.

The format is that of agentskills.io; the folder is ``skills/embeddings`` of the repository, which the wheel carries
inside the package.
"""

from __future__ import annotations

import hashlib
import io
import zipfile
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

import yaml

SKILL = "embeddings"

_MEDIA_TYPES = {".md": "text/markdown", ".yaml": "application/yaml"}

_EPOCH = (1980, 1, 1, 0, 0, 0)
"""The earliest time that a zip archive can state: with real times the same files would make another archive."""


@dataclass(frozen=True, slots=True)
class SkillFile:
    """One file of a skill.

    Attributes:
        path: relative to the skill's folder, with slashes.
        content: its bytes.
    """

    path: str
    content: bytes

    @property
    def digest(self) -> str:
        """The content's SHA-256, ``sha256:`` and 64 hexadecimal digits."""
        return digest(self.content)

    @property
    def media_type(self) -> str:
        """What the content is."""
        return _MEDIA_TYPES[Path(self.path).suffix]


@dataclass(frozen=True, slots=True)
class Skill:
    """A skill.

    Attributes:
        frontmatter: what its author wrote above the text of SKILL.md, ``name`` and ``description`` among it.
        files: all its files by their paths, SKILL.md first.
    """

    frontmatter: dict[str, Any]
    files: dict[str, SkillFile]

    @property
    def name(self) -> str:
        """Its name, which is also that of its folder."""
        name: str = self.frontmatter["name"]
        return name

    @property
    def archive(self) -> bytes:
        """A zip archive of its files, SKILL.md at the top; the same for the same files."""
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
            for file in self.files.values():
                entry = zipfile.ZipInfo(file.path, _EPOCH)
                entry.compress_type = zipfile.ZIP_DEFLATED
                entry.external_attr = 0o644 << 16
                archive.writestr(entry, file.content)
        return buffer.getvalue()


def digest(content: bytes) -> str:
    """The SHA-256 of `content`, as the skill formats write it."""
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


@cache
def read_skill() -> Skill:
    """The skill, as it was when it was first asked for."""
    contents = dict(_walk(_folder()))
    paths = sorted(contents, key=lambda path: (path != "SKILL.md", path))
    frontmatter = yaml.safe_load(contents["SKILL.md"].decode().split("---\n")[1])
    return Skill(frontmatter, {path: SkillFile(path, contents[path]) for path in paths})


def _folder() -> Traversable:
    """The skill's folder: inside the package where that was installed, else that of the repository."""
    installed = files("embeddings_mcp").joinpath("skills", SKILL)
    return installed if installed.is_dir() else Path(__file__).parents[3] / "skills" / SKILL


def _walk(folder: Traversable, prefix: str = "") -> list[tuple[str, bytes]]:
    """The files under a folder that can be served: paths and contents."""
    found = []
    for entry in folder.iterdir():
        if entry.is_dir():
            found += _walk(entry, f"{prefix}{entry.name}/")
        elif Path(entry.name).suffix in _MEDIA_TYPES:
            found.append((f"{prefix}{entry.name}", entry.read_bytes()))
    return found
