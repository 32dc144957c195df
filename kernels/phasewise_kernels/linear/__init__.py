"""Projections: rows times a weight that never changes."""
