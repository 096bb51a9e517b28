"""Methods of learning a sequence of tasks: `protocol` (the hooks), `registry` (names), one module per method."""
