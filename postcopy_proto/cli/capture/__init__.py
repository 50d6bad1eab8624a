"""What `postcopy decode` is made of: reading captures, telling, counting, and joining them."""
