"""Continual tuning of language models on a sequence of tasks: tasks, metrics, layers, methods and diagnostics."""
