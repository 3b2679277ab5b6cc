"""Plans: the smallest setup that meets a target, over a catalogue of hardware and models, with the reasons."""
