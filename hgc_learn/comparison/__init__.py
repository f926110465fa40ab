"""Every policy at equal compute on one teacher: knobs tuned alike, judged on the same held-out samples."""

OURS = "learned"
"""The policy that reports set off against the others."""
