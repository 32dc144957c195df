"""The shells that run what `control` decides.

`control_loop` is the controller's main loop; `cluster` and `actors` are the only ray imports of this package;
`launch` starts and stops a deployment, and `registry` remembers which ones run on this machine.
"""
