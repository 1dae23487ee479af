"""The command line: parse, build, call. Nothing imports this package."""
