"""The offline quick start: scenes, tiny teachers, and the three stages."""
