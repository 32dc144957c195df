"""Checks of Triton kernels against their references, for a GPU or for Triton's interpreter on the CPU.

A module has functions `check_...(device)`, and under `python -m` runs them all on the CPU, which needs
TRITON_INTERPRET=1: see `interpreter.py`. Tests of tests/gpu call them with "cuda".
"""
