"""Stands in front of matplotlib on the path of a process that a test starts, which saves it a second of drawing."""

raise ImportError("hidden", name="matplotlib")
