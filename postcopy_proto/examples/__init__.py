"""A source and a destination of one's own; run by the tests, meant to be copied."""
