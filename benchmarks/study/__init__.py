"""Studies: conditions x models x seeds, with criteria written before the runs."""
