"""Which token a source is read with."""

from collections.abc import Sequence
from datetime import datetime
from hashlib import sha256
from urllib.parse import urlsplit

from sqlalchemy import Engine

from webhook_app.platforms import Source
from webhook_app.settings import SourceSettings


def lane(settings: SourceSettings) -> str:
    """The budget a source spends: sources with the same token share it."""
    source = settings.source
    who = sha256(source.token.encode()).hexdigest()[:16] if source.token else "anonymous"
    return f"{source.platform}:{urlsplit(source.api_url).netloc}:{who}"


class Keyring:
    """The tokens of all sources."""

    def __init__(self, engine: Engine, encryption_keys: Sequence[str]) -> None:
        self.engine, self.keys = engine, encryption_keys

    def source(self, settings: SourceSettings, now: datetime) -> Source:
        """The source with a token that can be used."""
        return settings.source

    def refreshed(self, settings: SourceSettings, refused: Source, now: datetime) -> Source | None:
        """Another token after one was refused, or None."""
        return None
