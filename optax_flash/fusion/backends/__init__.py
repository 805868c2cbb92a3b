"""What runs a program: one file a backend, one table of them."""
