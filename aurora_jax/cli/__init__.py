"""Commands: one thin file per command. Each defines `HELP`, `add_arguments(parser)` and `run(args) -> int | None`."""
