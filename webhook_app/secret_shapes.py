"""What secrets look like in a text: tokens by their prefix, and what stands around all others.  Data, pure.

A form is looked for only where its hint (a fixed word of it) stands in the text: short texts stay cheap.
Every pattern is bounded or consumes what it has read, so that no text makes one slow.
"""

import base64
import binascii
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

MASK = "***"

Replacement = str | Callable[[re.Match[str]], str]


@dataclass(frozen=True, slots=True)
class Rule:
    """A form of secrets: texts in lower case without any of its `hints` are not searched for `pattern`."""

    hints: tuple[str, ...]
    pattern: re.Pattern[str]
    shown: Replacement = MASK


# ---- tokens --------------------------------------------------------------------------------------

_A, _HEX, _W = "[A-Za-z0-9]", "[0-9a-fA-F]", r"[\w-]"
_TOKENS: Mapping[str, str] = {
    # ours, and Standard Webhooks
    "brt_": _W + "{16,}", "whsec_": r"[\w+/=-]{16,}", "whsk_": r"[\w+/=-]{16,}", "whpk_": r"[\w+/=-]{16,}",
    # https://github.blog/engineering/behind-githubs-new-authentication-token-formats/
    **dict.fromkeys(("ghp_", "gho_", "ghu_", "ghs_", "ghr_"), r"[\w.-]{16,}"), "github_pat_": r"\w{16,}",
    # https://docs.gitlab.com/security/tokens/#token-prefixes
    **dict.fromkeys(
        ("glpat-", "glptt-", "gldt-", "glrtr-", "glrt-", "glcbt-", "glft-", "glsoat-", "glagent-", "glimt-",
         "gloas-", "glffct-", "glwt-"), r"[\w.-]{16,}"),
    "GR1348941": _W + "{16,}",
    # CI, packages, code
    "npm_": _A + "{30,}", "pypi-AgE": _W + "{20,}", "rubygems_": _A + "{20,}",
    "oy2": "[a-z0-9]{43}", "CLOJARS_": _A + "{20,}", "dckr_pat_": _W + "{16,}", "dckr_oat_": _W + "{16,}",
    "AKCp": _A + "{50,}", "cmVmdGtu": r"[\w=-]{40,}", "sqp_": _A + "{20,}", "squ_": _A + "{20,}",
    "sqa_": _A + "{20,}", "sgp_": r"\w{40,}", "ATATT3x": r"[\w=-]{16,}", "ATCTT3x": r"[\w=-]{16,}",
    "ATBB": _A + "{24,}", "bkua_": _A + "{30,}", "CCIPAT_": r"\w{16,}", "CCIPRJ_": r"\w{16,}",
    "snyk_": r"(?:uat|sat)\.\w{8}\.[\w.-]{16,}", "sntrys_": r"[\w+/=-]{20,}", "sntryu_": _A + "{20,}",
    "pul-": _HEX + "{40}", "pnu_": _A + "{30,}", "PMAK-": _HEX + "{20,}-" + _HEX + "{30,}",
    "API-": "[A-Z0-9]{26}",
    "glsa_": r"\w{24,}", "glc_": r"[\w+/=-]{30,}", "NRAK-": "[A-Z0-9]{20,}", "NRII-": _W + "{30,}",
    "dt0c01.": r"[A-Z0-9]{20,}\.[A-Z0-9]{40,}", "phx_": _W + "{30,}", "ico-": _A + "{32}",
    # clouds
    **dict.fromkeys(("AKIA", "ASIA", "ABIA", "ACCA", "AROA", "AIDA"), r"[A-Z0-9]{16}\b"),
    "ABSK": r"[\w+/=]{100,}", "AIza": _W + "{30,}", "ya29.": r"[\w.-]{16,}", "GOCSPX-": _W + "{16,}",
    "1//0": _W + "{30,}", "LTAI": _A + r"{16,24}\b", "AQVN": _W + "{35,}", "dapi": _HEX + "{32}",
    **dict.fromkeys(("dop_v1_", "doo_v1_", "dor_v1_"), _A + "{20,}"), "HRKU-": _W + "{20,}",
    "v1.0-": _HEX + "{24}-" + _HEX + "{100,}", "tskey-": _W + "{16,}", "nfp_": _A + "{30,}",
    "rnd_": _A + "{28,}",
    **dict.fromkeys(("fo1_", "fm1a_", "fm1r_", "fm2_"), r"[\w+/=-]{40,}"), "hvs.": _W + "{16,}",
    "hvb.": _W + "{16,}", "hvr.": _W + "{16,}", "sha256~": _W + "{40,}", "sbp_": _HEX + "{40}",
    "sb_secret_": _W + "{16,}", "ops_eyJ": r"[\w+/=-]{40,}", "AGE-SECRET-KEY-": "[A-Za-z0-9-]{20,}",
    **dict.fromkeys(("pscale_pw_", "pscale_tkn_", "pscale_oauth_"), r"[\w=.-]{20,}"),
    **dict.fromkeys(("dp.pt.", "dp.st.", "dp.ct.", "dp.sa.", "dp.scim.", "dp.audit."), r"[\w.-]{20,}"),
    # money, shops, mail, talk
    **dict.fromkeys(("sk_live_", "sk_test_", "rk_live_", "rk_test_", "pk_live_", "pk_test_"), r"\w{10,}"),
    **dict.fromkeys(("shpat_", "shpca_", "shppa_", "shpss_"), _A + "{20,}"),
    **dict.fromkeys(("shippo_live_", "shippo_test_"), _A + "{20,}"), "sq0atp-": _W + "{20,}",
    "sq0csp-": _W + "{40,}", "EAAA": _W + "{60,}", "SG.": r"[\w.-]{20,}", "xkeysib-": _W + "{40,}",
    "xsmtpsib-": _W + "{40,}", "mlsn.": _A + "{40,}", "SK": _HEX + r"{32}\b", "xapp-": _W + "{10,}",
    **dict.fromkeys(("xoxa-", "xoxb-", "xoxc-", "xoxd-", "xoxe-", "xoxo-", "xoxp-", "xoxr-", "xoxs-"),
                    r"[\w.%-]{10,}"),
    "xoxe.xox": r"[a-z]-[\w.-]{10,}", "lin_api_": _A + "{20,}", "ntn_": _A + "{40,}", "figd_": _W + "{30,}",
    "tfp_": r"[\w.-]{40,}", "CFPAT-": _W + "{40,}", "EZAK": _A + "{54}", "FLWSECK": r"[\w-]{20,}",
    "rdme_": _A + "{40,}",
    # models
    "hf_": _A + "{30,}", "api_org_": _A + "{30,}",
    "sk-": r"(?:(?:proj|ant|svcacct|admin|or|lf)-[\w-]{20,}|[A-Za-z0-9]{32,})",
    "gsk_": _A + "{30,}", "xai-": _A + "{40,}", "pplx-": _A + "{30,}", "r8_": _A + "{30,}",
    "nvapi-": _W + "{40,}", "lsv2_": r"\w{30,}", "tvly-": _W + "{24,}",
    # signed ones
    "eyJ": r"[\w-]{8,800}\.[\w-]{8,}(?:\.[\w-]*)?",
}  # fmt: skip
"""What tokens begin with, and what must follow; as GitHub's secret scanning and gitleaks name them."""


