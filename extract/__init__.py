"""Stage 1: run frozen encoders once over fixed views, and cache their CLS and patch tokens."""
