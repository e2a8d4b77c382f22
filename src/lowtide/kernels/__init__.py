"""Engines that run an artifact: `native` (liblowtide, fast) and `reference` (numpy, the specification in code)."""
