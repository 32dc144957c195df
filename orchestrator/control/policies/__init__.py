"""Scheduling policies: the protocol (policy.py), its own and its published parts, and the published algorithms that they call. Pure."""
