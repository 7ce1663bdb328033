"""Stage 2: distil the cached teachers into one student."""
