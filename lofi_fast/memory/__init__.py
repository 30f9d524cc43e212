"""Memory: what is used, what a step needs, and which rung of the ladder fits."""
