"""Decoding methods that need no training and no second model. Pure: numpy, no torch, no clock, no randomness."""
