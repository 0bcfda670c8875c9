"""The rules of contracts, by what they judge."""
