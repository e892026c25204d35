"""Outside the floors: figures and pages, made from run files only."""
