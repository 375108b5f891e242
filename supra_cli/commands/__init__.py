"""One file a verb: parse → call core → print. A command touches no tensor and imports core inside its function.

A module with a function `run` is the verb of its own name; the first line of `run`'s docstring is its line in the help.
A module with a Typer object `app` is a group of verbs (`supra recipe list`). `--debug` and `--quiet` are added to all.
`console` is no verb: it is what they print with.
"""
