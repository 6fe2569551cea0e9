"""What a run takes on other machines: its programs, compiled ahead of time and added up."""
