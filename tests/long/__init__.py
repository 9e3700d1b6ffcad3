"""Runs of minutes, each by its own command: a module here has ``main(words) -> int`` and is `python -m tests NAME`."""
