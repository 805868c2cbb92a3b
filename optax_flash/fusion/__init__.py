"""A compiler pass: a whole update becomes one kernel for each leaf.

From the update of an optimizer to its kernels, in the order of the files:

1. ``fuse``: transformations hand their update to it. It traces the outermost one, with
   all that are inside, into equations. Encoding, decoding and stochastic rounding are
   one equation each: ``ops``.
2. ``simplify``: calls that tie leaves together are inlined, and divisions by scalars
   become products.
3. ``split``: the equations are cut into those that make scalars, an elementwise part
   for each leaf, and the rest.
4. ``program``: that part of a leaf. Leaves that differ in nothing else share one.
5. ``primitive``: a program runs as one equation, so that the backend is chosen when the
   platform is known, which is when the equation is lowered.
6. ``partition``: on several devices each runs the program on its own shard.
7. ``launch`` and ``tiles``: what a kernel is given, and where a tile's elements lie in
   its operands.
8. ``backends``: what runs a program on shards. Without a kernel that is XLA, which is
   also the reference for all others. A new backend is one file there and one row in the
   table of ``backends/__init__.py``.

Beside the chain are ``jaxprs``, with which all passes read and evaluate equations;
``parts``, which runs some leaves or one layer of an update, for ``fuse`` and for
gradient release; ``error_feedback`` and ``rounding``, the derivative and the arithmetic
with which compressed updates make up for rounding; ``tangents``, which tells whether
jax is differentiating; and ``untraced``, for updates that jax cannot trace.
"""
