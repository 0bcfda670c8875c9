"""Rules for one contract, by subject."""
