"""The sessions that publish distributions and write release notes."""
