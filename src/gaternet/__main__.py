"""`python -m gaternet`, for launchers that want a module: `accelerate launch -m gaternet train ...`."""

from gaternet.cli import main

main()