_WORD_BEGINS = "(?<![A-Za-z0-9])"
_ESCAPE_ENDS = rf"(?:(?<=\\[nrt])|(?<=%{_HEX}{{2}})|(?<=\\u{_HEX}{{4}})|(?<=[0-9]m))"
"""What is escaped (`\\n`, `%3D`, `\\u003d`) and the end of a colour: a token may follow it."""


def _tokens(begin: str, prefixes: Iterable[str] = _TOKENS) -> re.Pattern[str]:
    """All tokens in one pattern that looks at each beginning of a word once, by its first character."""
    by_first: dict[str, list[str]] = {}
    for prefix in prefixes:
        rest = _TOKENS[prefix]
        by_first.setdefault(prefix[0], []).append(re.escape(prefix[1:]) + rest)
    branches = (f"{first}(?:{'|'.join(rest)})" for first, rest in by_first.items())
    return re.compile(f"{begin}(?:{'|'.join(branches)})", re.ASCII)


TOKEN, ESCAPED_TOKEN = _tokens(_WORD_BEGINS), _tokens(_ESCAPE_ENDS)

UNMISTAKABLE = tuple(
    prefix for prefix in _TOKENS
    if prefix[-1] in "_-" and (len(prefix) >= 5 or prefix in ("ghp_", "gho_", "ghu_", "ghs_", "ghr_", "npm_"))
)  # fmt: skip
"""What no word contains: in a free text a token may stand right behind an option, as in `-tTOKEN`."""
GLUED_TOKEN = _tokens("", UNMISTAKABLE)


