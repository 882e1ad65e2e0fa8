"""Questions asked of trained detectors; each study reads what runs leave behind, and makes the runs it lacks."""
