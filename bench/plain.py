"""What the reception is compared with: Flask that checks the signature, answers 202 and keeps nothing."""

import hmac
import os

from flask import Flask, abort, request

app = Flask(__name__)
_SECRET = os.environ["GITHUB_WEBHOOK_SECRET"].encode()


@app.post("/webhooks/github")
def receive():
    """Check `X-Hub-Signature-256` over the raw body."""
    expected = "sha256=" + hmac.digest(_SECRET, request.get_data(cache=False), "sha256").hex()
    if not hmac.compare_digest(expected, request.headers.get("X-Hub-Signature-256", "")):
        abort(401)
    return {"status": "accepted"}, 202
