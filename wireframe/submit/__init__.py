"""``wireframe submit``: every scene of the challenge answered within its time, whatever the scenes are."""
