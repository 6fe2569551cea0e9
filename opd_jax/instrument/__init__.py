"""The instrument: which tokens carry the KL, on corpora instead of runs."""
