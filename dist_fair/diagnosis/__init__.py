"""What `dist-fair doctor` looks at. A check is a function from `Site` to verdicts, listed in `examination.CHECKS`."""
