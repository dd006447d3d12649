"""`doctor`: what is wrong with a machine, a checkpoint, a codec, data or an adapter; `inspect`: one row of a store."""
