"""Reading CI platforms: what is due (`stale`), read together (`repository`), within a token's budget."""
