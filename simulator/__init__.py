"""The simulator: a whole fleet in one thread, on a virtual clock, under faults that a seed draws."""
