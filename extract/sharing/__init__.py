"""Many processes on one cache: shares of the tars, and claims."""
