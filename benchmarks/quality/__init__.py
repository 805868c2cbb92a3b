"""Do models train as well with a compressed state? Runs, statistics, and a page."""
