"""Text → documents (`sources`) → token files (`tokens`) → packed rows with a position that can be saved (`rows`)."""
