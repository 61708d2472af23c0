// No kernel yet: ops/ghost.py runs the reference on Metal.
