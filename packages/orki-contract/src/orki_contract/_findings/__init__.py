"""Rules for the changes between two versions of a contract."""
