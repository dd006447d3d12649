"""From raw recordings, hours long, to utterances."""
