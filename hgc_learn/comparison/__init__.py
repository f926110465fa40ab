"""Every policy at equal compute on the demonstration teacher: tuned alike, judged on the same held-out samples."""
