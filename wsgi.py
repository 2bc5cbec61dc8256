"""What gunicorn serves: `gunicorn wsgi:app`."""

import sys

from webhook_app import loglines, settings
from webhook_app.app import create_app
from webhook_app.settings import SettingsError

NOT_AGAIN = 3
"""The exit code of a worker with which gunicorn ends, and does not start the next."""

try:
    _values = settings.load()
    loglines.setup(_values.log_format, _values.log_level, settings.redact(_values))
    app = create_app(_values)
except SettingsError as error:
    sys.stderr.write(f"buildrelay: {error}\n")
    raise SystemExit(NOT_AGAIN) from None