# ---- credentials in addresses --------------------------------------------------------------------


def _without_user_info(found: re.Match[str]) -> str:
    """An address, and all that follows it without a blank, with `***@` for who asks."""
    return "://".join(["", *map(_one_without, found[0].split("://")[1:])])


def _one_without(rest: str) -> str:
    """What follows `://`.  A password may hold `/`, `?`, `#` and `@`; what begins like a port is none."""
    ends = len(rest) if _PASSWORD.match(rest) else _AUTHORITY_END.search(rest + "/").start()  # type: ignore[union-attr]
    at = rest.rfind("@", 0, ends)
    is_plain = at <= 0 or rest.startswith(_NO_SECRETS) or rest.startswith(("sha256:", "sha512:"), at + 1)
    return rest if is_plain else f"{MASK}{rest[at:]}"


_AUTHORITY_END = re.compile(r"[/?#]")
_PASSWORD = re.compile(r"(?![A-Za-z]:[/\\])[^/:@?#\[\]]{0,255}:(?!\d{1,5}(?:[/?#]|$))")
_NO_SECRETS = ("git@", "hg@", "svn@")

IN_ADDRESSES = (
    Rule(
        ("hooks.slack.com", "discord", "webhook.office.com", "api.telegram.org/bot"),
        re.compile(
            r"(hooks\.slack\.com/|discord(?:app)?\.com/api/webhooks/|webhook\.office\.com/"
            r"|api\.telegram\.org/bot)[\w/@:+-]{8,}"
        ),
        rf"\1{MASK}",
    ),
    Rule(("://",), re.compile(r"://[^\s\"'<>`]*"), _without_user_info),
    Rule(
        ("?", "&"),
        re.compile(
            r"([?&](?:[^=&?\s]{0,40}(?:token|secret|passw|credential|signature|api[_-]?key|access[_-]?key)"
            r"[^=&?\s]{0,40}|(?:[^=&?\s]{1,40}[_.-])?(?:sig|pwd|auth)|key)=)[^&#\s\"']+",
            re.IGNORECASE,
        ),
        rf"\1{MASK}",
    ),
)
PRIVATE_KEY = re.compile(
    r"-----BEGIN [A-Z0-9 ]{0,40}PRIVATE KEY(?: BLOCK)?-----"
    r"(?:(?!-----BEGIN ).)*?(?:-----END [A-Z0-9 ]{0,40}PRIVATE KEY(?: BLOCK)?-----|(?=-----BEGIN )|\Z)",
    re.DOTALL,
)
KEY_END = re.compile(r"-----END [A-Z0-9 ]{0,40}PRIVATE KEY(?: BLOCK)?-----")


# ---- known by what stands around them ------------------------------------------------------------

_NAMED = (
    r"(?:passw(?:or)?d|passphrase|pwd|secret|token|api[_ -]?key|access[_ -]?key|account[_-]?key"
    r"|private[_-]?key|encryption[_-]?keys?|credentials?)"
)
_VALUE = r"(?:\"[^\"\n]*\"?|'[^'\n]*'?|[^\s,;&\"')\]}]+)"
_TELLS_NOTHING = (
    r"(?!\\?[\"']?\*{3})(?!\\?[\"']?(?:true|false|null|none|undefined|required|optional|read|write|yes|no"
    r"|\$\{[^}\n]{0,80}\}\}?|(?-i:\$[A-Z_][A-Z0-9_]*)|%\w{1,40}%)(?:[\s,;&\"')\]}\\]|$))"
)
_WORD = r"\\?(?:\"[^\"\n]*\"?|'[^'\n]*'?|[^\s\"']+)"


