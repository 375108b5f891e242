"""One file a verb: parse → call core → print. A command touches no tensor and imports core inside its function.

A module with a function `run` is the verb of its own name (`run`'s docstring is the help, its first line the summary); a
module with a Typer object `app` is a group of verbs (`supra recipe list`). `--debug` and `--quiet` are added to every one.
`console` is no verb: it is what they print with.
"""
