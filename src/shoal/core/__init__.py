"""The pure heart: no torch, no clock, no I/O, no randomness of its own. See docs/architecture.md."""
