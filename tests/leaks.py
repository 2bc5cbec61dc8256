"""Texts that hold secrets, made when they are asked for: none is real, and none stands in a file.

`leaks(seed)` are some 200 forms; the same seed makes the same secrets, another one makes others, so that a
test can tell through which entrance one came.
"""

import base64
import hashlib
import string
from dataclasses import dataclass

HEX, ALNUM = "0123456789abcdef", string.ascii_letters + string.digits
UPPER, LOWER = string.ascii_uppercase + string.digits, string.ascii_lowercase + string.digits


@dataclass(frozen=True)
class Leak:
    """A text as it may stand in a log, and the part of it that nobody may see."""

    name: str
    text: str
    secret: str


def made(seed: str, alphabet: str, length: int) -> str:
    """So many characters that only this seed makes."""
    number, found = int.from_bytes(hashlib.sha512(seed.encode()).digest()), []
    number **= 1 + length * 5 // 400
    while len(found) < length:
        number, at = divmod(number, len(alphabet))
        found.append(alphabet[at])
        number = number or int.from_bytes(hashlib.sha512("".join(found).encode()).digest())
    return "".join(found)


_TOKENS = (
    *((prefix, ALNUM, 36) for prefix in ("ghp_", "gho_", "ghu_", "ghs_", "ghr_", "npm_", "dckr_pat_", "dckr_oat_")),
    *((f"{prefix}-", ALNUM, 20) for prefix in (
        "glpat", "glptt", "gldt", "glrt", "glrtr", "glcbt", "glft", "glsoat", "glagent", "glimt", "gloas",
        "glffct")),
    *((f"{prefix}_", HEX, 32) for prefix in ("shpat", "shpca", "shppa", "shpss")),
    *((f"{prefix}_v1_", HEX, 64) for prefix in ("dop", "doo", "dor")),
    *((f"dp.{kind}.", ALNUM, 43) for kind in ("pt", "st", "ct", "sa", "scim", "audit")),
    *((prefix, UPPER, 16) for prefix in ("AKIA", "ASIA", "ABIA", "ACCA", "AROA", "AIDA")),
    *((f"{prefix}_{mode}_", ALNUM, 24) for prefix in ("sk", "rk", "pk") for mode in ("live", "test")),
    *((f"{prefix}_", HEX, 40) for prefix in ("sqp", "squ", "sqa", "sbp")),
    *((f"xox{kind}-1234567890-", ALNUM, 24) for kind in "abceoprs"),
    *((f"pscale_{kind}_", ALNUM, 32) for kind in ("pw", "tkn", "oauth")),
    *((f"shippo_{kind}_", HEX, 40) for kind in ("live", "test")),
    ("brt_", ALNUM, 43), ("whsec_", ALNUM, 44), ("whsk_", ALNUM, 44), ("github_pat_", ALNUM, 82),
    ("hf_", string.ascii_letters, 34), ("api_org_", string.ascii_letters, 34), ("GOCSPX-", ALNUM, 28),
    ("AIza", ALNUM, 35), ("ya29.", ALNUM, 60), ("SG." + "a1" * 11 + ".", ALNUM, 43), ("rubygems_", HEX, 48),
    ("sntrys_", ALNUM, 90), ("sntryu_", HEX, 64), ("ATATT3x", ALNUM, 180), ("ATCTT3x", ALNUM, 60), ("ATBB", ALNUM, 32),
    ("pypi-AgEIcHlwaS5vcmc", ALNUM, 70), ("CLOJARS_", HEX, 60), ("oy2", LOWER, 43), ("AKCp", ALNUM, 69),
    ("sgp_", HEX, 40), ("bkua_", HEX, 40), ("CCIPAT_", ALNUM, 40), ("pul-", HEX, 40), ("pnu_", ALNUM, 36),
    ("PMAK-" + "ab" * 12 + "-", HEX, 34), ("API-", UPPER, 26), ("glc_", ALNUM, 60), ("NRAK-", UPPER, 27),
    ("dt0c01." + "A1" * 12 + ".", UPPER, 64), ("phx_", ALNUM, 43), ("ico-", ALNUM, 32), ("LTAI", ALNUM, 20),
    ("AQVN", ALNUM, 38), ("dapi", HEX, 32), ("HRKU-", ALNUM, 36), ("tskey-auth-", ALNUM, 40), ("nfp_", ALNUM, 36),
    ("rnd_", ALNUM, 28), ("fo1_", ALNUM, 43), ("fm2_", ALNUM, 100), ("hvs.", ALNUM, 90), ("hvb.", ALNUM, 90),
    ("sha256~", ALNUM, 43), ("sb_secret_", ALNUM, 31), ("AGE-SECRET-KEY-1", UPPER, 58), ("sq0atp-", ALNUM, 22),
    ("sq0csp-", ALNUM, 43), ("EAAA", ALNUM, 60), ("xkeysib-", HEX, 64), ("xapp-1-A1-", ALNUM, 40),
    ("lin_api_", ALNUM, 40), ("ntn_", ALNUM, 46), ("figd_", ALNUM, 40), ("sk-proj-", ALNUM, 48),
    ("sk-ant-api03-", ALNUM, 90), ("gsk_", ALNUM, 52), ("xai-", ALNUM, 80), ("pplx-", ALNUM, 48), ("r8_", ALNUM, 37),
    ("nvapi-", ALNUM, 64), ("lsv2_pt_", HEX, 32), ("tvly-", ALNUM, 32), ("eyJhbGciOiJIUzI1NiJ9.eyJz", ALNUM, 60),
    ("1//0", ALNUM, 60), ("SK", HEX, 32), ("CFPAT-", ALNUM, 43), ("ops_eyJ", ALNUM, 250), ("rdme_", LOWER, 70),
)  # fmt: skip

