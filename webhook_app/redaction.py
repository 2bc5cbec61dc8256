"""What may be secret is taken out of texts that others wrote: logs, annotations.  Pure.

Known secrets (ours, from the settings) go wherever they stand, as they are, percent-encoded and in
Base64; unknown ones by their form: tokens of platforms and clouds, private keys, JWTs, credentials in
addresses and headers, assignments to names like `password`.  Too much is masked rather than too little.

Every pattern is bounded or begins at a fixed word, so that no text makes one slow.
"""

import base64
import re
from collections.abc import Iterable
from dataclasses import dataclass
from urllib.parse import quote

MASK = "***"
SHORTEST_SECRET = 4
_FREE_STANDING = 8
"""A known secret shorter than this is masked only where it stands by itself: `test` is part of many words."""

_TOKENS = re.compile(
    r"\b(?:"
    r"gh[pousr]_[\w.-]{16,}|github_pat_\w{16,}"
    r"|gl(?:pat|ptt|dt|rtr|rt|cbt|ft|soat|agent|imt|oas|ffct)-[\w.-]{16,}"
    r"|xox[a-z](?:\.[a-z]{2,4})?-[\w.-]{10,}|xapp-[\w-]{10,}"
    r"|(?:AKIA|ASIA|ABIA|ACCA|AROA|AIDA)[A-Z0-9]{16}"
    r"|AIza[\w-]{30,}|ya29\.[\w-]{16,}"
    r"|(?:sk|rk|pk)_(?:live|test)_\w{10,}|sk-[\w-]{20,}"
    r"|npm_\w{20,}|pypi-[\w-]{20,}|dckr_pat_[\w-]{16,}|hv[sb]\.[\w-]{16,}|wh(?:sec|sk)_[\w+/=-]{16,}"
    r"|eyJ[\w-]{8,}\.[\w-]{8,}(?:\.[\w-]*)?"
    r")"
)
_SLACK_HOOK = re.compile(r"(hooks\.slack\.com/)[\w/+-]{8,}")
_HEADER = re.compile(
    r"\b((?:proxy-)?authorization|(?:set-)?cookie|private-token|job-token|x-[a-z-]{0,30}(?:token|key))"
    r"(\\?[\"']?[ \t]{0,4}[:=][ \t]{0,4}\\?[\"']?)[^\"'\n\\]+",
    re.IGNORECASE,
)
_BEARER = re.compile(r"\b(bearer|basic)([ \t]{1,4})[\w.~+/=-]{12,}", re.IGNORECASE)
_NAMED = (
    r"(?:passw(?:or)?d|passphrase|pwd|secret|token|api[_-]?key|access[_-]?key|private[_-]?key"
    r"|encryption[_-]?keys?|credentials?)"
)
_VALUE = r"(?:\"[^\"\n]*\"?|'[^'\n]*'?|[^\s,;&\"')\]}]+)"
_ASSIGNED = re.compile(
    rf"({_NAMED}(?:[\w-]{{0,40}}\\?[\"']?[ \t]{{0,4}}(?::=|=>|=|:)|[\w.-]{{0,40}}=)[ \t]{{0,4}}\\?)"
    rf"({_VALUE})",
    re.IGNORECASE,
)
_OPTION = re.compile(rf"(--[a-z-]{{0,30}}{_NAMED}[a-z-]{{0,20}}[ \t]{{1,4}})({_VALUE})", re.IGNORECASE)
_USER_INFO = re.compile(r"(?<=://)[^/@\s?#\"'<>]{1,1024}@")
_QUERY = re.compile(
    r"([?&][^=&?\s]{0,40}(?:token|secret|passw|key|sig)[^=&?\s]{0,40}=)[^&#\s\"']+", re.IGNORECASE
)
_WHOLE_KEY = re.compile(
    r"-----BEGIN [A-Z0-9 ]{0,40}PRIVATE KEY(?: BLOCK)?-----"
    r"(?:(?!-----BEGIN ).)*?(?:-----END [A-Z0-9 ]{0,40}PRIVATE KEY(?: BLOCK)?-----|(?=-----BEGIN )|\Z)",
    re.DOTALL,
)
_KEY_END = re.compile(r"-----END [A-Z0-9 ]{0,40}PRIVATE KEY(?: BLOCK)?-----")


@dataclass(frozen=True, slots=True)
class Redactor:
    """Masks secrets; make one per process with `redactor(secrets)`."""

    known: re.Pattern[str] | None

    def __call__(self, text: str) -> str:
        """`text` with `***` where something may be secret.

        A private key that begins and does not end goes to the end of the text; one that only ends, from
        the beginning of the text on: it was cut.
        """
        text = _WHOLE_KEY.sub(MASK, text)
        ends = [found.end() for found in _KEY_END.finditer(text)]
        if ends:
            text = MASK + text[ends[-1] :]
        if self.known is not None:
            text = self.known.sub(MASK, text)
        text = _TOKENS.sub(MASK, _SLACK_HOOK.sub(rf"\1{MASK}", text))
        text = _BEARER.sub(rf"\1\2{MASK}", _HEADER.sub(rf"\1\2{MASK}", text))
        text = _OPTION.sub(rf"\1{MASK}", _ASSIGNED.sub(rf"\1{MASK}", text))
        return _QUERY.sub(rf"\1{MASK}", _USER_INFO.sub(f"{MASK}@", text))


def redactor(secrets: Iterable[str]) -> Redactor:
    """A redactor that also knows these secrets; each line of one with several is one itself."""
    lines = {line.strip() for secret in secrets for line in secret.splitlines()}
    forms = {form for line in lines if len(line) >= SHORTEST_SECRET for form in _forms(line)}
    if not forms:
        return Redactor(None)
    longest_first = sorted(forms, key=lambda form: (-len(form), form))
    return Redactor(re.compile("|".join(map(_pattern, longest_first))))


def _forms(secret: str) -> set[str]:
    """As it is, and as it shows in addresses and in `Authorization: Basic`."""
    coded = base64.b64encode(secret.encode()).decode().rstrip("=")
    return {secret, quote(secret, safe=""), coded} if len(secret) >= _FREE_STANDING else {secret}


def _pattern(form: str) -> str:
    escaped = re.escape(form)
    return escaped if len(form) >= _FREE_STANDING else rf"(?<!\w){escaped}(?!\w)"
