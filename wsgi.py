"""What gunicorn serves: `gunicorn wsgi:app`."""

from webhook_app.app import create_app

app = create_app()
