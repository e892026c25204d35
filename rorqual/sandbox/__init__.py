"""Floor 0: runs untrusted programs confined; knows no tasks."""
