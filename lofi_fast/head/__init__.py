"""TAL heads: from snippet features to boundary probabilities and a map of proposals."""
