"""One worker on several devices: each rank holds a part of every layer, and rank 0 has the engine."""
