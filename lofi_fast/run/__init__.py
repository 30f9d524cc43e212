"""A run: its folder, state, checkpoints, log and seeds."""
