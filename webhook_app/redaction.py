"""What may be secret is taken out of texts that others wrote: reports, logs, answers, errors.  Pure.

Known secrets (ours, from the settings) go wherever they stand, as they are, percent-encoded and in
Base64; unknown ones by their shape (`secret_shapes`): tokens of platforms and clouds, private keys, JWTs,
credentials in addresses, headers and command lines, assignments to names like `password`.
"""

import base64
import hashlib
import html
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any
from urllib.parse import quote

from webhook_app.lifecycle import Observation, ObservedBy
from webhook_app.secret_shapes import (
    AROUND,
    ESCAPED_TOKEN,
    GLUED_TOKEN,
    IN_ADDRESSES,
    KEY_END,
    MASK,
    PRIVATE_KEY,
    TOKEN,
    UNMISTAKABLE,
)

SHORTEST_SECRET = 4
SHORTEST_CODED = 8
_FREE_STANDING = 16
"""A known secret shorter than this is masked only where it stands by itself: `test` is part of many words."""
_LONGEST_CUT = 512
DEEPEST = 60
"""Levels of a JSON value; what is below is masked whole."""

_SECRET_NAME = re.compile(
    r"passw|passphrase|secret|token|credential|authorization|api[-_]?key|private[-_]?key|access[-_]?key"
    r"|signature|^(?:pwd|auth)$",
    re.IGNORECASE,
)
_ABOUT_IT = re.compile(
    r"(?:count|name|type|used|file|path|expires\w*|ttl|length|tokenizer|secretary)$", re.IGNORECASE
)


@dataclass(frozen=True, slots=True)
class Redactor:
    """Masks secrets; made by `redactor(secrets)`, and `also` adds some.

    `forms`: what known secrets look like, longest first.  `short`: known secrets that may be part of a word.
    """

    forms: tuple[str, ...] = ()
    short: tuple[str, ...] = ()

    def __call__(self, text: str) -> str:
        """A free text with `***` where something may be secret.

        A private key that begins and does not end goes to the end of the text; one that only ends, from
        the beginning of the text on: it was cut.
        """
        text = self.name(self.known(text))
        if any(prefix in text for prefix in UNMISTAKABLE):
            text = GLUED_TOKEN.sub(MASK, text)
        lowered = text.lower()
        for rule in AROUND:
            if any(hint in lowered for hint in rule.hints):
                text = rule.pattern.sub(rule.shown, text)
        return text

    def known(self, text: str) -> str:
        """A text without the known secrets, and nothing else masked."""
        for form in self.forms:
            if form in text:
                text = text.replace(form, MASK)
        for secret in self.short:
            if secret in text:
                text = re.sub(rf"(?<!\w){re.escape(secret)}(?!\w)", MASK, text)
        return text

    def name(self, text: str) -> str:
        """A name, ref or address, without what is a secret by its own form: no guess from words around it.

        So `fix/password=reset` stays as it is.
        """
        if "PRIVATE KEY" in text:
            text = _without_keys(text)
        for form in self.forms:
            if form in text:
                text = text.replace(form, MASK)
        text = TOKEN.sub(MASK, text)
        if "\\" in text or "%" in text or "[" in text:
            text = ESCAPED_TOKEN.sub(MASK, text)
        for rule in IN_ADDRESSES:
            if any(hint in text for hint in rule.hints):
                text = rule.pattern.sub(rule.shown, text)
        return text

    def identity(self, text: str) -> str:
        """A text that others compare, as `name`; what was masked ends in a part of its digest, case ignored.

        So two that differ in their secret alone still differ.
        """
        shown = self.name(text)
        if shown == text:
            return text
        return f"{shown}~~{hashlib.sha256(text.casefold().encode('utf-8', 'replace')).hexdigest()[:16]}"

    def value(self, value: Any, depth: int = 0) -> Any:
        """A JSON value: its texts as free texts, and masked whole what stands under a name like `password`.

        Truth values and numbers stay, except the number that is a password.
        """
        if depth > DEEPEST:
            return MASK
        if isinstance(value, str):
            return self(value)
        if isinstance(value, Mapping):
            return {self.name(name): self._field(name, inner, depth) for name, inner in value.items()}
        return self._list(value, depth + 1) if isinstance(value, list) else value

    def _list(self, values: Sequence[Any], depth: int) -> list[Any]:
        """As `value`; what follows an option such as `--password` is its value."""
        options = [isinstance(one, str) and one.startswith("-") and is_secret_name(one) for one in values]
        return [
            MASK if isinstance(one, str) and place and options[place - 1] else self.value(one, depth)
            for place, one in enumerate(values)
        ]

    def also(self, secrets: Iterable[str]) -> "Redactor":
        """One that knows these secrets as well."""
        more = redactor(secrets)
        forms = sorted({*self.forms, *more.forms}, key=lambda form: (-len(form), form))
        return Redactor(tuple(forms), (*self.short, *more.short))

    def whole(self, text: str) -> str:
        """A text that was cut, without its end, where half a known secret may stand."""
        longest = min(max(map(len, self.forms), default=0), _LONGEST_CUT)
        return text[: max(len(text) - longest, 0)]

    def _field(self, name: str, value: Any, depth: int) -> Any:
        if value is None or isinstance(value, bool) or not is_secret_name(name):
            return self.value(value, depth + 1)
        is_number = isinstance(value, int | float) and not re.search("passw|secret", name, re.IGNORECASE)
        return value if is_number or value == "" else MASK


