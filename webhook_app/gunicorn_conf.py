"""gunicorn's settings (`--config python:webhook_app.gunicorn_conf`), read from ours."""

import os

from webhook_app import settings

_values = settings.load()

bind = os.environ.get("BUILDRELAY_BIND", f"0.0.0.0:{_values.port}")  # Heroku routes to it
workers = _values.web_concurrency
worker_class = "webhook_app.web.worker.Worker"
threads = int(os.environ.get("BUILDRELAY_WEB_THREADS", "24"))
timeout = 60
graceful_timeout = 4
keepalive = 75
backlog = 2048
limit_request_field_size = 16_380
control_socket_disable = True
accesslog = None
errorlog = "-"
loglevel = "warning"
