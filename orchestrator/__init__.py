"""Who does what, when, and why.

Read `control` (pure: view, decide, router, request_machine), then the loops that apply it:
`runtime/control_loop.py` (the controller) and `gateway/dispatcher.py` (requests); `cli` starts both.
"""
