"""``python -m insightv`` is the command ``insightv``."""

from insightv.cli import main

main()
