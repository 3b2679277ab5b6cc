"""The smallest setup that meets a target: catalogue, search, explanation, export. It computes, and asks no device."""
