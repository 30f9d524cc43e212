"""One file for each command: what it measures, the rows it writes, and the table that is made of them."""
