"""What a run and its models say: which tokens carry the KL, how sure that is, and pages of it."""
