"""Reading CI platforms: who is due (`stale`), one read (`repository`), how long to wait (`budget`)."""
