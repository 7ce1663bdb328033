"""What a cache holds, and whether it is whole."""
