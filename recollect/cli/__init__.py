"""The `recollect` command: one thin file per sub-command, nothing heavy imported before it is needed."""