_AROUND = {
    "terraform": "abcDEF12345678.atlasv1.{36}", "azure": "a1b8Q~{34}", "telegram": "123456789:AA{33}", "mailgun": "key-{hex32}",
    "assigned": "password={}", "yaml": "db_password: {}", "json": '{{"client_secret": "{}"}}',
    "escaped json": r'{{\"client_secret\":\"{}\"}}', "export": "export API_KEY='{}'", "colon equals": "token := {}",
    "aws": "aws_secret_access_key = {}", "azure storage": "AccountName=x;AccountKey={}==;EndpointSuffix=y",
    "azure bus": "SharedAccessKeyName=x;SharedAccessKey={}=", "npmrc": "//registry.example/:_authToken={}",
    "npmrc pair": "//registry.example/:_auth={}", "npm config": "npm config set //r/:_authToken {}",
    "docker auth": '"auths": {{"r.example": {{"auth": "{b64}"}}}}', "docker login": "docker login -u me -p {} r.example",
    "podman login": "podman login --username me -p '{}' r.example", "helm login": "helm registry login r -u me -p {}",
    "login stdin": "echo {} | docker login -u me --password-stdin", "curl -u": "curl -u me:{} https://h/x",
    "curl -uX": "curl -sSLume:{} https://h/x", "curl --user": "curl --user 'me:{}' https://h/x",
    "curl proxy": "curl --proxy-user me:{} https://h/x", "curl header": "curl -H 'PRIVATE-TOKEN: {}' https://h",
    "mysql": "mysql -u root -p{} app", "mysql apart": "mysql -u root -p {} app", "mysqldump": "mysqldump -p'{}' app",
    "mongo": "mongosh -u me -p {} db", "sshpass": "sshpass -p {} ssh h", "sshpass near": "sshpass -p{} ssh h",
    "redis-cli": "redis-cli -h r -a {} ping", "7z": "7z x -p{} a.7z", "unzip": "unzip -P {} a.zip",
    "ldap": "ldapsearch -D cn=a -w {} -b dc=x", "smb": "smbclient //s/x -U me%{}", "openssl": "openssl rsa -passin pass:{}",
    "keytool": "keytool -storepass {} -list", "htpasswd": "htpasswd -cb file me {}", "twine": "twine upload -u me -p {} dist/*",
    "sudo": "echo '{}' | sudo -S reboot", "option": "deploy --api-token {} --dry-run", "option =": "deploy --password={} now",
    "netrc": "machine api.example login me password {}", "netrc lines": "machine api.example\n  login me\n  password {}",
    "netrc default": "default login me password {}", "xml": "<server><password>{}</password></server>",
    "xml attribute": '<db password="{}"/>', "xml cdata": "<privateKey><![CDATA[{}]]></privateKey>",
    "nuget": '<add key="ClearTextPassword" value="{}" />', "url": "https://me:{}@host/x.git",
    "url token": "https://{}@host/x.git", "url slash": "https://me:p/{}/x@host/x.git", "url at": "https://me:p@{}@host/x.git",
    "url question": "postgres://me:p?{}@db:5432/app", "url hash": "redis://:p#{}@db:6379/0", "url query": "GET /x?access_token={}&page=2",
    "url key": "https://maps.example/js?key={}&v=3", "url sig": "https://b.example/blob?sv=1&sig={}&se=2",
    "aws url": "https://b.example/x?X-Amz-Signature={}&y=1", "slack hook": "https://hooks.slack.com/services/T00/B00/{}",
    "discord hook": "https://discord.com/api/webhooks/123/{}", "teams hook": "https://x.webhook.office.com/webhookb2/{}",
    "telegram url": "https://api.telegram.org/bot123:{}/send", "bearer": "sent Bearer {} ok", "basic": "Authorization: Basic {b64}",
    "digest": 'authorization: Digest username="u", response={}', "cookie": "Set-Cookie: session={}; HttpOnly",
    "x-token": "X-Build-Token: {}", "x-api-key": "x-api-key: {}", "job token": "JOB-TOKEN: {}",
    "private key": "-----BEGIN PRIVATE KEY-----\n{}\n-----END PRIVATE KEY-----",
    "rsa key": "-----BEGIN RSA PRIVATE KEY-----\n{}\n{}\n-----END RSA PRIVATE KEY-----",
    "ssh key": "-----BEGIN OPENSSH PRIVATE KEY-----\n{}\n-----END OPENSSH PRIVATE KEY-----",
    "pgp key": "-----BEGIN PGP PRIVATE KEY BLOCK-----\n{}\n-----END PGP PRIVATE KEY BLOCK-----",
    "cut key": "-----BEGIN EC PRIVATE KEY-----\n{}", "key in json": r'"private_key": "-----BEGIN PRIVATE KEY-----\n{}\n-----END PRIVATE KEY-----\n"',
    "coloured": "\x1b[31mghp_{36}\x1b[0m", "escaped line": r"first\nghp_{36}\nthird", "percent": "a%3Dghp_{36}%26b",
    "in a name": "TOKEN_ghp_{36}", "pwd": "pwd={};uid=sa", "dsn": "Server=db;User Id=sa;Password={};Encrypt=true",
    "rails": "secret_key_base: {}", "django": "SECRET_KEY = '{}'", "laravel": "APP_SECRET=base64:{}",
    "spring": "spring.datasource.password={}", "gradle": "signing.keyPassword={}", "fastlane": "MATCH_PASSWORD={}",
    "sentence": "the API key: {} was rejected", "passphrase": "--passphrase {} --batch",
}  # fmt: skip


