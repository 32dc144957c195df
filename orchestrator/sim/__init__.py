"""A cluster in simulated time: the code that serves, with a forward pass and a network that only take time. Pure."""
