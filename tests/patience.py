"""How long a test waits for another process: an end to what hangs, and no verdict on how fast a machine is."""

PATIENCE = 900.0  # seconds
