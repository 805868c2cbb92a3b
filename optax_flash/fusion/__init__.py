"""A compiler pass: a whole update becomes one kernel for each leaf.

``trace`` turns an update into equations, ``split`` cuts them into scalars and one
elementwise program for each kind of leaf, and ``leaf`` runs a program by the best
implementation for the platform: ``xla``, ``pallas`` or ``triton``.
"""
