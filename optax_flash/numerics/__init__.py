"""Storage formats: pure functions between arrays and their codes."""
