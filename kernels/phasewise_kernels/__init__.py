"""Operations on tensors that the workers need and torch lacks. Imports nothing else of this repository.

Each operation is a folder: `op.py` is what callers use, `reference.py` says what it means.
"""
