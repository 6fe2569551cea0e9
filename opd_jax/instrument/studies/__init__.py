"""Further questions to a corpus, one module each."""
