"""The command line. One file per command; each has `configure(parser)` and `run(args) -> exit code`.

`main` imports only the command that was asked for, and commands import what is heavy inside `run`, so that
`haomiao --help` answers at once.
"""
