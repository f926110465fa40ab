"""Every policy at equal compute on one teacher: knobs tuned alike, judged on the same held-out samples."""
