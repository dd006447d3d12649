"""From raw recordings to a data set of utterances: the verb `collect`."""