SHAPES = Redactor()
"""Knows no secret, only their forms: for texts of which nobody at hand knows more."""


def is_secret_name(name: str) -> bool:
    """Whether the value of a field of this name is a secret; not so `token_count` or `secret_name`."""
    return _SECRET_NAME.search(name) is not None and _ABOUT_IT.search(name) is None


def _without_keys(text: str) -> str:
    text = PRIVATE_KEY.sub(MASK, text)
    ends = [found.end() for found in KEY_END.finditer(text)]
    return MASK + text[ends[-1] :] if ends else text


def redactor(secrets: Iterable[str]) -> Redactor:
    """A redactor that also knows these secrets; each line of one with several is one itself."""
    lines = {line.strip() for secret in secrets for line in secret.splitlines()}
    coded = {line: _forms(line) for line in lines if len(line) >= SHORTEST_CODED}
    long = {
        form for line, forms in coded.items() for form in forms if form != line or len(line) >= _FREE_STANDING
    }
    short = sorted(line for line in lines if SHORTEST_SECRET <= len(line) < _FREE_STANDING)
    return Redactor(tuple(sorted(long, key=lambda form: (-len(form), form))), tuple(short))


@lru_cache(1024)
def _forms(secret: str) -> frozenset[str]:
    """As it is, and as it shows in addresses, JSON, pages and, whatever stands before it, in Base64."""
    coded = quote(secret, safe="")
    lower = re.sub("%[0-9A-F]{2}", lambda found: found[0].lower(), coded)
    shown = {secret, coded, lower, quote(secret), json.dumps(secret)[1:-1], html.escape(secret)}
    in_base64 = (form for place in range(3) for form in _base64(secret.encode("utf-8", "replace"), place))
    return frozenset(shown.union(in_base64))


def _base64(secret: bytes, place: int) -> set[str]:
    """The characters that are the secret's alone, if so many bytes of a group of three stand before it."""
    coded = base64.b64encode(bytes(place) + secret).decode()
    sure = coded[-(-8 * place // 6) : 8 * (place + len(secret)) // 6]
    return {sure, sure.replace("+", "-").replace("/", "_")}


# ---- facts about builds --------------------------------------------------------------------------

_LINE = ("workflow", "branch")
"""What history, filters and badges tell builds apart by."""
_NAMES = ("commit", "url", "preview_url", "raw_status", "raw_conclusion", "trigger")
_REFS = ("repo", "branch", "commit")


def names_of(seen: Observation) -> list[str]:
    """The names, refs and addresses that an observation tells."""
    found = [seen.build_id, *(getattr(seen, name) for name in _NAMES), *(job.name for job in seen.jobs)]
    return [text for text in found if text]


def masked(seen: Observation, redact: Redactor) -> Observation:
    """An observation without secrets, as it may be recorded.

    Texts (error, detail) are masked as free texts; names, refs and addresses only where they hold a secret by
    its own form, and two workflows or branches that differ in a secret alone still differ.  Repository and
    build id of a CI platform stay, since the next poll is addressed by them; those of a build script, which
    nobody asks, do not.
    """
    joined = "\n".join(names_of(seen))
    changes: dict[str, Any] = {}
    if redact.name(joined) != joined:
        changes = {name: told and redact.name(told) for name in _NAMES for told in [getattr(seen, name)]}
        changes |= {name: told and redact.identity(told) for name in _LINE for told in [getattr(seen, name)]}
        changes["jobs"] = tuple(replace(job, name=redact.name(job.name)) for job in seen.jobs)
    if seen.observed_by is ObservedBy.REPORT:
        build_id = redact.identity(seen.build_id)
        changes |= {"build_id": build_id, "key": build_id.casefold()} if build_id != seen.build_id else {}
        changes |= {"repository": redact.name(seen.repository)} if seen.repository else {}
    if seen.error:
        changes["error"] = redact(seen.error)
    if seen.detail is not None:
        changes["detail"] = replace(seen.detail, data=_detail(seen.detail.data, redact))
    return replace(seen, **changes) if changes else seen


def _detail(data: Mapping[str, object], redact: Redactor) -> dict[str, object]:
    refs = {name: redact.name(text) for name in _REFS if isinstance(text := data.get(name), str)}
    shown: dict[str, object] = redact.value({name: inner for name, inner in data.items() if name not in refs})
    return {name: refs[name] for name in data if name in refs} | shown
