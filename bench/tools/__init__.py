"""What the commands share: stopwatches, gates, rows, tables, and the networks and operators that are compared."""