_OPTIONS = (
    (("curl",), r"(\s(?:-[A-Za-z]{0,8}[uU]|--(?:proxy-)?user)(?:[ \t=]{1,4}|(?=[\"'\w])))" + _WORD),
    (("mysql", "mysqldump", "mysqladmin", "mysqlimport", "mariadb", "mariadb-dump", "mongo", "mongosh",
      "mongodump", "mongorestore", "sshpass", "twine"), r"(\s-p[ \t=]{0,4})(?![-<>|&])" + _WORD),
    (("login",), r"(\s-p[ \t=]{0,4})(?![-<>|&])" + _WORD),
    (("7z", "7za", "7zz"), r"(\s-p)(?=\S)" + _WORD),
    (("zip", "unzip", "sqlcmd", "bcp", "ipmitool"), r"(\s-P[ \t=]{0,4})" + _WORD),
    (("redis-cli", "redis-benchmark"), r"(\s-a[ \t=]{1,4})" + _WORD),
    (("ldapsearch", "ldapmodify", "ldapadd", "ldapwhoami", "ldapdelete", "ldappasswd"),
     r"(\s-w[ \t=]{0,4})" + _WORD),
    (("smbclient", "rpcclient"), r"(\s-U[ \t=]{0,4}[^\s%]{0,200}%)" + _WORD),
    (("openssl", "keytool", "jarsigner"),
     r"(\s(?:-pass(?:in|out)?[ \t]{1,4}pass:|-(?:key|store)pass[ \t]{1,4}))" + _WORD),
    (("htpasswd",), r"(\s-[A-Za-z]{0,6}b[A-Za-z]{0,6}(?:[ \t]{1,4}\S{1,300}){2}[ \t]{1,4})" + _WORD),
)  # fmt: skip


def _in_command(found: re.Match[str]) -> str:
    """One command with the passwords masked that its options give."""
    command = found[0]
    for tools, option in _BY_TOOL:
        if any(tool in command for tool in tools):
            command = option.sub(rf"\1{MASK}", command)
    return command


_BY_TOOL = tuple((tools, re.compile(option)) for tools, option in _OPTIONS)
_TOOLS = tuple(dict.fromkeys(tool for tools, _ in _OPTIONS for tool in tools))
_COMMAND = re.compile(
    rf"(?<![\w-])(?:{'|'.join(map(re.escape, _TOOLS))})(?![\w-])(?:(?!\s(?:&&|\|\|?)\s|;\s)[^\n])*"
)


def _without_auth(found: re.Match[str]) -> str:
    """`"auth": "…"` of a Docker configuration; a word such as `basic` stays."""
    try:
        is_pair = b":" in base64.b64decode(found[2] + "===")
    except binascii.Error:
        is_pair = False
    return found[1] + MASK if is_pair or len(found[2]) >= 20 else found[0]


