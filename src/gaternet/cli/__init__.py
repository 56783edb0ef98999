"""The command line: it parses, calls, prints. Heavy imports wait until a command needs them."""

from gaternet.cli import training, using, exporting  # isort: skip  (commands are listed in this order)
from gaternet.cli.common import app, main

__all__ = ["app", "exporting", "main", "training", "using"]
