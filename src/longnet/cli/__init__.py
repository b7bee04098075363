"""The ``longnet`` command: one file a subcommand."""
