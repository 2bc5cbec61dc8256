"""Reading CI platforms: what is due (`stale`), read together (`repository`), with which token and how much."""
