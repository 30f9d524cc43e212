"""Measurements. Each is a JSON row in bench/results, and the README's tables are made from the rows."""
