"""Floor 1: what can be asked, how it is checked, and the task store; imports no torch."""
