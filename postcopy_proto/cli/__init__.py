"""`postcopy …`: one module a subcommand, each a short program made of the library's parts."""
