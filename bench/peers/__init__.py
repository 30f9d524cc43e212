"""What people would otherwise use: each written from its definition, and checked by the bench to compute the same."""
