"""`doctor`: finds faults of a machine, a checkpoint, a codec, data or an adapter; `inspect`: one row of a store."""
