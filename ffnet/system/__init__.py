"""Files, memory, streams, signals and text: nothing about networks."""
