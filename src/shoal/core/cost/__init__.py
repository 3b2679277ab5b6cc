"""The cost model: time and memory of one engine's steps, from its shape."""
