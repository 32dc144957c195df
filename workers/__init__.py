"""One engine process on one device, serving a set of phases.

Read `api` (what others may import), then `engine/step_loop.py` (the main loop), then `worker.py`
(the process around it), which `actor.py` hosts in Ray and `main.py` runs as a plain process.
"""
