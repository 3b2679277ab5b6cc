"""The torch side: loads a model and runs the steps that the core plans."""
