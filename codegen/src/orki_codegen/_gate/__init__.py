"""The version gate: compares every distribution with its last release and checks that its version fits the changes."""
