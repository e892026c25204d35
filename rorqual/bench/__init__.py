"""What `rorqual bench` times: a case for each op, and how a case is checked, timed and compared."""
