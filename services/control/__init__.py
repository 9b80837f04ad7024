"""Every decision under load. Pure: time is an argument."""
