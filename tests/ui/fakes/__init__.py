"""The parts of the frozen service, one file each."""
