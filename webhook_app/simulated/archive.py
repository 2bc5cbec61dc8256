"""ZIP files that are the same for the same content."""

import io
import zipfile
from collections.abc import Mapping
from functools import lru_cache


@lru_cache(64)
def zipped(name: str, text: str, filling: int = 0) -> bytes:
    """One small file, and one of `filling` zero bytes beside it."""
    return zip_of({name: text.encode(), **({"filling.bin": bytes(filling)} if filling else {})})


def zip_of(files: Mapping[str, bytes]) -> bytes:
    """These files, not compressed, so that a big one is big."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as archive:
        for name, content in files.items():
            archive.writestr(zipfile.ZipInfo(name), content)
    return stream.getvalue()
