"""Collectives behind one interface, one module for each way to carry them."""
