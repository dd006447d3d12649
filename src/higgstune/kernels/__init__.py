IGNORE = -100  # label of an entry without loss, which torch's cross entropy ignores; here, where no torch is needed
