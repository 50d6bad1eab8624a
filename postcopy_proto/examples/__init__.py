"""Source, destination, page fault handler of one's own; run by the tests, meant to be copied."""
