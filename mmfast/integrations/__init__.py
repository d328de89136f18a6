"""Methods in the loops of others; each module needs its package, and is imported when it is used."""
