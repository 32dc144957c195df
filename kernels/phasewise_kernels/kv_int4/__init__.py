"""K and V of a token in four bits, row by row, so that a cache of them is written as tokens come."""
