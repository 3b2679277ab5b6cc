"""The fault suite: faults that prove that they took effect, clients that remember every token, and what must hold."""
