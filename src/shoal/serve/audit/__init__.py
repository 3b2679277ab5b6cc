"""The audit log: who asked which model, where it ran and what was refused, so that a change of it is found."""
