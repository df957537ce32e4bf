"""``python -m foveate`` is ``foveate``."""

from foveate.cli import app

app(prog_name="foveate")
