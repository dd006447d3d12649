"""Planning of a run before anything is loaded: memory, packs, steps and time."""
