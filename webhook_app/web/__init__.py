"""The web door: the only package that imports Flask."""
