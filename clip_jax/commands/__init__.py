"""The commands, by subject: the flags of each beside what it does, which imports only what it needs."""
