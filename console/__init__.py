"""How every command speaks to its user: progress, errors and exit codes, and `unic.toml`."""
