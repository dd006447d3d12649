"""What a recipe will need, found out before anything is loaded: memory, packs and steps, time."""
