"""A break that is planted and played: what it does to users, and the gate that stops it."""
