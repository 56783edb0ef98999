"""Running only the open filters."""

from gaternet.skipping.skip import Skipper, skip

__all__ = ["Skipper", "skip"]
