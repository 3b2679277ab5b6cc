"""The smallest setup that meets a target: catalogue, search, explanation, export. Only detection asks a device."""
