"""Stage 3: probe frozen encoders, students and teachers alike."""
