"""What a run leaves on disk: workdir, checkpoints, exports, tables, and models opened from them."""
