"""Run an artifact: load it, generate text at any byte budget. Never imports torch."""
