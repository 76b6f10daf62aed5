"""Fewer examples than hypothesis's default, always the same ones, and no deadline on a busy machine."""

from hypothesis import settings

settings.register_profile("prefkit", deadline=None, max_examples=50, derandomize=True)
settings.load_profile("prefkit")
