"""Suites that every implementation of a protocol passes, the fakes included."""
