"""Methods that drop tokens: one cache and generator, and one file for each rule of what goes."""
