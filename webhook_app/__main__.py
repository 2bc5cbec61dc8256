"""`python -m webhook_app` is `buildrelay`."""

from webhook_app.cli import main

if __name__ == "__main__":
    main()
