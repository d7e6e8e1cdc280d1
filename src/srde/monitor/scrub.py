"""Takes secrets out of texts that leave the machine: webhook URLs, and the environment's tokens and keys."""

from __future__ import annotations

import re
from collections.abc import Mapping
from urllib.parse import parse_qsl, unquote, urlsplit

SECRET_NAME = re.compile(r"(^|_)(TOKEN|KEY|SECRET|PASSWORD)$|^WEBHOOK_URL$", re.IGNORECASE)
SHORTEST_SECRET = 8
"""Shorter values are not looked for: `1` or `true` would be taken out of every text."""
SHORTEST_PART = 16
"""Parts of a webhook's path that are shorter are words (`services`, `webhooks`) and not its secret."""
HIDDEN = "[hidden]"


class Scrubber:
    """Replaces secrets in texts. Its `repr` shows none of them.

    Covered: the URL, its path with and without its query, and their long parts, written as they are or percent-decoded;
    values of variables called ``*_TOKEN``, ``*_KEY``, ``*_SECRET``, ``*_PASSWORD`` or ``WEBHOOK_URL``. Not covered: secrets
    that are encoded in another way, cut into pieces or shorter than 8 characters, and those that lie in files.

    Args:
        url: The webhook's URL, if there is one.
        environ: The environment; read once.
    """

    def __init__(self, url: str | None, environ: Mapping[str, str]) -> None:
        secrets = {value for name, value in environ.items() if SECRET_NAME.search(name)}
        secrets |= {
            part for value in secrets if value.startswith(("http://", "https://")) for part in _parts(value)
        }
        secrets |= _parts(url) if url else set()
        secrets |= {secret.strip() for secret in secrets}
        long_enough = [secret for secret in secrets if len(secret) >= SHORTEST_SECRET]
        # The longest first: of a secret that begins like another one, no end may be left over.
        ordered = sorted(long_enough, key=lambda secret: (-len(secret), secret))
        self._pattern = re.compile("|".join(map(re.escape, ordered))) if ordered else None

    def __call__(self, text: str) -> str:
        """The text with every secret replaced by ``[hidden]``."""
        return self._pattern.sub(HIDDEN, text) if self._pattern else text


def _parts(url: str) -> set[str]:
    """What of a webhook's URL gives it away."""
    found = {url}
    try:
        parts = urlsplit(url)
    except ValueError:  # not a URL: its whole is hidden
        return found
    found |= {f"{parts.path}?{parts.query}", parts.path}
    values = [value for _, value in parse_qsl(parts.query)]
    found |= {part for part in [*parts.path.split("/"), *values] if len(part) >= SHORTEST_PART}
    return found | {unquote(part) for part in found}
