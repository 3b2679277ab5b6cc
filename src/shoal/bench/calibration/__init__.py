"""Calibration of the cost model to a machine: what is timed, how, and the few constants that are fitted to it."""
