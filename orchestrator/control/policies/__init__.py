"""Scheduling policies behind one protocol (policy.py), each a small class named after where it comes from. Pure."""
