"""Norm by the root mean square of a row, with the sum before it."""
