"""gunicorn's settings (`--config python:webhook_app.gunicorn_conf`), read from ours."""

import os
from typing import Any

from gunicorn.glogging import Logger

from webhook_app import loglines, settings

_values = settings.load()

bind = os.environ.get("BUILDRELAY_BIND", f"0.0.0.0:{_values.port}")  # Heroku routes to it
workers = _values.web_concurrency
worker_class = "webhook_app.web.worker.Worker"
threads = int(os.environ.get("BUILDRELAY_WEB_THREADS", "24"))
timeout = 20  # a process that hangs for so long is replaced
graceful_timeout = int(_values.stop_grace_seconds)
keepalive = int(_values.keep_alive_seconds)  # longer than a proxy keeps them, so it never uses a closed one
backlog = 2048
limit_request_field_size = 16_380
control_socket_disable = True
sendfile = False  # it would overtake what is sent later, and has no deadline
forwarder_headers = ""  # else a header SCRIPT_NAME moves the path, past a reverse proxy's rule for it
accesslog = None
errorlog = "-"
loglevel = "warning"


class logger_class(Logger):  # type: ignore[misc]  # noqa: N801  the name of gunicorn's setting
    """gunicorn's own lines, those of its access log included, in the form of ours."""

    def setup(self, cfg: Any) -> None:
        """As gunicorn does, with our formatter."""
        super().setup(cfg)
        for handler in (*self.error_log.handlers, *self.access_log.handlers):
            handler.setFormatter(loglines.Formatter(_values.log_format, settings.redact(_values)))


def on_starting(server: Any) -> None:
    """Warn of settings that look misspelt, unless `up` has done so."""
    if "BUILDRELAY_BIND" not in os.environ:
        for name, meant in settings.misspelt(os.environ).items():
            server.log.warning("%s is no setting: did you mean %s?", name, meant)
