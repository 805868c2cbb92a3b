"""What an optimizer does: its kernels, its memory, and what storage adds."""
