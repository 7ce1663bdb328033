"""What an encoder is, and how each is found, built and loaded."""
