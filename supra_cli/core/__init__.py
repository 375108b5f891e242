"""What supra does, without a command line: see docs/architecture.md for the rooms and what may import what."""
