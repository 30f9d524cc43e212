"""The report of a run folder: what it says, its rows, its figures, its page."""
