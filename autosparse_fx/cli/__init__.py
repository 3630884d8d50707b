"""The command line, ``autosparse-fx``."""
