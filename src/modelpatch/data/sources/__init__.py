"""Sources of tasks, one file for each layout or library."""
