"""Pages on this machine for one person, in a browser: a small server, and what all pages look like."""
