"""Find environment variables that look like settings but are none, most often because they are misspelt."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator

from embeddings_mcp.settings import PREFIX, Settings

_KUBERNETES_VARIABLE = re.compile(r"SERVICE_(HOST|PORT(_\w+)?)|PORT(_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)?")
"""What Kubernetes sets, after the prefix, in the containers of a namespace with a service called ``embeddings-mcp``."""


def misspelt(environment: Iterable[str], settings: Settings) -> Iterator[str]:
    """Yield a warning for each environment variable that has the prefix of our settings but is not one.

    Args:
        environment: names of all environment variables.
        settings: may name variables that hold the keys of endpoints.
    """
    known = [name.upper() for name in Settings.model_fields]
    key_variables = {endpoint.api_key_env for endpoint in settings.endpoints}
    for name in sorted(environment):
        prefix, rest = name[: len(PREFIX)].upper(), name[len(PREFIX) :].upper()  # settings are case-insensitive
        if prefix != PREFIX or rest in known or name in key_variables or _KUBERNETES_VARIABLE.fullmatch(rest):
            continue
        matches = difflib.get_close_matches(rest, known, n=1)
        yield f"{name} is set but is not a setting" + (f": did you mean {PREFIX}{matches[0]}?" if matches else "")