def leaks(seed: str) -> list[Leak]:
    """All forms, with secrets of this seed."""
    found = []
    for prefix, alphabet, length in _TOKENS:
        secret = made(seed + prefix, alphabet, length)
        found.append(Leak(prefix, f"use {prefix}{secret} now", secret))
    return found + [_around(seed, name, pattern) for name, pattern in _AROUND.items()]


def _around(seed: str, name: str, pattern: str) -> Leak:
    secret = made(seed + name, ALNUM, 28)
    for length in (33, 34, 36):
        if f"{{{length}}}" in pattern:
            secret, pattern = made(seed + name, ALNUM, length), pattern.replace(f"{{{length}}}", "{}")
    if "{hex32}" in pattern:
        secret, pattern = made(seed + name, HEX, 32), pattern.replace("{hex32}", "{}")
    if "{b64}" in pattern:
        secret = base64.b64encode(f"me:{secret}".encode()).decode().rstrip("=")
        pattern = pattern.replace("{b64}", "{}")
    return Leak(name, pattern.format(*[secret] * pattern.count("{}")), secret)


PLAIN_LINES = r"""
148 tests passed in 11.4 s
src/tokenizer.py:12:3: error: bad indent
Compiling secretary v0.2.1 (https://example.com/a@b/c)
commit 7111be6be7f5ff0558607111aa00bb11cc22dd33
AssertionError: 19.04 != 19.05
-----BEGIN CERTIFICATE-----
FAIL tests/test_cart.py::test_tax_is_rounded
Step 12/30 : COPY --from=builder /app/dist /usr/share/nginx/html
 ---> sha256:4bcff63911fcb4448bd4fdacec207030997caf25e9bea4045fa6c8c44de311d1
digest: sha256:4bcff63911fcb4448bd4fdacec207030997caf25e9bea4045fa6c8c44de311d1 size: 1573
docker run --rm -p 8080:80 -u 1000:1000 -e NODE_ENV=test registry.example/web:1.2.3@sha256:4bcff63911fcb4448bd4fdacec207030997caf25e9bea4045fa6c8c44de311d1
docker build -t web:latest --build-arg VERSION=1.2.3 .
#12 resolve docker.io/library/node:20-alpine@sha256:4bcff63911fcb4448bd4fdacec207030997caf25e9bea4045fa6c8c44de311d1 done
docker-compose -p shop up -d
Cloning into '/builds/octo/web'...
From https://github.com/octo/web
 * [new branch]      fix/password-reset -> origin/fix/password-reset
HEAD is now at 7111be6 Rotate the token of the deploy job
Merge pull request #42 from octo/feature/basic-auth
git clone git@github.com:octo/web.git
git clone ssh://git@github.com/octo/web.git
npm info run webpack@5.91.0 build node_modules/webpack ./bin/webpack.js --mode production
npm_config_registry_is_a_rather_long_name is not set
npm warn deprecated @babel/plugin-proposal-private-property-in-object@7.21.11
added 1423 packages, and audited 1424 packages in 32s
"resolved": "https://registry.example/lodash/-/lodash-4.17.21.tgz",
"integrity": "sha512-v2kDEe57lecTulaDIuNTPy3Ry4gLGJ6Z1O3vE1krgXZNrsQ+LFTGHVxVjcXPs17LhbZVGedAJv8XZ1tvj5FvSg==",
[INFO] Downloading from central: https://repo.maven.apache.org/maven2/org/apache/x/1.2.3/x-1.2.3.jar
[INFO] Downloaded from central: https://repo.maven.apache.org/maven2/org/a/b.jar (1.2 MB at 3.4 MB/s)
BUILD SUCCESSFUL in 2m 13s
Receiving objects:  43% (1234/2871), 12.00 MiB | 3.21 MiB/s
Server listening on http://localhost:3000
http://localhost:8080/@vite/client 200
https://cdn.example:8443/@scope/pkg@1.2.3/index.js
see https://docs.example/guide?page=2&sort=name#install
GET /search?keyword=monkey&design=1 200
fatal: Authentication failed for 'https://github.com/octo/web.git/'
E   AssertionError: expected Basic authentication, got none
Bearer authentication is required
WWW-Authenticate: Basic realm="x"
hf_hub_download_with_progress_bar_and_retries()
Running sk-learn-style-estimators-compatibility checks
uuid 3fa85f64-5717-4562-b3fc-2c963f66afa6 created
ETag: "33a64df551425fcc55e4d42a148795d9f25f89d4"
/usr/lib/x86_64-linux-gnu/libcrypto.so.3: version `OPENSSL_3.0.0' not found
C:\agent\_work\1\s\src\Program.cs(12,5): error CS1002: ; expected
file://C:/Users/build@ci/app.log
at com.example.auth.TokenFilter.doFilter(TokenFilter.java:42)
Traceback (most recent call last):
  File "/app/auth/tokens.py", line 12, in check
KeyError: 'user'
error TS2304: Cannot find name 'tokenCount'.
PASS src/components/PasswordField.test.tsx (5.2 s)
✓ asks for a password twice
-p 8080:80
tar -xzf app.tar.gz -C /opt && unzip -q tools.zip -d /opt/tools
zip -qr dist.zip dist
curl -fsSL https://deb.example.com/setup_20.x -o setup.sh
curl --retry 3 --output out.tgz https://example.com/x.tgz
mysql -u root -h 127.0.0.1 app < schema.sql
psql -U postgres -d app -f schema.sql
redis-cli -h 127.0.0.1 -p 6379 ping
ssh-keygen: generating public/private ed25519 key pair.
ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIJl0JbXlqQ7n6u5cVbq1 build@ci
Login Succeeded
  id-token: write
  token: ${{ secrets.GITHUB_TOKEN }}
env: API_TOKEN=$API_TOKEN
password: ***
deploy --token-file /run/secrets/token --password-stdin
<artifactId>spring-security-oauth2</artifactId>
kubectl -n shop rollout status deployment/web --timeout=120s
helm upgrade --install web ./chart -f values.yaml --set image.tag=1.2.3
Finished in 1 min 12 s (files took 0.3 s to load)
Cache restored from key: node-cache-Linux-x64-npm-d41d8cd98f00b204e9800998ecf8427e
go: downloading github.com/stretchr/testify v1.9.0
h1:oHQh2NKpcFlzXdJtg9LZZ6GzS0V9bVsbGyzeXcNJH3c=
v1.2.3-rc.4+build.567
ok  	github.com/octo/web/internal/auth	0.123s	coverage: 81.2% of statements
Uploading artifacts as "archive" to coordinator... 201 Created  id=123 responseStatus=201 Created
Job succeeded
""".strip().splitlines()
"""Lines of real builds in which nothing is secret: they are to stay as they are."""
