"""The Agent Skill that ships with the server: frontmatter, files with their digests, and an archive of all files.

The format is that of agentskills.io. The files are in ``skills/embeddings`` of the repository; the wheel includes them
in the package.
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
"""The earliest timestamp in a zip archive; a fixed one makes archives of the same files identical."""


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
        """SHA-256 of the content: ``sha256:`` and 64 hexadecimal digits."""
        return digest(self.content)

    @property
    def media_type(self) -> str:
        """Media type of the content."""
        return _MEDIA_TYPES[Path(self.path).suffix]


@dataclass(frozen=True, slots=True)
class Skill:
    """A skill.

    Attributes:
        frontmatter: the YAML frontmatter of SKILL.md, including ``name`` and ``description``.
        files: all files by path, SKILL.md first.
    """

    frontmatter: dict[str, Any]
    files: dict[str, SkillFile]

    @property
    def name(self) -> str:
        """Name of the skill and of its folder."""
        name: str = self.frontmatter["name"]
        return name

    @property
    def archive(self) -> bytes:
        """Zip archive of the files, with SKILL.md at the root; identical for identical files."""
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
            for file in self.files.values():
                entry = zipfile.ZipInfo(file.path, _EPOCH)
                entry.compress_type = zipfile.ZIP_DEFLATED
                entry.external_attr = 0o644 << 16
                archive.writestr(entry, file.content)
        return buffer.getvalue()


def digest(content: bytes) -> str:
    """Return the SHA-256 of `content` in the notation of the skill formats."""
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


@cache
def read_skill() -> Skill:
    """Read the skill; later calls return the same object."""
    contents = dict(_walk(_folder()))
    paths = sorted(contents, key=lambda path: (path != "SKILL.md", path))
    frontmatter = yaml.safe_load(contents["SKILL.md"].decode().split("---\n")[1])
    return Skill(frontmatter, {path: SkillFile(path, contents[path]) for path in paths})


def _folder() -> Traversable:
    """Return the skill's folder: in the installed package if it is there, else in the repository."""
    installed = files("embeddings_mcp").joinpath("skills", SKILL)
    return installed if installed.is_dir() else Path(__file__).parents[3] / "skills" / SKILL


def _walk(folder: Traversable, prefix: str = "") -> list[tuple[str, bytes]]:
    """List the servable files under a folder as pairs of path and content."""
    collected = []
    for entry in folder.iterdir():
        if entry.is_dir():
            collected += _walk(entry, f"{prefix}{entry.name}/")
        elif Path(entry.name).suffix in _MEDIA_TYPES:
            collected.append((f"{prefix}{entry.name}", entry.read_bytes()))
    return collected
