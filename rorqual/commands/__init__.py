"""The rim: one file per rorqual sub-command."""
