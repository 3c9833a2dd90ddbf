"""Environment variables that look like settings and are none: most often a setting whose name is misspelt."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator

from embeddings_mcp.settings import PREFIX, Settings

_OF_KUBERNETES = re.compile(r"SERVICE_(HOST|PORT(_\w+)?)|PORT(_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)?")
"""What Kubernetes sets, behind the prefix, in every container beside a service called ``embeddings-mcp``."""


def misspelt(environment: Iterable[str], settings: Settings) -> Iterator[str]:
    """A sentence on each variable of these names that has the prefix of our settings, and means nothing here.

    Args:
        environment: the names of all variables.
        settings: which may name some that hold keys.
    """
    known = [name.upper() for name in Settings.model_fields]
    keys = {endpoint.api_key_env for endpoint in settings.endpoints}
    for name in sorted(environment):
        prefix, rest = name[: len(PREFIX)].upper(), name[len(PREFIX) :].upper()  # settings are found in either case
        if prefix != PREFIX or rest in known or name in keys or _OF_KUBERNETES.fullmatch(rest):
            continue
        near = difflib.get_close_matches(rest, known, n=1)
        yield f"{name} is set, and is no setting" + (f": is {PREFIX}{near[0]} meant?" if near else "")
