"""Floor 2: completions to trajectories; sees a policy only through rorqual.policy."""
