"""Checks of Triton kernels against their references, for a GPU or for Triton's interpreter on the CPU.

A module has functions `check_...(device)`. `interpreter.py` runs them on the CPU; tests of tests/gpu call them with "cuda".
"""