AROUND = (
    Rule(
        ("authorization", "cookie", "-token", "x-"),
        re.compile(
            r"\b((?:proxy-)?authorization|(?:set-)?cookie|private-token|job-token|deploy-token"
            r"|x-[a-z-]{0,30}(?:token|key))(\\?[\"']?[ \t]{0,4}[:=][ \t]{0,4}\\?[\"']?)"
            r"(?:digest[ \t][^\n]+|[^\"'\n\\]+)",
            re.IGNORECASE,
        ),
        rf"\1\2{MASK}",
    ),
    Rule(
        ("bearer", "basic"),
        re.compile(
            r"\b(bearer[ \t]{1,4}(?!authenticat|authoriz|credential|token)"
            r"|basic[ \t]{1,4}(?=[\w+/]{0,100}(?:[0-9=]|(?-i:[a-z][A-Z]))))[\w.~+/=-]{12,}",
            re.IGNORECASE,
        ),
        rf"\1{MASK}",
    ),
    Rule(
        ("passw", "passphrase", "pwd", "secret", "token", "key", "credential"),
        re.compile(
            rf"({_NAMED}(?:[\w-]{{0,40}}\\?[\"']?[ \t]{{0,4}}(?::=|=>|=(?!>)|:(?!=))|[\w.-]{{0,40}}=)"
            r"[ \t]{0,4}\\?)"
            rf"{_TELLS_NOTHING}{_VALUE}",
            re.IGNORECASE,
        ),
        rf"\1{MASK}",
    ),
    Rule(
        ("--",),
        re.compile(
            rf"(--[a-z-]{{0,30}}{_NAMED}(?!-?(?:stdin|file|path|dir|name|env|type|ttl|helper|command)\b)"
            rf"[a-z-]{{0,20}}[ \t]{{1,4}}){_VALUE}",
            re.IGNORECASE,
        ),
        rf"\1{MASK}",
    ),
    Rule(
        ("--password-stdin", "sudo -s"),
        re.compile(
            rf"(\b(?:echo|printf)[ \t]{{1,4}}(?:-n[ \t]{{1,4}})?)(?!\$\w){_WORD}"
            r"(?=[ \t]{0,4}\|[^\n|]{0,300}(?:--password-stdin|sudo -S))"
        ),
        rf"\1{MASK}",
    ),
    Rule(
        ("_auth",),
        re.compile(
            rf"((?<![A-Za-z0-9])_auth(?:token)?(?:[ \t]{{0,4}}[=:][ \t]{{0,4}}|[ \t]{{1,4}})){_VALUE}",
            re.IGNORECASE,
        ),
        rf"\1{MASK}",
    ),
    Rule(
        ('auth"', "auth'", "auth\\"),
        re.compile(r"(\\?[\"']auth\\?[\"'][ \t]{0,4}:[ \t]{0,4}\\?[\"'])([\w+/=-]{4,})", re.IGNORECASE),
        _without_auth,
    ),
    Rule(
        ("password",),
        re.compile(
            r"((?:\bmachine\s{1,9}\S{1,255}|\bdefault)\s{1,9}(?:(?:login|account)\s{1,9}\S{1,255}\s{1,9}){0,2}"
            r"password\s{1,9})\S+"
        ),
        rf"\1{MASK}",
    ),
    Rule(
        ("</", "<![cdata["),
        re.compile(
            rf"(<[\w:.-]{{0,40}}{_NAMED}[\w.-]{{0,40}}(?:\s[^<>]{{0,200}})?>)"
            r"(?:\s{0,40}<!\[CDATA\[(?:(?!\]\]>|<!\[CDATA\[)[\s\S])*(?:\]\]>)?|[^<]+)",
            re.IGNORECASE,
        ),
        rf"\1{MASK}",
    ),
    Rule(
        ("value=",),
        re.compile(
            rf"({_NAMED}[\w-]{{0,40}}[\"']\s{{1,4}}value=\\?)(?:\"[^\"\n]*\"?|'[^'\n]*'?)", re.IGNORECASE
        ),
        rf'\1"{MASK}"',
    ),
    Rule(tuple(_TOOLS), _COMMAND, _in_command),
    Rule((".atlasv1.",), re.compile(r"[A-Za-z0-9]{6,40}\.atlasv1\.[\w-]{20,}")),
    Rule(("q~",), re.compile(r"[\w~.]{3,4}Q~[\w~.-]{30,40}", re.ASCII)),
    Rule((":aa",), re.compile(r"\b\d{6,12}:AA[\w-]{30,}", re.ASCII)),
    Rule(("key-",), re.compile(rf"(?<![\w-])key-{_HEX}{{32}}\b")),
    Rule(("-us",), re.compile(rf"\b{_HEX}{{32}}-us\d{{1,2}}\b")),
)
"""Forms that need more than their own characters; not looked for in names and refs."""
