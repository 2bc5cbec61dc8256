"""Which token a source is read with: see `webhook_app.credentials`, where commands find it as well."""

from webhook_app.credentials import Keyring, lane

__all__ = ["Keyring", "lane"]
