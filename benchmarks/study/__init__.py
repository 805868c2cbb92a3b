"""Studies: conditions x seeds x models against criteria that were written before."""
