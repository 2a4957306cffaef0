"""Our speed measured against the usual way, as ratios."""
