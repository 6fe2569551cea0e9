"""What a finished run shows: its figure."""
