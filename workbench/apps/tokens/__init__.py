"""Patterns of short prompts, token by token: of runs, and of prompts written on the page."""
