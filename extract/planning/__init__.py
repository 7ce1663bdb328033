"""What an extraction will cost, before it is paid."""
