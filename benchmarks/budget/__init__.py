"""Loss against bytes: which optimizer for which budget."""
